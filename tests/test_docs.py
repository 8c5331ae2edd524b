"""The documents: commands compose, those of the tutorial run, links lead somewhere, tables are those of the code."""

import json
import logging
import re
import shlex
import sys
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from textwrap import dedent

import pytest
import yaml

from conftest import compose_config
from resnest_imagenet.commands import early, launch
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.options import Options
from resnest_imagenet.reports.table3 import PAPER
from resnest_imagenet.schemas import option_names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TUTORIAL = ROOT / "docs/tutorial.md"
SCRIPTS = {
    script.name: script for script in entry_points(group="console_scripts") if script.name.startswith("resnest-")
}
MODULES = {script.module: name for name, script in SCRIPTS.items()}


COMMAND = re.compile(r"(resnest-\w+|torchrun|make|python|tools/\S+|sbatch|docker|export|mkdir|diff|uv|pip)( |$)")
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


def read_commands(page):
    """Return the commands in a page's blocks, each as words; long lines are joined, comments are dropped.

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
    """Return the console command behind some words, and its arguments; what starts it is dropped."""
    if words[0] == "torchrun":
        module = words.index("-m") + 1
        return MODULES[words[module]], words[module + 1 :]
    for place, word in enumerate(words):
        if word == "tools/launchers/slurm/train.sbatch":
            return "resnest-train", words[place + 1 :]
        if word in SCRIPTS:  # in a container too
            return word, words[place + 1 :]
    return None, []


# Each command once, with the first page that has it.
ALL = [(page, words) for words, page in {tuple(c): p for p in reversed(PAGES) for c in read_commands(p)}.items()]


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
        elif words[0] not in ("docker", "export", "mkdir", "diff", "uv", "pip"):
            files = [word for word in words if word.startswith("tools/")]
            assert files and all((ROOT / file).exists() for file in files)
        return
    composed = []
    module = import_module(SCRIPTS[name].module)

    def compose_only(primary, schema, job):
        launch.run_command(primary, schema, composed.append)

    monkeypatch.setattr(module, "run_command", compose_only)
    monkeypatch.setattr(early, "refuse_early", lambda config: None)  # the reader's files are not here
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    module.main()
    assert len(composed) == 1 or "--help" in arguments


def list_schemas(schema=Options):
    return [schema, *(each for child in schema.__subclasses__() for each in list_schemas(child))]


KNOWN = {name for schema in list_schemas() for name in option_names(schema)}
GROUPS = {folder.name for folder in launch.find_conf().iterdir() if folder.is_dir()}
SECTIONS = {name.partition(".")[0] for name in KNOWN if "." in name}
FILES = {"py", "md", "json", "yaml", "png"}  # train.py is no option
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
    text, readme = (ROOT / "docs/table3.md").read_text(), (ROOT / "README.md").read_text()
    for row in PAPER:
        recipe = compose_config("train", TrainConfig, f"+experiment={row.model}", "data.root=/imagenet").train
        start = f"| {row.name} | {row.model} | {recipe.recipe} | {recipe.epochs} | {recipe.global_batch} | "
        ranks = recipe.global_batch // recipe.batch_size
        top1 = f"{row.top1[224]:.2f} | {row.top1[320]:.2f} |"
        assert f"{start}{ranks} x {recipe.batch_size} | {top1}" in text, row.name
        assert re.search(rf"{row.model}.yaml\) \| {recipe.recipe} \| .+ \| {re.escape(top1)}\n", readme), row.name


# The same commands on fewer images: what is added to those that begin with these words, the longest that fit.
SHRUNK = {
    "resnest-data demo": ["train_per_class=5", "val_per_class=2"],
    "resnest-data demo task=segmentation": ["train_scenes=4", "val_scenes=2"],
    "resnest-data demo task=detection": ["train_images=4", "val_images=2"],
    "resnest-data preview": ["train.crop=32", "loader.workers=1"],
    "resnest-train": ["train.epochs=1", "train.warmup_epochs=0", "train.crop=32", "train.batch_size=16"],
    "resnest-train +experiment=demo_segmentation": ["train.epochs=1", "train.crop=64", "train.batch_size=2"],
    "resnest-train +experiment=demo_detection": ["train.epochs=1", "train.batch_size=2"],
    "resnest-train +experiment=finetune": [  # published weights are not here
        *["train.init_from=runs/demo", "model=resnest14_half", "train.epochs=1", "train.warmup_epochs=0"],
        *["train.crop=32", "log.pictures=false"],
    ],
    "resnest-eval": ["crop=[32,64]"],
    "resnest-eval ckpt=runs/demo_": [],
    "resnest-predict": ["crop=32"],
    "resnest-predict ckpt=runs/demo_": [],
    "resnest-predict ckpt=shapes": [],
    "resnest-explain": ["crop=32"],
    "resnest-compare": ["crop=32"],
    "resnest-report": ["latency=false"],
}
WORKERS = ("train", "eval", "predict", "explain", "compare")


def run_commands(commands, monkeypatch, capsys):
    """Run commands in the working folder, as they are written but for `SHRUNK`, and return how many there were.

    Not those that make an ONNX graph, of many seconds each: tests/weights does.
    """
    number = 0
    for name, arguments in commands:
        if "format=onnx" in arguments:
            continue
        line = " ".join([name, *arguments])
        start = max((start for start in SHRUNK if line.startswith(start)), key=len, default=None)
        fewer = SHRUNK.get(start, [])
        on_the_spot = name.removeprefix("resnest-") in WORKERS
        workers = ["device=cpu"] if on_the_spot else []
        if on_the_spot and not re.search("demo_(segmentation|detection)|ckpt=shapes", line):
            workers.append("loader.workers=1")
        monkeypatch.setattr(sys, "argv", [name, *arguments, *fewer, *workers])
        SCRIPTS[name].load()()
        assert capsys.readouterr().out.strip(), line
        number += 1
    return number


@pytest.mark.slow
def test_the_tutorial_and_the_demos_run_as_they_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tutorial = [command for command in map(to_script, read_commands(TUTORIAL)) if command[0]]
    (first,) = [command for command in tutorial if "demo" in command[1]]
    run_commands([first], monkeypatch, capsys)
    for folder in ("photographs", "new-pictures"):  # the reader's
        (tmp_path / folder).symlink_to(tmp_path / "data/demo/val")
    assert run_commands([command for command in tutorial if command is not first], monkeypatch, capsys) >= 15
    text = TUTORIAL.read_text()
    for path in re.findall(r"^- `([^`]+)`: ", text, re.MULTILINE):  # what the tutorial says one has at the end
        assert path.endswith(".onnx") or (tmp_path / path).exists(), path

    photos = sorted((tmp_path / "data/demo/val").glob("*/*"))[:2]
    (tmp_path / "photos").mkdir()
    for photo in photos:
        (tmp_path / "photos" / photo.name).symlink_to(photo)
    for page, least in (("segmentation.md", 5), ("detection.md", 8)):
        lines = [to_script(words) for words in read_commands(ROOT / "docs" / page)]
        of_demo = [c for c in lines if c[0] and re.search("demo|ckpt=shapes", " ".join(c[1]))]
        assert run_commands(of_demo, monkeypatch, capsys) >= least, page


def read_rows(page):
    """Return the cells of a page's tables, by the first one without its backticks."""
    lines = [line for line in (ROOT / page).read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name.strip("`"): cells for name, *cells in rows}


def test_the_networks_are_those_of_the_zoo():
    from resnest_imagenet.models.zoo import usual_crop
    from resnest_imagenet.weights.published import OFFICIAL

    golden = json.loads((ROOT / "tests/models/golden.json").read_text())
    expected = {
        name: [f"{parameters / 1e6:.2f}", f"{at_224 / 1e9:.2f}", str(usual_crop(name)), "yes" * (name in OFFICIAL)]
        for name, (parameters, at_224, _) in golden.items()
    }
    rows = read_rows("docs/models.md")
    assert {name: row for name, row in rows.items() if name != "name"} == expected

    readme = (ROOT / "README.md").read_text()
    for row in PAPER:
        assert re.search(rf"{row.model}.yaml\) \| \w+ \| {' [|] '.join(expected[row.model][:2])} \|", readme), row.name


def read_recipe(name):
    """Return a recipe's values as they are written, with those of the recipe that it takes the rest from."""
    values = yaml.load((ROOT / f"conf/recipe/{name}.yaml").read_text(), yaml.BaseLoader)
    for other in values.pop("defaults", []):
        values = {**({} if other == "_self_" else read_recipe(other)), **values}
    return values


def test_the_recipes_are_those_of_conf():
    columns = ["crop", "schedule", "policy", "mixup_alpha", "label_smoothing", "dropblock", "dropout"]
    rows = read_rows("docs/recipes.md")
    del rows["recipe="]  # the head
    for name, row in rows.items():
        values = read_recipe(name)
        batch = values["batch_size"] if values["global_batch"] == "null" else values["global_batch"]
        shown = ["" if values[column] in ("null", "0.0") else values[column] for column in columns]
        assert row == [values["epochs"], batch, *shown], name
    text = (ROOT / "docs/recipes.md").read_text()
    assert {path.stem for path in (ROOT / "conf/recipe").glob("*.yaml")} <= set(re.findall(r"`(\w+)`", text)) | set(
        rows
    )


def test_the_api_page_has_every_public_function():
    import resnest_imagenet

    named = re.findall(r"^::: resnest_imagenet\.(\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    public = {f"{module}.{name}" for name, module in resnest_imagenet._MODULES.items()}
    assert public <= set(named)
    assert set(named) - public == {"errors.UserError"}


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 160
    assert len(text.split()) <= 1200


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path, caplog, monkeypatch):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)
    with caplog.at_level(logging.WARNING, "mkdocs"):
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))  # strict: a broken link is an error
    assert (tmp_path / "api/index.html").stat().st_size > 20_000
    listed = (tmp_path / "files/index.html").read_text()
    assert not {path.name for path in (ROOT / "src").rglob("*.py")} - set(re.findall(r"<code>(\w+\.py)</code>", listed))
    assert "mkdocs" not in {record.name.partition(".")[0] for record in caplog.records}
