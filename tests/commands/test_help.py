"""--help of every command, and the page of options: complete, true to the schema, and fit for 80 columns."""

import re
import shlex
import sys
from importlib import import_module
from importlib.metadata import entry_points

import pytest

from asking import ask_for_help
from conftest import compose_once
from options_page import COMMANDS, build_page
from resnest_imagenet.commands import data, train
from resnest_imagenet.commands.choices import describe_choices, list_choices
from resnest_imagenet.commands.help import read_values
from resnest_imagenet.commands.launch import find_conf
from resnest_imagenet.commands.option_list import list_sections, list_values
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.config_reading import ExplainConfig
from resnest_imagenet.options import flatten
from resnest_imagenet.schemas import list_schemas, option_names

ROOT = find_conf().parent
MAIN = {script.name: script.value for script in entry_points(group="console_scripts") if script.name in
        {name.split()[0] for name, _ in COMMANDS.values()}}  # fmt: skip


def ask(words, monkeypatch, capsys):
    """Call a command with --help after some words; return the text."""
    module, _, function = MAIN[words.split()[0]].partition(":")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [*words.split(), "--help"])
    try:
        getattr(import_module(module), function)()
    except SystemExit as error:
        assert error.code in (0, None)
    return capsys.readouterr().out


def test_every_command_is_in_the_table():
    assert {path.stem for path in find_conf().glob("*.yaml")} == set(COMMANDS)
    assert {name.split()[0] for name, _ in COMMANDS.values()} == set(MAIN)
    for action in data.ACTIONS:
        assert f"\n  {action:<9}{data.ACTIONS[action].summary}\n" in data.format_usage()
    assert all(len(line) <= 80 for line in data.format_usage().splitlines())


def test_every_option_has_a_description():
    described = set()
    for _, schema in COMMANDS.values():
        for variant in list_schemas(schema):
            for section in list_sections(variant, {name: {} for name in variant.model_fields}):
                assert section.title.endswith("."), section.schema
                for option in section.options:
                    described.add(option.name)
                    assert option.description.endswith("."), f"{option.name} of {variant.__name__}"
                    assert option.kind, option.name
    names = {name for _, schema in COMMANDS.values() for name in option_names(schema)}
    sections = {name.partition(".")[0] for name in names if "." in name}
    assert described == names - sections


# The commands that choose a network of conf/model/.
WITH_NETWORKS = {"train", "eval", "info", "app", "explain", "export", "predict", "data_preview"}


@pytest.mark.process
@pytest.mark.slow
def test_help_needs_no_torch_and_has_every_option_and_examples(tmp_path):
    """--help answers at once because torch is not imported. From any folder."""
    helps, imported, _ = ask_for_help(tmp_path, *(command for command, _ in COMMANDS.values()))
    assert not any(imported.values()), imported
    assert not list(tmp_path.iterdir())
    for name, (command, schema) in COMMANDS.items():
        text = helps[command]
        assert text.startswith(f"{command}: ") and text.endswith("]\n")
        assert all(len(line) <= 80 for line in text.splitlines()), command
        options = flatten(read_values(compose_once(name))).keys() - {"model"}  # null, and a group
        assert sorted(re.findall(r"^  ([a-z][\w.]*)=", text.partition("\nOptions: ")[2], re.MULTILINE)) == sorted(
            options
        )
        assert ("resnest101, resnest101_fast" in text.replace("\n       ", "")) == (name in WITH_NETWORKS), command
        examples = text.partition("\nExamples\n")[2].partition("\n\n")[0].replace("\\\n", " ").splitlines()
        assert len(examples) in (2, 3, 4), command
        for example in examples:
            check_example(example, command, schema)


def check_example(example, command, schema):
    """Check that an example calls the command, and that its options and choices are there."""
    words = shlex.split(example)
    if words[0] == "torchrun":
        module = MAIN[command].partition(":")[0]
        words = words[words.index(module) :]
    else:
        assert " ".join(words).startswith(command)
    for word in words[1:]:
        option, equals, value = word.lstrip("+").partition("=")
        if (find_conf() / option).is_dir() and command != f"resnest-data demo {word}":
            assert (find_conf() / option / f"{value}.yaml").exists(), example
        elif equals and word not in command:
            assert option in option_names(schema), example


def test_the_help_shows_what_is_chosen(tmp_path, monkeypatch, capsys):
    """Values of the experiment, options of its task, choices of other folders; the flag of a sweep changes nothing."""
    write(tmp_path / "experiment/mine.yaml", "# @package _global_\n")
    text = ask(f"resnest-train --config-dir {tmp_path} +experiment=demo_detection seed=7 -m", monkeypatch, capsys)
    assert "\n  +experiment=demo_detection\n" in text and "\n  model=resnest14_half\n" in text
    assert re.search(r"\n      classification: demo, finetune, mine, resnest14, resnest26,", text)
    assert "\n  seed=7                    Seed of all random numbers. [0 <= int < 2^63]\n" in text
    assert "\n  train.anchor_sizes=[16,32,64,96,128]\n" in text and "train.label_smoothing" not in text
    assert "\n  data.root=data/demo-objects\n" in text and "; required]" not in text
    bare = ask("resnest-train", monkeypatch, capsys)
    assert "\n  data.root=...             Folder of the data set. [path; required]\n" in bare
    assert "\n  +experiment=NAME\n      classification: demo, finetune, resnest14, resnest26," in bare


def write(path, text):
    path.parent.mkdir()
    path.write_text(text)


@pytest.mark.parametrize("group", ["experiment", "task", "data", "recipe", "protocol"])
def test_each_choice_has_a_sentence(group):
    """The first one of its file: --help and the page of options show it."""
    meanings = describe_choices(group, [find_conf()])
    assert meanings.keys() == {path.stem for path in (find_conf() / group).glob("*.yaml")}
    for name, meaning in meanings.items():
        assert meaning.endswith(".") and 12 < len(meaning) < 120, f"conf/{group}/{name}.yaml: {meaning!r}"


def test_the_choices_of_the_chosen_task_are_described(monkeypatch, capsys):
    text = ask("resnest-train task=detection recipe=detectron2_boxes protocol=coco data=coco", monkeypatch, capsys)
    assert "\n  recipe=detectron2_boxes\n      classification: bag_of_tricks, demo, finetune," in text
    assert "\n      detection:\n        demo_detection      A few minutes on a CPU: small images, AdamW," in text
    text = ask("resnest-eval", monkeypatch, capsys)
    assert "\n        whole               Scenes: the network sees each at once," in text


def test_a_wrong_choice_is_a_line_in_help_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/bin/resnest-train", "recipe=resnst", "-h"])
    with pytest.raises(SystemExit) as error:
        train.main()
    assert error.value.code == 2
    assert "unknown recipe 'resnst'; did you mean 'resnest'?" in capsys.readouterr().err


def test_choices_of_another_package_serve_every_task_but_those_that_name_one(tmp_path):
    write(
        tmp_path / "recipe/count.yaml", "# @package train\ndefaults: [override /task@_global_.task: counting]\nto: 9\n"
    )
    (tmp_path / "recipe/longer.yaml").write_text("# @package train\ndefaults:\n  - elsewhere\n  - _self_\nto: 99\n")
    write(tmp_path / "experiment/count.yaml", "# @package _global_\ndefaults:\n  - override /task: counting\n")
    write(tmp_path / "data/list.yaml", "kind: list\nroot: ???\n")
    folders = [find_conf(), tmp_path]
    assert list_choices(TrainConfig, "recipe", folders)[""] == ["count", "longer"]
    assert list_choices(TrainConfig, "experiment", folders)["counting"] == ["count"]
    assert list_choices(TrainConfig, "data", folders)[""] == ["list"]


def test_choices_are_those_that_the_command_can_use():
    """Of each task; "own" is for networks that are there already."""
    folders = [find_conf()]
    of_images = ["ecentercrop", "full", "paper"]
    assert list_choices(ExplainConfig, "protocol", folders) == {"": ["own"], "classification": of_images}
    assert list_choices(TrainConfig, "protocol", folders) == {
        "classification": of_images,
        "segmentation": ["centre", "published", "published_cityscapes", "slide", "whole"],
        "detection": ["coco"],
    }
    assert list_choices(TrainConfig, "data", folders)["segmentation"] == ["ade20k", "cityscapes", "masks"]
    recipes = list_choices(TrainConfig, "recipe", folders)
    assert recipes["detection"] == ["demo_detection", "detectron2_boxes", "detectron2_masks", "detectron2_masks_3x"]
    assert recipes["segmentation"] == ["deeplab_encoding", "deeplab_gluon", "demo_segmentation"]
    assert "resnest200" in recipes["classification"] and "" not in recipes
    experiments = list_choices(TrainConfig, "experiment", folders)
    assert [len(experiments[task]) for task in ("classification", "segmentation", "detection")] == [26, 9, 18]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("train.epochs", "int >= 1 or null"),
        ("train.momentum", "0 <= float < 1"),
        ("train.milestones", "int >= 1, a list of them or null"),
        ("train.betas", "list of 2: 0 <= float < 1"),
        ("train.init_from", "path or null"),
        ("train.nesterov", "true or false"),
        ("train.optimizer", "sgd, adamw or lamb"),
        ("log.trackers", "list of (tensorboard, wandb or mlflow)"),
        ("protocol.ratio", "0 < float <= 1 or null"),
        ("seed", "0 <= int < 2^63"),
        ("data.kind", "text"),
    ],
)
def test_types_in_words(option, words):
    sections = list_sections(list_schemas(TrainConfig)[0], {name: {} for name in TrainConfig.model_fields})
    (kind,) = [row.kind for section in sections for row in section.options if row.name == option]
    assert kind == words


def test_own_is_a_value_of_a_protocol():
    (section,) = [s for s in list_sections(ExplainConfig, {"protocol": {}}) if s.name == "protocol"]
    kinds = {option.name: option.kind for option in section.options}
    assert kinds["protocol.ratio"] == "own, 0 < float <= 1 or null"
    assert kinds["protocol.antialias"] == "own, true or false"
    assert list_values(str | int | None) == ["text", "int", "null"]


@pytest.mark.slow
def test_the_page_of_options_is_of_this_schema():
    assert (ROOT / "docs/options.md").read_text() == build_page(compose_once), "stale: run make options"
