"""Networks and data sources of another package: the example of docs/extending.md, built, installed, trained."""

import csv
import json
import os
import re
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from resnest_imagenet import build_model, extensions, list_models, register_model, register_source, register_task
from resnest_imagenet.data.loader import open_source
from resnest_imagenet.errors import ConfigError, DataError
from resnest_imagenet.models.cost import count_cost, count_kept, count_stages
from resnest_imagenet.models.dropblock import DropBlock
from resnest_imagenet.models.zoo import usual_crop
from resnest_imagenet.weights.export import export_weights
from resnest_imagenet.weights.load import read_weights, restore_network, start_from

DOCS = Path(__file__).parents[1] / "docs/extending.md"


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """Build the documented package's wheel and unpack it into a folder, as an installation does."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    files = dict(re.findall(r"\n`([\w/.]+)`\n\n```\w+\n(.*?)```\n", DOCS.read_text(), re.DOTALL))
    assert files.keys() == {"pyproject.toml", *(f"tinynets/{name}.py" for name in ("__init__", "network", "lists"))}
    for name, text in files.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel"], cwd=source, check=True)
    (wheel,) = source.glob("dist/*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def with_packages(*folders):
    return {"PYTHONPATH": os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture(scope="session")
def lists(demo_images, tmp_path_factory):
    """The demo's images once more, as the example's data source lists them."""
    root = tmp_path_factory.mktemp("lists")
    for part in ("train", "val"):
        (root / part).mkdir()
        paths = {f"{path.parent.name}-{path.name}": path for path in (demo_images / part).glob("*/*")}
        for name, path in paths.items():
            (root / part / name).symlink_to(path)
        with open(root / part / "list.csv", "w", newline="") as file:
            csv.writer(file).writerows([name, path.parent.name] for name, path in paths.items())
    return root


TRAIN = ("+experiment=demo", "model.name=tinynet", "data.kind=list", "train.crop=32", "train.batch_size=16")
TRAIN += ("device=cpu", "loader.workers=0", "loader=torchvision", "train.dropout=0.1")
# The commands, one after another in one process, as each would be in its own.
COMMANDS = """
import importlib, json, sys
for command, arguments in json.loads(sys.argv[1]):
    sys.argv = ["resnest-" + command, *arguments]
    importlib.import_module("resnest_imagenet.commands." + command).main()
"""


@pytest.mark.process
def test_a_package_trains_resumes_evaluates_predicts_and_exports(installed, lists, tmp_path):
    environment = with_packages(installed)
    run = tmp_path / "run"
    train = [*TRAIN, f"data.root={lists}", f"run_dir={run}"]
    best, results = run / "checkpoints/best.pt", tmp_path / "results.json"
    weights, image = tmp_path / "w.safetensors", next((lists / "val").glob("disk-*"))
    common = ["device=cpu", "loader=torchvision", "loader.workers=0"]
    commands = [
        ("train", [*train, "train.epochs=2"]),
        ("train", [*train, "train.epochs=3", "checkpoint.on_mismatch=extend"]),
        ("evaluate", [f"ckpt={best}", "data.kind=list", f"data.root={lists}", f"out={results}", *common]),
        ("export", [f"ckpt={best}", "format=safetensors", f"out={weights}"]),
        ("predict", [f"ckpt={weights}", "+model.name=tinynet", f"images={image}", *common]),
    ]
    arguments = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    result = subprocess.run(
        arguments, env={**os.environ, **environment}, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.index("epoch 2/2") < result.stdout.index("resuming after") < result.stdout.index("epoch 3/3")
    # The evaluation of a run is that of its checkpoint.
    (measured,) = json.loads(results.read_text())["results"]
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert measured["top1"] == max(event["top1"] for event in events if event["event"] == "eval")
    assert re.search("taking the usual test crop of tinynet: .* crop 64", result.stderr)


ASK_BOTH = """
import sys
import hubconf
from resnest_imagenet import build_model, list_models
build_model("resnest14_half", 2)
print(*sorted({"resnest50", "tinynet", "othernet"} & set(list_models())), callable(hubconf.resnest50), flush=True)
from resnest_imagenet.commands.train import main
for option in sys.argv[1:]:
    sys.argv = ["resnest-train", *option.split()]
    try:
        main()
    except SystemExit as error:
        print(error.code, flush=True)
"""
FAILURE = "package broken: its entry point all = broken_code:register failed: ZeroDivisionError: division by zero "
FAILURE += "(broken_code.py, line 2)"


@pytest.fixture
def broken(tmp_path):
    """A package that fails to register."""
    (tmp_path / "broken-1.dist-info").mkdir()
    (tmp_path / "broken-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (tmp_path / "broken-1.dist-info/entry_points.txt").write_text("[resnest_imagenet]\nall = broken_code:register\n")
    (tmp_path / "broken_code.py").write_text("def register():\n    return 1 / 0\n")
    return tmp_path


@pytest.mark.process
def test_a_package_that_fails_is_one_line_that_names_it(installed, broken):
    """Without a traceback; what is there works as without the package, and what is not may be the package's."""
    runs = {"data.root=. model.name=othernet": (2, f"unknown model 'othernet', and {FAILURE}")}
    runs |= dict.fromkeys(
        ("data.root=/x model.name=tinynet", "data.root=/x +experiment=demo"), (3, "data.root=/x: no such folder")
    )
    for part in ("train", "val"):
        (broken / part / "a").mkdir(parents=True)
    environment = {**os.environ, **with_packages(installed, broken, DOCS.parents[1])}
    command = [sys.executable, "-c", ASK_BOTH, *runs]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=broken)
    assert result.stdout.splitlines() == ["resnest50 tinynet True", *(str(code) for code, _ in runs.values())]
    warning, *lines = result.stderr.splitlines()
    assert warning == f"WARNING: {FAILURE}"
    for line, (_, message) in zip(lines, runs.values(), strict=True):
        assert line.startswith("resnest-train: ") and message in line


@pytest.fixture
def registry(monkeypatch):
    """An empty registry, which is as it was after the test."""
    for name in ("models", "sources", "tasks"):
        monkeypatch.setattr(getattr(extensions, name), "_entries", {})


class Net(nn.Module):
    """A network whose keys look like a wrapper's, with a buffer of integers, a parameter of its own, and no bias."""

    def __init__(self, num_classes, width=4):
        super().__init__()
        self.model = nn.Module()
        self.model.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.model.conv = nn.Conv2d(3, width, 3)
        self.model.register_buffer("index", torch.arange(2))
        self.model.classifier = nn.Sequential(nn.ReLU(), nn.Linear(width, num_classes, bias=False))

    def forward(self, images):
        return self.model.classifier(self.model.conv(images * self.model.scale).mean((2, 3)))


HEAD = "model.classifier.1"


def test_a_registered_network_is_one_of_the_zoos(registry, tmp_path):
    register_model("net", Net, head=HEAD, crop=48)
    assert "net" in list_models() and usual_crop("net") == 48
    model = build_model("net", 7)
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, tmp_path / "net.pth")
    weights = read_weights(str(tmp_path / "net.pth"))
    restored, name = restore_network(weights, "net")
    assert name == "net"
    for key, value in model.state_dict().items():
        assert torch.equal(restored.state_dict()[key], value), key
    other = build_model("net", 5)
    own = other.get_parameter(f"{HEAD}.weight").clone()
    assert not start_from(other, "net", list("abcde"), weights)
    assert torch.equal(other.get_parameter(f"{HEAD}.weight"), own)
    assert torch.equal(other.model.conv.weight, model.model.conv.weight)


def test_a_registered_network_is_exported_as_it_is(registry, tmp_path):
    register_model("net", Net, head=HEAD)
    source = str(tmp_path / "net.pth")
    torch.save(build_model("net", 7).state_dict(), source)
    assert "official" in export_weights(source, tmp_path / "official.pth", model="net", form="pth")
    for layout in ("timm", "mmpretrain", "detectron2"):
        with pytest.raises(ConfigError, match=f"layout={layout} is known for .* and {source} holds a net"):
            export_weights(source, tmp_path / "other.pth", model="net", layout=layout, form="pth")


@pytest.mark.slow
def test_what_a_registered_network_costs(registry):
    register_model("net", Net, head=HEAD)
    parameters = 3 + 3 * 4 * 9 + 4 + 4 * 1000
    assert count_cost("net", 32) == (parameters, 3 * 4 * 9 * 30 * 30 + 4 * 1000)
    assert [stage.stage for stage in count_stages("net", 32)] == ["model", "other"]
    assert count_kept("net", 32, 1) > 3 * 32 * 32 * 4


def fail(num_classes):
    return nn.Conv2d(3, num_classes, "a")


def with_options(num_classes, dropout=0.0, zero_gamma=True):
    net = Net(num_classes)
    net.given = dropout, zero_gamma
    return net


def test_a_builder_gets_the_options_that_it_names(registry):
    register_model("net", with_options, head=HEAD)
    assert build_model("net", 3, dropout=0.3, zero_gamma=False, init="fan_out").given == (0.3, False)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (Net, {"dropout": 0.2}, "takes no dropout=0.2: leave it at 0.0"),
        (with_options, {"output_stride": 8}, "takes no output_stride=8: leave it at 32"),
        (Net, {"split_attention": "fused"}, "takes no split_attention=fused: leave it at auto"),
        (Net, {"features_only": True}, "a Net is no backbone: it has no conv1"),
        (fail, {}, r"failed: TypeError: .* \(\w+.py, line \d+\)"),
        (lambda: None, {}, "failed: TypeError: .*unexpected keyword argument 'num_classes'"),
        (lambda num_classes: None, {}, "its builder returned a NoneType, not an nn.Module"),
        (
            lambda num_classes: Net(10),
            {},
            r"model.classifier.1.weight is not a parameter with a row for each of 5 classes: .*head=NAME",
        ),
    ],
)
@pytest.mark.slow
def test_a_network_that_cannot_be_built_is_one_line(registry, build, options, message):
    register_model("net", build, head=HEAD)
    with pytest.raises(ConfigError, match=message) as caught:
        build_model("net", 5, **options)
    assert "\n" not in str(caught.value)
    assert "features_only" in options or str(caught.value).startswith("model 'net' of module test_extensions")


def test_names_that_are_taken(registry):
    register_model("net", Net, head=HEAD)
    register_model("net", type("Net", (Net,), {"__qualname__": "Net"}), head=HEAD)  # a cell that is run again
    by_net = r"model 'net' is registered twice: by module test_extensions \(test_extensions.Net\) and by module "
    with pytest.raises(ConfigError, match=by_net + r"test_extensions \(test_extensions.with_options\)"):
        register_model("net", with_options)
    with pytest.raises(ConfigError, match=by_net + r"torch.nn.modules.linear \(torch.nn.modules.linear.Linear\)"):
        register_model("net", partial(nn.Linear, 2))
    register_model("partial", partial(Net, width=3))
    register_model("partial", partial(Net, width=5))
    with pytest.raises(ConfigError, match="model 'partial' is registered twice: by module test_ext"):
        register_model("partial", partial(with_options, dropout=0.1))


@pytest.mark.parametrize(
    ("register", "message"),
    [
        (lambda: register_model("resnest50", Net), "registers model 'resnest50', which this project has itself"),
        (lambda: register_source("folder", open_source), "registers data source 'folder', which this project has"),
        (lambda: register_task("classification", dict, int), "registers task 'classification', which this project has"),
    ],
)
def test_names_of_the_project_are_refused(register, message, registry):
    with pytest.raises(ConfigError, match=message):
        register()
    assert len(build_model("resnest14_half", 2).fc.weight) == 2


def test_a_name_that_is_reserved_later_is_the_projects(capsys):
    registry = extensions.Registry("model")
    for name in ("net", "own"):
        registry.register(name, extensions.Source(open_source, function="code.open", origin="package code"))
    registry.reserve({"own"})
    assert (registry.read().keys(), registry.find("own")) == ({"net"}, None)
    line = "WARNING: package code registers model 'own', which this project has itself: choose another name\n"
    assert capsys.readouterr().err == line


def test_dropblock_refuses_a_network_without_its_places(registry):
    with pytest.raises(ConfigError, match="train.dropblock: a Net has no layer3: set train.dropblock=0"):
        DropBlock(Net(3))


def test_sources(registry, demo_images):
    register_source("odd", lambda root, part, option: open_source("folder", root, part, option))
    assert len(open_source("odd", str(demo_images), "val", "data.val_dir")) == 40
    with pytest.raises(DataError, match="set data.val_dir"):
        open_source("odd", str(demo_images), "nothing", "data.val_dir")
    with pytest.raises(ConfigError, match=r"unknown data.kind=od; did you mean 'odd'\? \(folder, webdataset, odd\)"):
        open_source("od", "/x", "val", "data.val_dir")
    register_source("bad", lambda root, part, option: {}[part])
    with pytest.raises(ConfigError, match="data.kind=bad of module test_extensions failed: KeyError: 'val'"):
        open_source("bad", "/x", "val", "data.val_dir")
    register_source("none", lambda root, part, option: None)
    with pytest.raises(ConfigError, match="it returned a NoneType, not an ImageSource"):
        open_source("none", "/x", "val", "data.val_dir")


def test_tasks(registry):
    register_task("counting", dict, int)
    assert (extensions.tasks.read()["counting"].open, extensions.tasks.read()["counting"].recipe) == (dict, int)
