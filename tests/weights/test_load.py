"""Every layout, wrapper and file format into a network, and each way in which weights do not fit."""

import argparse
import re
from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

import resnest_imagenet
from resnest_imagenet import build_model
from resnest_imagenet.checkpoint import load_checkpoint, save_checkpoint
from resnest_imagenet.commands import export as command
from resnest_imagenet.errors import CheckpointError, ConfigError
from resnest_imagenet.inference.describe import describe_input
from resnest_imagenet.models.imagenet_classes import imagenet_synsets
from resnest_imagenet.weights import published
from resnest_imagenet.weights.export import describe_weights, export_weights
from resnest_imagenet.weights.graphs import export_graph
from resnest_imagenet.weights.hub import export_folder
from resnest_imagenet.weights.load import Weights, match_tensors, read_weights, restore_network, start_from

NAME = "resnest14_half"


@pytest.fixture(scope="module")
def model():
    """Every tensor different from any other and from a new network's."""
    torch.manual_seed(0)
    model = build_model(NAME, 7).to(memory_format=torch.channels_last).eval()
    for number, (key, value) in enumerate(model.state_dict().items()):
        if key.endswith("num_batches_tracked"):
            value.fill_(number)
        elif value.ndim == 1:
            value.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def save(tmp_path):
    """Write a state dict and return its path."""

    def write(content, name="weights.pth"):
        save_checkpoint(content, tmp_path / name)
        return str(tmp_path / name)

    return write


def export(source, out, model=NAME, **options):
    return export_weights(source, out, model=model, form=str(out).rpartition(".")[2], **options)


def assert_same_logits(one, other):
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        # In one memory format: the other sums in another order.
        assert torch.equal(*(each.to(memory_format=torch.channels_last)(images) for each in (one, other)))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("layout", ["official", "timm", "mmpretrain"])
def test_exported_weights_come_back(layout, suffix, model, save, tmp_path):
    source, out = save(model.state_dict()), tmp_path / f"new/out.{suffix}"
    line = export(source, out, layout=layout)
    assert re.fullmatch(rf"wrote {out}: {NAME}, \d+ tensors, SHA-256 [0-9a-f]{{64}}", line)
    restored, name = restore_network(read_weights(str(out)), NAME)
    assert name == NAME
    assert_same_logits(restored.eval(), model)
    assert all(value.is_contiguous() for value in load_checkpoint(out).values())
    export(str(out), tmp_path / f"back.{suffix}")
    back, original = load_checkpoint(tmp_path / f"back.{suffix}"), model.state_dict()
    assert back.keys() == original.keys()
    assert all(torch.equal(back[key], original[key]) for key in original)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_detectron2_has_the_backbone_only(suffix, model, save, tmp_path):
    out = tmp_path / f"out.{suffix}"
    export(save(model.state_dict()), out, layout="detectron2")
    _, tensors = match_tensors(read_weights(str(out)), NAME)
    original = model.state_dict()
    assert tensors.keys() == original.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(tensors[key], original[key]) for key in tensors)
    with pytest.raises(CheckpointError, match=r"out\.\w+: lacks the classifier: train one with train.init_from"):
        restore_network(read_weights(str(out)), NAME)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}, "epoch": 3},
        lambda state: {"state_dict": state, "meta": {"epoch": 3}},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}, "optimizer": {}},
        lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
        lambda state: {key: value for key, value in state.items() if "num_batches" not in key},
    ],
)
def test_wrappers_are_taken_off(wrap, model, save):
    restored, _ = restore_network(read_weights(save(wrap(model.state_dict()))), NAME)
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(restored.state_dict()[key], value, rtol=1e-3, atol=1e-4)


def test_counters_that_a_file_lacks_start_at_0(model, save):
    state = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
    assert restore_network(read_weights(save(state)), NAME)[0].bn1.num_batches_tracked == 0
    assert restore_network(read_weights(save(model.state_dict())), NAME)[0].bn1.num_batches_tracked > 0


@pytest.mark.parametrize(("raw", "average"), [("model", "model_ema"), ("state_dict", "state_dict_ema")])
def test_a_moving_average_beside_the_weights(raw, average, model, save):
    """As torchvision's references and timm's training keep it; torch's AveragedModel adds a counter and a prefix."""
    trained = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    averaged = {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in model.state_dict().items()}}
    source = save({raw: trained, average: averaged})
    for choice, is_average in (("auto", True), ("ema", True), ("model", False)):
        weights = read_weights(source, choice)
        assert weights.is_average == is_average
        restored, _ = restore_network(weights, NAME)
        assert torch.equal(restored.bn1.bias, model.bn1.bias if is_average else torch.zeros(32))


def test_files_of_torch_before_1_6_are_read(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_same_logits(restore_network(read_weights(str(tmp_path / "old.pth")), NAME)[0].eval(), model)


def test_training_checkpoints_of_other_projects_are_read(model, tmp_path):
    """What timm's train.py and torchvision's references keep beside the weights: it is not looked at."""
    beside = {
        "args": argparse.Namespace(model="resnest", output=Path("runs"), started=datetime.now()),
        "lr_scheduler": {"milestones": Counter([30]), "last": np.float64(0.1)},
        "metric": np.float32(76.5),
        "rng": np.random.default_rng(0).integers(9, size=3),
        "dtype": np.dtype("float32"),
    }
    for key, as_zip in (("state_dict", True), ("model", False)):
        path = tmp_path / "checkpoint.pth"
        torch.save({key: model.state_dict(), **beside}, path, _use_new_zipfile_serialization=as_zip)
        assert_same_logits(restore_network(read_weights(str(path)), NAME)[0].eval(), model)
    assert not any(isinstance(entry, tuple) for entry in torch.serialization.get_safe_globals())  # ours are gone


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.slow
def test_what_is_not_read_is_named_with_the_way_out(model, tmp_path):
    torch.save({"model": model.state_dict(), "hook": torch.nn.ReLU()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"it holds torch.nn.modules.activation.ReLU, .* its state dict alone"):
        read_weights(str(tmp_path / "a.pth"))
    torch.jit.script(torch.nn.ReLU()).save(str(tmp_path / "script.pt"))
    with pytest.raises(CheckpointError, match=r"a TorchScript archive, .*: .*torch.save\(torch.jit.load\(FILE\)"):
        read_weights(str(tmp_path / "script.pt"))


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


def run_of(state, num_classes):
    """As a run of this project has it."""
    config = {"model": {"name": NAME}, "train": {}}
    return {"model": state, "ema": None, "config": config, "classes": ["x"] * num_classes, "epoch": 1}


# What is done to the official file, and what the line must say: the first of them builds every network once.
FAULTS = [
    (lambda s: without(s, "layer4.0.conv2.fc1.bias"), "layer4.0.conv2.fc1.bias is missing: not the weights of"),
    (lambda s: without(s, "fc.bias"), "fc.weight and fc.bias do not match each other"),
    (lambda s: {**s, "fc.bias": torch.zeros(8)}, "fc.weight and fc.bias do not match each other"),
    (lambda s: {**s, "extra.bias": torch.zeros(1)}, "unexpected key extra.bias: not the weights of"),
    (lambda s: {**s, "bn1.weight": torch.zeros(3)}, r"bn1.weight has shape \(3,\), not \(32,\)"),
    (lambda s: {**s, "fc.weight": torch.zeros(7, 5)}, r"fc.weight has shape \(7, 5\), not \(7, 1024\)"),
    (lambda s: {**s, "epoch": 3}, "epoch is not a tensor: not a state dict"),
    (lambda s: {}, "conv1.0.weight is missing"),
    (lambda s: s["fc.bias"], "holds a Tensor, not a state dict"),
    (lambda s: {3: s["fc.bias"]}, "3 is not a tensor: not a state dict"),
    (lambda s: {**s, "fc.bias": torch.tensor(1.0)}, r"fc.bias has shape \(\), not \(1000,\)"),
    (lambda s: {**s, "fc.weight": torch.zeros(0, 1024)}, r"fc.weight has shape \(0, 1024\)"),
    (
        lambda s: {**s, "fc.weight": torch.ones(7, 1024).int()},
        "fc.weight is not a dense tensor of floating-point numbers",
    ),
    (lambda s: {**s, "fc.bias": torch.zeros(7).to_sparse()}, "fc.bias is not a dense tensor of floating-point numbers"),
    (lambda s: {**s, "fc.weight": torch.zeros(1, 1024).expand(7, 1024)}, r"fc.weight \(7, 1024\) repeats its numbers"),
    (lambda s: {"model": s, "ema": None, "config": {}, "classes": [], "epoch": 1}, "without its configuration"),
    (lambda s: run_of(s, 6), r"6 class names for fc.weight \(7, 1024\)"),
    (lambda s: run_of(s, 8), r"8 class names for fc.weight \(7, 1024\)"),
]


@pytest.mark.parametrize("has_classes", [True, False])
def test_a_checkpoint_of_another_task_is_refused_in_one_line(has_classes, model, save, tmp_path, monkeypatch, capsys):
    """By all that read weights: there is one reader. One that names no task is of before there were others."""
    content = run_of(model.state_dict(), 7) | {"task": "depth", "metric": "delta1", "best": 40.0}
    if not has_classes:
        del content["classes"]
    source = save(content, "best.pt")
    line = f"{source}: a checkpoint of task depth, not of classification: choose another, or other weights"
    readers = (
        lambda: read_weights(source),
        lambda: resnest_imagenet.open_classifier(source),
        lambda: resnest_imagenet.predict(source, source),
        lambda: resnest_imagenet.load_backbone(build_model(NAME, features_only=True), NAME, source),
        lambda: export(source, tmp_path / "out.pth"),
        lambda: export_folder(source, describe_input, tmp_path / "hub"),
        lambda: export_graph(source, describe_input, tmp_path / "out.pt2", form="torch_export"),
    )
    for read in readers:
        with pytest.raises(CheckpointError, match=f"^{re.escape(line)}$"):
            read()
    monkeypatch.setattr("sys.argv", ["resnest-export", f"ckpt={source}", f"out={tmp_path}/out.pth"])
    with pytest.raises(SystemExit, match="4"):
        command.main()
    line = line.replace("classification", "classification or segmentation or detection")
    assert capsys.readouterr().err == f"resnest-export: {line}\n"
    for task in ({}, {"task": "classification"}):
        weights = read_weights(save(run_of(model.state_dict(), 7) | task, "best.pt"))
        assert weights.model == NAME


@pytest.mark.parametrize(("damage", "message"), FAULTS)
@pytest.mark.slow
def test_what_does_not_fit_is_named(damage, message, model, save):
    with pytest.raises(CheckpointError, match=message) as caught:
        restore_network(read_weights(save(damage(model.state_dict()))), NAME)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_missing_key_is_named_as_in_its_file(model, save, tmp_path):
    export(save(model.state_dict()), tmp_path / "mm.pth", layout="mmpretrain")
    broken = without(load_checkpoint(tmp_path / "mm.pth"), "backbone.stem.2.bn.bias")
    with pytest.raises(CheckpointError, match="backbone.stem.2.bn.bias is missing"):
        restore_network(read_weights(save(broken)), NAME)


@pytest.mark.slow
def test_another_network_is_told_which_would_fit(model, save):
    weights = read_weights(save(model.state_dict()))
    with pytest.raises(CheckpointError, match=r"conv1.0.weight has shape .* resnest14; they fit model=resnest14_half$"):
        restore_network(weights, "resnest14")
    with pytest.raises(ConfigError, match="holds bare weights, and they fit model=resnest14_half$"):
        restore_network(weights, None)
    with pytest.raises(ConfigError, match="unknown model 'resnest14_hal'; did you mean 'resnest14_half'"):
        restore_network(weights, "resnest14_hal")


@pytest.mark.slow
def test_networks_of_the_same_shapes_are_both_named(save):
    """The place of the pool is not in the weights: a wrong choice would load, and compute something else."""
    weights = read_weights(save(build_model("resnest50", 3).state_dict()))
    with pytest.raises(ConfigError, match="they fit model=resnest50 or model=resnest50_fast_2s1x64d$"):
        restore_network(weights, None)


@pytest.mark.slow
def test_published_weights_know_their_network_and_classes(save, monkeypatch):
    path = Path(save(build_model(NAME, 1000).state_dict()))
    monkeypatch.setattr("resnest_imagenet.weights.load.fetch", lambda source: (path, NAME))
    weights = read_weights("official:this")
    assert restore_network(weights, None)[1] == NAME
    with pytest.raises(ConfigError, match="model=resnest50, but official:this holds a resnest14_half"):
        restore_network(weights, "resnest50")
    with pytest.raises(ConfigError, match="weights=ema, but official:this holds no moving average"):
        read_weights("official:this", "ema")
    # A thousand other classes get a classifier of their own.
    assert weights.classes == imagenet_synsets()
    assert not start_from(build_model(NAME, 1000), NAME, [f"place{n:04}" for n in range(1000)], weights)
    assert set(published.OFFICIAL) <= set(resnest_imagenet.list_models())


def test_misspelt_sources_get_the_nearest():
    for source in ("offical:resnest50", "official:resnest_50", "Official:resnest50"):
        with pytest.raises(ConfigError, match=f"unknown weights '{source}'.*did you mean 'official:resnest50'"):
            read_weights(source)


def test_a_new_classifier_for_other_classes(model, save):
    weights = read_weights(save(model.state_dict()))
    new = build_model(NAME, 3)
    own = new.fc.weight.clone()
    assert not start_from(new, NAME, ["a", "b", "c"], weights)
    assert torch.equal(new.fc.weight, own)
    assert torch.equal(new.layer4[0].conv1.weight, model.layer4[0].conv1.weight)
    same = build_model(NAME, 7)
    assert start_from(same, NAME, list("abcdefg"), replace(weights, classes=list("gfedcba")))
    assert torch.equal(same.fc.weight, model.fc.weight.flip(0)) and torch.equal(same.fc.bias, model.fc.bias.flip(0))
    assert not start_from(same, NAME, list("abcdefg"), weights)  # nobody says which


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (float("nan"), torch.float32),
        (float("nan"), torch.float8_e4m3fn),
        (float("inf"), torch.float16),
        (float("-inf"), torch.bfloat16),
    ],
)
def test_values_that_are_not_finite_are_named(model, save, value, dtype):
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for key in ("layer1.0.bn3.running_var", "fc.weight"):
        state[key].view(-1)[-1] = value
        state[key] = state[key].to(dtype)
    for source in (save({f"module.{key}": tensor for key, tensor in state.items()}), save({"model": state}, "run.pt")):
        with pytest.raises(CheckpointError, match=f"^{source}: layer1.0.bn3.running_var has values that are not fin"):
            read_weights(source)


def test_an_export_says_which_numbers_its_outputs_are():
    """Of a run of a version that ordered numbered folders as text: bare weights do not tell."""
    numbers = [str(number) for number in range(12)]
    for classes, words in (
        (sorted(numbers), f"{NAME} with its outputs for the classes 0, 1, 10, 11, 2, 3, 4, 5, ..."),
        (numbers, NAME),
        (["b", "a"], NAME),
        (None, NAME),
    ):
        assert describe_weights(Weights("x", {}, classes=classes), NAME) == words


@pytest.mark.slow
def test_export_refuses_what_it_cannot_do(model, save, tmp_path):
    source = save(model.state_dict())
    with pytest.raises(ConfigError, match="out=.*out.pt does not end in .pth"):
        export_weights(source, tmp_path / "out.pt", model=NAME, form="pth")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be written"):
        export(source, tmp_path / "file/out.pth")
    with pytest.raises(ConfigError, match="out=.*weights.pth is the checkpoint itself"):
        export(source, source)
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(ConfigError, match="folder.pth: cannot be written .it is a folder"):
        export(source, tmp_path / "folder.pth")
    assert not list(tmp_path.glob("*.tmp"))
    peer = save(build_model("resnet50", 2).state_dict(), "peer.pth")
    with pytest.raises(ConfigError, match="layout=mmpretrain is known for ResNeSts, and .* holds a resnet50"):
        export(peer, tmp_path / "out.pth", "resnet50", layout="mmpretrain")


def test_the_command(model, save, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.safetensors"
    arguments = [f"ckpt={save(model.state_dict())}", f"model={NAME}", f"out={out}"]
    monkeypatch.setattr("sys.argv", ["resnest-export", *arguments])
    command.main()
    assert capsys.readouterr().out.startswith(f"wrote {out}: {NAME}, ")
    assert torch.equal(load_checkpoint(out)["fc.weight"], model.fc.weight)


def test_what_hydra_would_instantiate_stays_text(model, save, tmp_path):
    """A configuration in a checkpoint is anybody's."""
    content, canary = run_of(model.state_dict(), 7), tmp_path / "canary"
    trap = {"_target_": "builtins.open", "_args_": [str(canary), "w"]}
    instantiate(trap).close()
    canary.unlink()  # the trap works
    for part in (content["config"], *content["config"].values()):
        if isinstance(part, dict):
            part.update(trap)
    source = save(content, "best.pt")
    opened = resnest_imagenet.open_classifier(source)
    assert torch.equal(opened.module.fc.weight, model.fc.weight)
    export(source, tmp_path / "out.safetensors")
    content["config"]["model"]["name"] = trap
    with pytest.raises(CheckpointError):
        resnest_imagenet.open_classifier(save(content, "best.pt"))
    assert not canary.exists()


def test_nothing_in_a_file_is_ever_executed():
    for path in Path(resnest_imagenet.__file__).parent.rglob("*.py"):
        text = path.read_text()
        assert "weights_only=False" not in text and text.count("torch.load(") == text.count("weights_only=True"), path
