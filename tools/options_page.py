"""Write docs/options.md from the schema: every option of every command, with its value, its type and what it is."""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from resnest_imagenet import config, config_reading
from resnest_imagenet.commands import data
from resnest_imagenet.commands.choices import describe_choices, list_choices, list_groups
from resnest_imagenet.commands.help import format_typed, read_values
from resnest_imagenet.commands.launch import find_conf
from resnest_imagenet.commands.option_list import Section, list_sections
from resnest_imagenet.options import Options
from resnest_imagenet.schemas import choose_schema

# By primary configuration: what the command is called, and its schema.
COMMANDS: dict[str, tuple[str, type[Options]]] = {
    "train": ("resnest-train", config.TrainConfig),
    "eval": ("resnest-eval", config_reading.EvalConfig),
    "predict": ("resnest-predict", config_reading.PredictConfig),
    "compare": ("resnest-compare", config_reading.CompareConfig),
    "explain": ("resnest-explain", config_reading.ExplainConfig),
    "app": ("resnest-app", config_reading.AppConfig),
    "report": ("resnest-report", config_reading.ReportConfig),
    "export": ("resnest-export", config_reading.ExportConfig),
    "info": ("resnest-info", config_reading.InfoConfig),
    "tables": ("resnest-tables", config_reading.TablesConfig),
    "table3": ("resnest-table3", config_reading.Table3Config),
    **{f"data_{name}": (f"resnest-data {name}", action.schema) for name, action in data.ACTIONS.items()},
    **{f"data_demo_{task}": (f"resnest-data demo task={task}", demo.schema) for task, demo in data.DEMOS.items()},
}
# Choices with which a command has the options of the other tasks.
_TRAIN = (
    ("task=segmentation", "data=ade20k", "recipe=deeplab_gluon", "protocol=whole"),
    ("task=detection", "data=coco", "recipe=detectron2_boxes", "protocol=coco"),
)
VARIANTS = {"train": ((), *_TRAIN)}

HEAD = """\
# Options

Every command takes options, such as `seed=1`, and choices of groups, such as `loader=torchvision`; a group is a folder
of `conf/`. With `--help` a command shows what it takes, and the values under the other options given. `make options`
makes this page from the schema.

`...` stands for a value that must be given. Values are those without an experiment, `train.*` with `recipe=resnest`, in
segmentation `recipe=deeplab_gluon`, in detection `recipe=detectron2_boxes`.
"""


def build_page(compose: Callable[..., Any]) -> str:
    """Return the page.

    Args:
        compose: composes conf/<name>.yaml, called as compose(name, *overrides).
    """
    shared: dict[type, str] = {}  # sections of several commands: each is shown once
    commands = []
    for name, (command, schema) in COMMANDS.items():
        lines = [f"### {command}", ""]
        links: dict[str, None] = {}
        for overrides in VARIANTS.get(name, ((),)):
            values = read_values(compose(name, *overrides))
            for section in list_sections(choose_schema(schema, values), values):
                if not section.name:
                    lines += [] if overrides else [*_format_table(section, values), ""]
                    continue
                heading = f"{section.name}: {section.title.rstrip('.')}"
                links[f"[{heading}](#{_slug(heading)})"] = None
                shared.setdefault(section.schema, "\n".join([f"### {heading}", "", *_format_table(section, values)]))
        if groups := _list_groups(name, schema):
            lines += [f"Groups: {', '.join(f'`{group}`' for group in groups)}.", ""]
        if links:
            lines += ["Sections:", "", *(f"- {link}" for link in links), ""]
        commands.append("\n".join(lines))
    text = [HEAD, "## Commands", "", *commands, "## Sections", "", "\n\n".join(shared.values()), ""]
    return "\n".join([*text, "## Choices", *_format_choices()]) + "\n"


def _slug(heading: str) -> str:
    """Return the anchor of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _format_table(section: Section, values: Mapping[str, Any]) -> Iterator[str]:
    part = values[section.name] if section.name else values
    yield "| option | value | takes | meaning |"
    yield "|---|---|---|---|"
    for option in section.options:
        value = format_typed(part[option.name.rpartition(".")[2]])
        yield f"| `{option.name}` | `{value}` | {_escape(option.kind)} | {_escape(option.description)} |"


def _escape(text: str) -> str:
    return text.replace("<", "&lt;").replace(">", "&gt;")


def _list_groups(name: str, schema: type[Options]) -> list[str]:
    """Return the groups of a command: those in its list of defaults."""
    text = (find_conf() / f"{name}.yaml").read_text()
    if re.search(r"^  - train$", text, re.MULTILINE):
        return _list_groups("train", schema)
    return list_groups(schema, dict.fromkeys(re.findall(r"^  - (\w+):", text, re.MULTILINE)))


def _format_choices() -> Iterator[str]:
    for group in _list_groups("train", config.TrainConfig):
        schema = config_reading.EvalConfig if group == "protocol" else config.TrainConfig
        meanings = describe_choices(group, [find_conf()])
        choices = list_choices(schema, group, [find_conf()])
        yield from ("", f"### {group}", "")
        if not all(meanings.values()):
            yield f"{', '.join(f'`{name}`' for names in choices.values() for name in names)}."
            continue
        yield from ("| name | task | what it is |", "|---|---|---|")
        for task, names in choices.items():
            for name in names:
                yield f"| `{name}` | {task or 'every task'} | {_escape(meanings[name])} |"


def main() -> None:
    """Write the page to standard output."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(find_conf()), version_base="1.3"):
        sys.stdout.write(build_page(lambda name, *overrides: compose(name, list(overrides))))


if __name__ == "__main__":
    main()
