"""The commands as a user calls them: what is refused, in which words, with which exit code."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf

from conftest import ALONE, compose_config
from resnest_imagenet.commands import compare, data, evaluate, explain, export, predict, report, table3, train
from resnest_imagenet.commands.launch import check_config, explain_composition, find_conf, quote_place
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.config_reading import (
    CompareConfig,
    EvalConfig,
    ExplainConfig,
    ExportConfig,
    InfoConfig,
    PredictConfig,
    ReportConfig,
    Table3Config,
    TablesConfig,
)
from resnest_imagenet.errors import ConfigError, explain_runtime
from resnest_imagenet.schemas import choose_schema, list_places, option_names
from resnest_imagenet.supervision import supervise


def call(command, arguments, monkeypatch, capsys):
    """Run a command in this process; return its exit code and last error line."""
    monkeypatch.setattr(sys, "argv", [f"/bin/resnest-{command.__name__.rpartition('.')[2]}", *arguments])
    try:
        command.main()
        code = 0
    except SystemExit as error:
        code = error.code
    lines = capsys.readouterr().err.strip().splitlines()
    return code, lines


@pytest.fixture(scope="module")
def empty_set(tmp_path_factory):
    """A data set without images: its folders are there."""
    root = tmp_path_factory.mktemp("set")
    for part in ("train", "val"):
        (root / part).mkdir()
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data.root is not set: give data.root=..."),
        (["trian.epochs=3"], "unknown option trian.epochs; did you mean 'train.epochs'?"),
        (["data.root=/x", "train.epoch=3"], "unknown option train.epoch; did you mean 'train.epochs'?"),
        (["data.root=/x", "+train.epoch=3"], "unknown option train.epoch; did you mean 'train.epochs'?"),
        (["data.root=/x", "sed=1"], "unknown option sed; did you mean 'seed'?"),
        (["modle=resnest50"], "unknown option modle; did you mean 'model'?"),
        (["model=resnest_50"], "unknown model 'resnest_50'; did you mean 'resnest50'?"),
        (["recipe=resnst"], "unknown recipe 'resnst'; did you mean 'resnest'?"),
        (["loader=dalli"], "unknown loader 'dalli'; did you mean 'dali'?"),
        (["+experiment=resnest5"], "unknown experiment 'resnest5'; did you mean 'resnest50'?"),
        (["experiment=resnest50"], "experiment is added, not overridden: write +experiment=resnest50"),
        (["data.root=ROOT", "model.name=resnest_50"], "unknown model 'resnest_50'; did you mean 'resnest50'?"),
        (["data.root=/x", "train.epochs=abc"], "train.epochs=abc: input should be a valid integer"),
        (
            ["data.root=ROOT", "train.batch_size=1"],
            "train.batch_size=1: resnest50 has batch norms of one value per image and channel at 224 pixels: set ",
        ),
        (["data.root=/x", "eval.ratio=0.9"], "unknown option eval.ratio"),
        (["protocol=ecentrecrop"], "unknown protocol 'ecentrecrop'; did you mean 'ecentercrop'?"),
        (["data.root=/x", "~train.epochs"], "train.epochs is not set"),
        (["data.root=/x", "train.crop=${trian.crop}"], "Interpolation key 'trian.crop' not found"),
        (["model.name=a=b"], "cannot read model.name=a=b: quote it for the shell and for Hydra: 'model.name=\"a=b\"'"),
        (["data.root"], "data.root has no value: write data.root=..."),
        (["data.root=/x", "train.lr=inf"], "train.lr=inf: input should be a finite number"),
        (["model=null"], "a group cannot be null: write group=NAME"),
        (["data.root=/x", "recipe=sknet", "train.warmup_epochs=40"], "outlasts train.step_epochs=30"),
        (["data.root=/x", "train.init_from="], "train.init_from=: string should have at least 1 character"),
        (["train.lr_per_256=0.1"], "train.lr_per_256 is now train.lr: write train.lr=..."),
        (["data.root=/x", "+train.lr_per_256=0.1"], "train.lr_per_256 is now train.lr: write train.lr=..."),
        (
            ["data.root=/x", "~train.lr", "+train.lr_per_256=0.1"],
            "train.lr_per_256 is now train.lr: write train.lr=...",
        ),
        (["data.root=/x", "train.task=other"], "unknown train.task 'other'"),
        (["data.root=ROOT", "train.global_batch=100"], "train.batch_size=128 x 1 ranks = 128"),
        (
            ["data.root=/x", "data.kind=folders"],
            "unknown data.kind=folders; did you mean 'folder'? (folder, webdataset)",
        ),
        (
            ["model=resnet18"],
            "unknown model 'resnet18'; did you mean 'resnet101'? (resnet101, resnest14, resnet101s, ",
        ),
        (["data.root=/x", "device=1"], "device=1: write device=cuda:1"),
        (["data.root=/x", "~train.task"], "train.task is not set: give train.task=..."),
        (["task=other"], "unknown task 'other' (classification, detection, segmentation)"),
    ],
)
def test_a_wrong_configuration_is_one_line_and_exit_code_2(arguments, message, empty_set, monkeypatch, capsys):
    arguments = [argument.replace("ROOT", str(empty_set)) for argument in arguments]
    code, lines = call(train, arguments, monkeypatch, capsys)
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("resnest-train: ")
    assert message in lines[0]


# Of 900 steps, the first 100 of a warm-up.
STEPS = ("train.epochs=null", "train.steps=900", "train.dropblock=0", "train.warmup_epochs=null")
STEPS += ("train.warmup_steps=100",)


@pytest.fixture(scope="module")
def composed():
    """A configuration of training, composed once: that takes longer than checking it."""
    with initialize_config_dir(str(find_conf()), version_base="1.3"):
        return compose("train", ["data.root=/x"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["train.epochs=1.5"], "train.epochs=1.5: input should be a valid integer"),
        (["train.epochs=true"], "train.epochs=true: input should be a valid integer"),
        (["train.nesterov=3"], "train.nesterov=3: input should be a valid boolean"),
        (["train.epochs=0"], "train.epochs=0: input should be greater than or equal to 1"),
        (["train.momentum=1"], "train.momentum=1: input should be less than 1"),
        (["train.precision=fp8"], "train.precision=fp8: input should be 'fp32', 'bf16' or 'fp16'"),
        (["train.crop=[224]"], "train.crop=[224]: input should be a valid integer"),
        (["protocol.ratio=1.5"], "protocol.ratio=1.5: input should be less than or equal to 1"),
        (["protocol.ratio=0"], "protocol.ratio=0: input should be greater than 0"),
        (["protocol.order=crop"], "protocol.order=crop: input should be 'resize_crop' or 'crop_resize'"),
        (["train.warmup_epochs=300"], "train.warmup_epochs=300.0 must be less than train.epochs=270"),
        (["train.momentum=0"], "train.nesterov=true needs train.momentum > 0"),
        (["data.shuffle_shards=4"], "data.shuffle_shards=4 needs data=webdataset"),
        (["data.val_split=1"], "data.val_split=1: input should be less than 1"),
        (["data.val_split=0.2", "data.kind=webdataset"], "data.val_split=0.2 needs data=imagenet or data=csv"),
        (["data.csv=mine.csv"], "data.csv=mine.csv needs data=csv"),
        (["train.batch_size=automatic"], "train.batch_size=automatic: write a number, or auto"),
        (["train.schedule=step"], "train.schedule=step needs train.step_epochs=..."),
        (["train.step_epochs=9"], "train.step_epochs=9 is for train.schedule=step, not cosine: set one or the other"),
        (["train.task=clasification"], "unknown train.task 'clasification'; did you mean 'classification'?"),
        (["train.task=null"], "train.task=null: input should be a valid string"),
        (["train.epochs=null"], "give train.epochs=... or train.steps=..."),
        (["train.steps=9"], "train.epochs=270 and train.steps=9: set one of them to null"),
        (["train.warmup_epochs=null"], "give train.warmup_epochs=... or train.warmup_steps=..."),
        (["train.warmup_steps=9"], "train.warmup_epochs=5.0 and train.warmup_steps=9: set one of them to null"),
        (
            ["train.steps=9", "train.epochs=null"],
            "train.dropblock=0.1 rises by epoch: give train.epochs=..., not train.steps",
        ),
        (
            [*STEPS, "train.steps=900", "train.warmup_steps=900"],
            "train.warmup_steps=900 must be less than train.steps=900",
        ),
        ([*STEPS, "train.schedule=milestones"], "train.schedule=milestones needs train.milestones=[...]"),
        ([*STEPS, "train.schedule=milestones", "train.milestones=[80,60]"], "train.milestones=[80, 60] must rise"),
        (
            [*STEPS, "train.schedule=milestones", "train.milestones=[600,900]"],
            "train.milestones=[600, 900] must be less than train.steps=900",
        ),
        (
            [*STEPS, "train.schedule=milestones", "train.milestones=100"],
            "train.warmup_steps=100 outlasts train.milestones=[100]",
        ),
        (["train.clip_norm=1", "train.clip_value=2"], "give either train.clip_norm=1.0 or train.clip_value=2.0"),
        (["train.betas=[0.9]"], "train.betas=[0.9]: list should have at least 2 items"),
        (["train.optimizer=adam"], "train.optimizer=adam: input should be 'sgd', 'adamw' or 'lamb'"),
        (["eval.every_epochs=0"], "eval.every_epochs=0: input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_value_is_one_line(options, message, composed):
    """The command then leaves with 2: see the test above, which has one of each kind."""
    with pytest.raises(ConfigError) as error:
        check_config(OmegaConf.merge(composed, OmegaConf.from_dotlist(list(options))), TrainConfig)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "arguments", "code", "message"),
    [
        (predict, ["images=x"], 2, "ckpt is not set: give ckpt=..."),
        (predict, ["ckpt=x.pt"], 2, "images is not set: give images=..."),
        (predict, ["ckpt=x.pt", "images=x", "topp=3"], 2, "unknown option topp; did you mean 'top'?"),
        (predict, ["ckpt=x.pt", "images=/nowhere"], 3, "/nowhere"),
        (predict, ["ckpt=x.pt", "images={}/val"], 4, "x.pt: no such checkpoint"),
        (predict, ["ckpt=x.pt", "images={}/val", "model=resnet5"], 2, "did you mean 'resnet50'?"),
        (compare, ["ckpt=[a.pt,b.pt]"], 2, "give either data.root=... or images=..."),
        (data, ["check", "data=ade20k", "data.root={}"], 2, "data is no group of this command: set data.root, data."),
        (
            compare,
            ["ckpt=[a.pt]", "images={}/val"],
            2,
            "ckpt=[a.pt]: list should have at least 2 items, not 1: write ckp",
        ),
        (compare, ["ckpt=a.pt", "images={}/val"], 2, "ckpt=a.pt: input should be a valid list: write ckpt=[A,B]"),
        (explain, [], 2, "ckpt, images and out are not set: give ckpt=... images=... out=..."),
        (evaluate, ["ckpt=x.pt", "data.root={}", "crop=abc"], 2, "evaluate: crop=abc: input should be a valid integer"),
        (compare, ["ckpt=a.pt,b.pt", "images={}/val"], 2, "write a list as [a,b]"),
        (
            compare,
            ["ckpt=[a.pt,b.pt]", "images={}/val", "page={}/val"],
            2,
            "page={}/val: cannot be written (it is a folder)",
        ),
        (compare, ["ckpt=[a.pt,b.pt]", "images={}/val"], 4, "a.pt: no such checkpoint"),
        (report, [], 2, "runs is not set: give runs=..."),
        (report, ["/nowhere"], 2, "runs=/nowhere: no such folder"),
        (report, ["{}"], 2, "runs={}: neither a run folder nor one with results of resnest-eval"),
        (report, ["{}", "crop=256"], 2, "crop=256: input should be 224 or 320"),
        (explain, ["images=x", "out=x"], 2, "ckpt is not set: give ckpt=..."),
        (explain, ["ckpt=x.pt", "images=/nowhere", "out=x"], 3, "/nowhere"),
        (evaluate, ["ckpt=x.pt", "data.root={}", "predictions={}/val"], 2, "predictions={}/val: cannot be written"),
        (evaluate, ["ckpt=x.pt", "data.root={}", "crop=[64,64]"], 2, "crop=[64, 64] has the same crop twice"),
        (export, ["ckpt=x.pt", "format=onx"], 2, "format=onx: input should be "),
        (export, ["ckpt=x.pt", "format=onnx", "layout=mmpretrain"], 2, "layout=mmpretrain"),
        (train, ["data.root={}", "log.trackers=[wandbb]"], 2, "log.trackers=[wandbb]: wandbb should be "),
    ],
)
def test_wrong_words_to_the_other_commands(
    command, arguments, code, message, demo_images, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(demo_images) for argument in arguments]
    found, lines = call(command, arguments, monkeypatch, capsys)
    assert (found, len(lines)) == (code, 1), lines
    assert message.format(demo_images) in lines[0]


def test_data_faults_have_exit_code_3(monkeypatch, capsys):
    assert call(train, ["data.root=/nowhere"], monkeypatch, capsys) == (
        3,
        ["resnest-train: data.root=/nowhere: no such folder"],
    )


def test_checkpoint_faults_have_exit_code_4(demo_images, monkeypatch, capsys):
    code, lines = call(evaluate, ["ckpt=/nowhere.pt", f"data.root={demo_images}"], monkeypatch, capsys)
    assert (code, lines) == (4, ["resnest-evaluate: /nowhere.pt: no such checkpoint"])


def test_a_crop_below_32_in_a_list(monkeypatch, capsys):
    code, lines = call(evaluate, ["ckpt=a", "data.root=/x", "crop=[224,16]"], monkeypatch, capsys)
    assert code == 2
    assert lines[0].endswith("crop=[224,16]: 16 should be greater than or equal to 32")
    code, lines = call(train, ["data.root=/x", "train.betas=[0.9,1.5]"], monkeypatch, capsys)
    assert code == 2 and lines[0].endswith("train.betas=[0.9,1.5]: 1.5 should be less than 1")
    code, lines = call(train, ["data.root=/x", "log.trackers=x"], monkeypatch, capsys)
    assert code == 2 and "log.trackers=x: input should be 'tensorboard'" in lines[0]


def test_a_group_option_without_its_group_and_a_list_without_brackets(monkeypatch, capsys):
    code, lines = call(evaluate, ["ckpt=a", "data.root=/x", "model.name=resnest50"], monkeypatch, capsys)
    assert (code, lines) == (2, ["resnest-evaluate: model.name is set by its group: write model=NAME"])
    code, lines = call(evaluate, ["ckpt=a", "data.root=/x", "data.on_error=substitute"], monkeypatch, capsys)
    assert code == 2 and "data.on_error=substitute is for training: it would falsify" in lines[0]
    code, lines = call(table3, ["results=a,b"], monkeypatch, capsys)
    assert code == 2 and lines[0].endswith(": write a list as [a,b]")


NAMES = ("20240501", "2024_05_01", "/a,b", "/größe", "/a b=c(1)", "/it's", 'a"b', "true", "/{x}", "runs/${seed}")


@pytest.mark.parametrize("name", NAMES)
def test_files_and_folders_may_have_any_name(name):
    word = quote_place(f"run_dir={name}", list_places(TrainConfig))
    assert compose_config("train", TrainConfig, "data.root=/x", word).run_dir == name.replace("${seed}", "0")


def test_numbers_and_the_home_folder_in_places():
    options = ("ckpt=x", "images=[~/a,2012]", "out=~/b.csv", "model=null")
    with pytest.raises(OverrideParseException):
        compose_config("predict", PredictConfig, *options)
    options = ("ckpt=x", 'images=["~/a",2012]', quote_place("out=~/b.csv", list_places(PredictConfig)))
    config = compose_config("predict", PredictConfig, *options)
    assert config.images == [os.path.expanduser("~/a"), "2012"] and config.out == os.path.expanduser("~/b.csv")
    assert quote_place("images=a,b", list_places(PredictConfig)) == "images=a,b"
    assert quote_place("out=null", list_places(PredictConfig)) == "out=null"


@pytest.mark.process
@pytest.mark.parametrize("shell", [shell for shell in ("bash", "dash", "zsh") if shutil.which(shell)])
def test_the_advice_to_quote_works_when_it_is_typed(shell):
    for word, value in (("model.name=größe", "größe"), ("model.name=a=b", "a=b"), ("model.name=it's", "it's")):
        with pytest.raises(OverrideParseException) as caught:
            compose_config("train", TrainConfig, "data.root=/x", word)
        advice = str(explain_composition(caught.value, TrainConfig)).rpartition(": ")[2]
        typed = subprocess.run([shell, "-c", f"printf %s {advice}"], capture_output=True, text=True, check=True).stdout
        assert compose_config("train", TrainConfig, "data.root=/x", typed).model.name == value


def test_demo_data_and_unknown_actions(tmp_path, monkeypatch, capsys):
    small = ["train_per_class=1", "val_per_class=1"]
    assert call(data, ["demo", f"out={tmp_path / 'demo'}", *small], monkeypatch, capsys)[0] == 0
    assert len(list((tmp_path / "demo/train").iterdir())) == 10
    small = ["task=segmentation", "train_scenes=2", "val_scenes=1"]
    assert call(data, ["demo", f"out={tmp_path / 'scenes'}", *small], monkeypatch, capsys)[0] == 0
    assert len(list((tmp_path / "scenes/masks/train").iterdir())) == 2
    code, lines = call(data, ["demo", "task=segmentatoin", f"out={tmp_path / 'x'}"], monkeypatch, capsys)
    small = ["task=detection", "train_images=2", "val_images=1"]
    assert call(data, ["demo", f"out={tmp_path / 'objects'}", *small], monkeypatch, capsys)[0] == 0
    assert len(list((tmp_path / "objects/train2017").iterdir())) == 2
    tasks = "(classification, segmentation, detection)"
    assert (code, lines) == (2, [f"resnest-data: unknown task 'segmentatoin'; did you mean 'segmentation'? {tasks}"])
    code, lines = call(data, ["demmo"], monkeypatch, capsys)
    assert (code, lines) == (2, ["resnest-data: unknown action 'demmo'; did you mean 'demo'?"])
    code, lines = call(data, ["x"], monkeypatch, capsys)
    assert (code, lines) == (2, [f"resnest-data: unknown action 'x': {', '.join(data.ACTIONS)}"])
    assert call(data, [], monkeypatch, capsys) == (0, [])


def test_prepare_without_archives_has_exit_code_3(tmp_path, monkeypatch, capsys):
    code, lines = call(data, ["prepare", f"archives={tmp_path}", f"out={tmp_path / 'out'}"], monkeypatch, capsys)
    assert (code, lines) == (3, [f"resnest-data: {tmp_path / 'ILSVRC2012_devkit_t12.tar.gz'}: no such archive"])


@pytest.mark.process
def test_shards_of_one_part_and_of_none(demo_images, tmp_path, monkeypatch, capsys):
    options = ["shard", f"data.root={demo_images}", "data.train_dir=null", f"out={tmp_path / 'out'}"]
    assert call(data, options, monkeypatch, capsys)[0] == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["val"]
    assert call(data, options, monkeypatch, capsys)[0] == 3
    code, lines = call(data, [*options, "data.val_dir=null"], monkeypatch, capsys)
    assert (code, lines) == (2, ["resnest-data: data.train_dir=null and data.val_dir=null leave no part of the data"])


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RuntimeError("operator torchvision::nms does not exist"), 2, "was not built for torch"),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "Lower the batch size"),
        (MemoryError(), 2, "MemoryError Lower the batch size"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            2,
            "Lower the batch size",
        ),
        (OSError(24, "Too many open files", "x.jpg"), 6, "ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), 6, "ulimit -n"),
        (RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"), 6, "--ipc=host"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), 6, "pid 7.*loader.workers=0"),
        (OSError(28, "No space left on device", "/disk/events"), 6, "^/disk/events: No space left on device$"),
    ],
)
def test_errors_of_torch_and_the_system_that_a_user_can_fix_are_explained(error, code, words):
    explained = explain_runtime(error)
    assert explained.exit_code == code
    assert re.search(words, str(explained))
    with pytest.raises(type(explained), match=words), supervise(ALONE):
        raise error


def test_torch_says_that_memory_is_short_in_the_words_that_are_looked_for():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50)
    assert explain_runtime(error.value).exit_code == 2


def test_other_errors_are_bugs():
    assert explain_runtime(RuntimeError("something else")) is None
    assert explain_runtime(FileNotFoundError(2, "No such file", "x")) is None


def list_keys(values, prefix=""):
    """Return every key of nested mappings, dotted."""
    parts = [list_keys(value, f"{prefix}{key}.") for key, value in values.items() if isinstance(value, dict)]
    return [prefix + key for key in values] + [key for part in parts for key in part]


@pytest.mark.parametrize(
    ("name", "schema", "overrides"),
    [
        ("train", TrainConfig, []),
        ("train", TrainConfig, ["+experiment=demo"]),
        ("train", TrainConfig, ["+experiment=resnest50"]),
        ("train", TrainConfig, ["+experiment=deeplabv3_resnest50_ade20k"]),
        ("train", TrainConfig, ["+experiment=deeplabv3_resnest50_cityscapes", "protocol=published_cityscapes"]),
        ("train", TrainConfig, ["+experiment=demo_segmentation", "recipe=deeplab_encoding", "protocol=centre"]),
        ("train", TrainConfig, ["+experiment=demo_detection"]),
        ("train", TrainConfig, ["+experiment=cascade_mask_rcnn_resnest50"]),
        ("eval", EvalConfig, ["model=resnest50", "protocol=slide", "data=cityscapes"]),
        ("eval", EvalConfig, ["model=resnest50", "protocol=coco", "data=coco"]),
        ("eval", EvalConfig, ["model=resnest50"]),
        ("eval", EvalConfig, ["model=resnest50", "protocol=ecentercrop"]),
        ("predict", PredictConfig, ["model=resnest50"]),
        ("predict", PredictConfig, ["model=resnest50", "protocol=slide"]),
        ("predict", PredictConfig, ["model=resnest50", "protocol=coco"]),
        ("compare", CompareConfig, []),
        ("explain", ExplainConfig, ["model=resnest50"]),
        ("report", ReportConfig, []),
        ("info", InfoConfig, ["model=resnest50"]),
        ("export", ExportConfig, ["model=resnest50"]),
        ("table3", Table3Config, []),
        ("tables", TablesConfig, []),
        *((f"data_{name}", action.schema, []) for name, action in data.ACTIONS.items()),
        *((f"data_demo_{task}", action.schema, []) for task, action in data.DEMOS.items()),
        ("train", TrainConfig, ["data=webdataset"]),
    ],
)
def test_every_option_in_conf_is_in_the_schema_and_the_reverse(name, schema, overrides):
    with initialize_config_dir(str(find_conf()), version_base="1.3"):
        composed = OmegaConf.to_container(compose(name, overrides))
    assert sorted(list_keys(composed)) == sorted(option_names(choose_schema(schema, composed)))


@pytest.mark.process
@pytest.mark.parametrize(
    ("device", "code", "line"),
    [(None, 141, ""), ("/dev/full", 6, "data: the output cannot be written (No space left on device)\n")],
)
def test_a_command_whose_output_goes_away_ends_without_a_traceback(device, code, line):
    """None: a pipe whose reader has left."""
    if device is None:
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(device, os.O_WRONLY)
    try:
        command = [sys.executable, "-m", "resnest_imagenet.commands.data", "demo", "--help"]
        result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (code, line)
