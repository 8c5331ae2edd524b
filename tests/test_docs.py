"""The commands in README and docs: every one composes, and those of the tutorial are run."""

import itertools
import re
import shlex
import sys
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from textwrap import dedent

import pytest

from resnest_imagenet.commands import launch
from resnest_imagenet.config import Options, option_names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TUTORIAL = ROOT / "docs/tutorial.md"
SCRIPTS = {
    script.name: script for script in entry_points(group="console_scripts") if script.name.startswith("resnest-")
}
MODULES = {script.module: name for name, script in SCRIPTS.items()}


def read_commands(page):
    """Return the commands in a page's blocks, each as words; long lines are joined, comments are left out."""
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL)
    texts = (dedent(text).replace("\\\n", " ") for language, text in blocks if language in ("", "sh", "bash"))
    lines = itertools.chain.from_iterable(text.splitlines() for text in texts)
    known = re.compile(r"(resnest-\w+|torchrun|make|python|tools/\S+|sbatch)( |$)")
    return [shlex.split(line, comments=True) for line in lines if known.match(line)]


def to_script(words):
    """Return the console command behind some words, and its arguments; torchrun's own are left out."""
    if words[0] == "torchrun":
        module = words.index("-m") + 1
        return MODULES[words[module]], words[module + 1 :]
    return (words[0], words[1:]) if words[0] in SCRIPTS else (None, [])


ALL = [(page, words) for page in PAGES for words in read_commands(page)]


def test_there_are_commands_to_check():
    assert len(ALL) > 30
    assert {to_script(words)[0] for _, words in ALL} >= set(SCRIPTS)


@pytest.mark.parametrize(
    ("page", "words"), ALL, ids=lambda value: value.name if isinstance(value, Path) else " ".join(value)
)
def test_a_command_composes(page, words, monkeypatch):
    name, arguments = to_script(words)
    if name is None:
        if words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {word for word in words[1:] if "=" not in word} <= set(targets)
        else:
            files = [word for word in words if word.startswith("tools/")]
            assert files and all((ROOT / file).exists() for file in files)
        return
    composed = []
    module = import_module(SCRIPTS[name].module)

    def compose_only(primary, schema, job):
        launch.run_command(primary, schema, composed.append)

    monkeypatch.setattr(module, "run_command", compose_only)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    module.main()
    assert len(composed) == 1 or "--help" in arguments


def list_schemas(schema=Options):
    return [schema, *(each for child in schema.__subclasses__() for each in list_schemas(child))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_the_text_and_links_are_there(page):
    text = page.read_text()
    known = {name for schema in list_schemas() for name in option_names(schema)}
    named = set(re.findall(r"(?<![\w./])((?:train|data|model|loader|eval|protocol|checkpoint|log)\.\w+)=", text))
    assert named <= known, named - known
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target


# The same commands on fewer images.
SHRUNK = {
    "resnest-data demo": ["train_per_class=5", "val_per_class=2"],
    "resnest-data preview": ["train.crop=32", "loader.workers=1"],
    "resnest-train": ["train.epochs=1", "train.warmup_epochs=0", "train.crop=32", "train.batch_size=16"],
    "resnest-eval": ["crop=[32,64]"],
    "resnest-predict": ["crop=32"],
    "resnest-explain": ["crop=32"],
    "resnest-compare": ["crop=32"],
    "resnest-report": ["latency=false"],
}
WORKERS = ("train", "eval", "predict", "explain", "compare")


def test_the_tutorial_runs_as_it_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = 0
    for words in read_commands(TUTORIAL):
        name, arguments = to_script(words)
        if name is None or "data.root=/pictures" in arguments:  # the reader's own
            continue
        fewer = SHRUNK.get(f"{name} {arguments[0]}", SHRUNK.get(name, []))
        workers = ["loader.workers=1", "device=cpu"] if name.removeprefix("resnest-") in WORKERS else []
        monkeypatch.setattr(sys, "argv", [name, *arguments, *fewer, *workers])
        SCRIPTS[name].load()()
        assert capsys.readouterr().out.strip()
        run += 1
    assert run >= 12
    text = TUTORIAL.read_text()
    for path in re.findall(r"^- `([^`]+)`: ", text, re.MULTILINE):  # what the tutorial says one has at the end
        assert (tmp_path / path).exists(), path
