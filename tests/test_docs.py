"""The commands in README and docs: every one composes, and those of the tutorial are run."""

import re
import shlex
import sys
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from textwrap import dedent

import pytest

from conftest import compose_config
from resnest_imagenet.commands import launch
from resnest_imagenet.config import Options, TrainConfig, option_names
from resnest_imagenet.reports.table3 import PAPER

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TUTORIAL = ROOT / "docs/tutorial.md"
SCRIPTS = {
    script.name: script for script in entry_points(group="console_scripts") if script.name.startswith("resnest-")
}
MODULES = {script.module: name for name, script in SCRIPTS.items()}


COMMAND = re.compile(r"(resnest-\w+|torchrun|make|python|tools/\S+|sbatch|docker|export|mkdir|diff)( |$)")
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


def read_commands(page):
    """Return the commands in a page's blocks, each as words; long lines are joined, comments are left out.

    A block of commands has nothing else in it, so that none is passed over.
    """
    commands = []
    for language, block in FENCED.findall(page.read_text()):
        lines = dedent(block).replace("\\\n", " ").splitlines() if language in ("", "sh", "bash") else []
        are_commands = [bool(COMMAND.match(line.lstrip("$> "))) for line in lines]
        if any(are_commands):
            strange = [line for line in lines if not COMMAND.match(line)]
            assert not strange, f"{page.name}: {strange[0]!r} among commands"
            commands += [shlex.split(line, comments=True) for line in lines]
    return commands


def to_script(words):
    """Return the console command behind some words, and its arguments; what starts it is left out."""
    if words[0] == "torchrun":
        module = words.index("-m") + 1
        return MODULES[words[module]], words[module + 1 :]
    for place, word in enumerate(words):
        if word == "tools/launchers/slurm/train.sbatch":
            return "resnest-train", words[place + 1 :]
        if word in SCRIPTS:  # in a container too
            return word, words[place + 1 :]
    return None, []


ALL = [(page, words) for page in PAGES for words in read_commands(page)]


def test_there_are_commands_to_check():
    assert len(ALL) > 30
    assert {to_script(words)[0] for _, words in ALL} >= set(SCRIPTS)


@pytest.mark.parametrize(
    ("page", "words"), ALL, ids=lambda value: value.name if isinstance(value, Path) else " ".join(value)
)
@pytest.mark.slow
def test_a_command_composes(page, words, monkeypatch):
    name, arguments = to_script(words)
    if name is None:
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= set(TARGETS)
        elif words[0] not in ("docker", "export", "mkdir", "diff"):
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


KNOWN = {name for schema in list_schemas() for name in option_names(schema)}
GROUPS = {folder.name for folder in launch.find_conf().iterdir() if folder.is_dir()}
SECTIONS = {name.partition(".")[0] for name in KNOWN if "." in name}
FILES = {"py", "md", "json", "yaml"}  # train.py is no option
FOREIGN = re.compile(r"hydra[./].*|cred_expire|pretrained")  # Hydra's, SLURM's, torch.hub's


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_the_text_are_there(page):
    text = FENCED.sub("", page.read_text())
    named = set(re.findall(r"(?<![\w./])((?:train|data|model|loader|eval|protocol|checkpoint|log)\.\w+)=", text))
    assert named <= KNOWN, named - KNOWN
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text.replace("\n", " ")):
        words = span.split()
        if words[0] in SCRIPTS or len(words) == 1:  # option=value, alone or after a command
            given = {word.lstrip("+~'").partition("=")[0] for word in words if re.match(r"['+~]?[a-z][\w./]*=", word)}
            unknown = {name for name in given - KNOWN - GROUPS if not FOREIGN.fullmatch(name)}
            assert not unknown, f"`{span}`: {unknown}"
        for group, choice in re.findall(rf"(?:^|\s)\+?({'|'.join(sorted(GROUPS))})=([a-z]\w*)(?=\s|$)", span):
            files = [file.stem for file in (launch.find_conf() / group).glob("*.yaml")]
            assert choice in files, f"`{span}`: no {group} of that name"
        section, _, name = span.partition(".")
        if section in SECTIONS and re.fullmatch(r"[a-z_0-9]+", name) and name not in FILES:
            assert span in KNOWN, span
        if words[0] == "make" and len(words) > 1:
            assert words[1] in TARGETS, span
        for path in re.findall(r"(?<![\w./])((?:tools|conf|docs|tests|src|docker)/[\w./-]+)", span):
            assert (ROOT / path).exists() or re.search("[A-Z]{3}", path), f"`{span}`: {path}"  # NAME.yaml


def list_anchors(page):
    """Return what GitHub calls a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        there = page.parent / target if target else page
        assert there.exists(), target
        assert not anchor or anchor in list_anchors(there), f"{target}#{anchor}"


@pytest.mark.slow
def test_the_rows_of_table_3_are_what_the_experiments_say():
    text = (ROOT / "docs/table3.md").read_text()
    for row in PAPER:
        recipe = compose_config("train", TrainConfig, f"+experiment={row.model}", "data.root=/imagenet").train
        start = f"| {row.name} | {row.model} | {recipe.recipe} | {recipe.epochs} | {recipe.global_batch} | "
        ranks = recipe.global_batch // recipe.batch_size
        assert f"{start}{ranks} x {recipe.batch_size} | {row.top1[224]:.2f} | {row.top1[320]:.2f} |" in text, row.name


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


@pytest.mark.slow
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


def test_the_readmes_tree_has_every_file():
    tree = (ROOT / "README.md").read_text().partition("## The tree\n")[2].partition("Imports run one way")[0]
    commands = {
        path.name for path in (ROOT / "src/resnest_imagenet/commands").iterdir()
    }  # as the line of its folder says
    files = {path.name for path in (ROOT / "src/resnest_imagenet").rglob("*.py")} - commands
    assert not files - set(re.findall(r"\w+\.py", tree))
