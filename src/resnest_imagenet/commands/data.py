"""resnest-data: make, unpack and check data sets; the first argument says what to do."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnest_imagenet.commands.launch import run_command
from resnest_imagenet.commands.terminal import surviving_output
from resnest_imagenet.commands.versions import asks_for_version, format_versions
from resnest_imagenet.config_data import (
    CheckDataConfig,
    DemoDataConfig,
    DemoObjectsConfig,
    DemoScenesConfig,
    PrepareDataConfig,
    PreviewDataConfig,
    ShardDataConfig,
    SplitDataConfig,
)
from resnest_imagenet.errors import ConfigError, DataError, suggest
from resnest_imagenet.options import Options


def write_demo(config: DemoDataConfig) -> None:
    """Write the demo images."""
    from resnest_imagenet.data.demo import write_demo_images

    new = write_demo_images(Path(config.out), config.seed, config.train_per_class, config.val_per_class)
    print(f"{'wrote' if new else 'already there:'} the demo images in {config.out}")


def write_demo_with_masks(config: DemoScenesConfig) -> None:
    """Write the demo scenes."""
    from resnest_imagenet.data.demo_scenes import write_demo_scenes

    new = write_demo_scenes(Path(config.out), config.seed, config.train_scenes, config.val_scenes)
    print(f"{'wrote' if new else 'already there:'} the demo scenes in {config.out}")


def write_demo_with_boxes(config: DemoObjectsConfig) -> None:
    """Write the demo objects."""
    from resnest_imagenet.data.demo_objects import write_demo_objects

    new = write_demo_objects(Path(config.out), config.seed, config.train_images, config.val_images)
    print(f"{'wrote' if new else 'already there:'} the demo objects in {config.out}")


def prepare(config: PrepareDataConfig) -> None:
    """Unpack ImageNet."""
    from resnest_imagenet.data.prepare import prepare_images

    new = prepare_images(Path(config.archives), Path(config.out), config.verify)
    print(f"{'wrote' if new else 'already there:'} ImageNet's images in {config.out}")


def split(config: SplitDataConfig) -> None:
    """Split class folders into train and val."""
    from resnest_imagenet.data.split import split_classes

    new = split_classes(Path(config.data.root), Path(config.out), config.val_share, config.seed)
    print(f"{'wrote' if new else 'already there:'} train and val in {config.out}: train with data.root={config.out}")


def check(config: CheckDataConfig) -> None:
    """Check a data set, print the table and write the report; faults raise a DataError after both."""
    from resnest_imagenet.data.check import check_images, format_report, write_report
    from resnest_imagenet.data.check_coco import check_coco
    from resnest_imagenet.data.check_listed import check_csv, check_split
    from resnest_imagenet.data.check_scenes import check_scenes
    from resnest_imagenet.data.parts import ClassifiedData
    from resnest_imagenet.files import require_writable

    if config.out:
        require_writable(Path(config.out), "out")
    data = config.data
    classified = ClassifiedData.of({name: value for name, value in data.model_dump().items() if value is not None})
    places = (data.root, data.train_dir, data.val_dir, config.workers)
    if data.kind == "csv":
        report = check_csv(classified, data.train_dir, data.val_dir, config.workers)
    elif data.val_split is not None:
        report = check_split(classified, config.workers)
    elif data.kind == "folder":
        report = check_images(*places)
    elif data.kind == "coco":
        report = check_coco(*places, data.train_json, data.val_json)
    else:
        report = check_scenes(data.kind, *places)
    if config.out:  # first: the table may meet a closed pipe
        write_report(report, Path(config.out))
    print(format_report(report))
    if report.num_faults:
        where = config.out or "add out=report.json to list them"
        raise DataError(f"{data.root}: faults: {report.num_faults:,} ({where})")


def shard(config: ShardDataConfig) -> None:
    """Write WebDataset shards."""
    from resnest_imagenet.data.shards import write_shards

    parts = {"data.train_dir": config.data.train_dir, "data.val_dir": config.data.val_dir}
    chosen = {option: name for option, name in parts.items() if name is not None}
    write_shards(config.data.root, chosen, Path(config.out), config.images_per_shard, config.shuffle)
    print(f"wrote the shards in {config.out}: train with data=webdataset data.root={config.out}")


def preview(config: PreviewDataConfig) -> None:
    """Write a contact sheet."""
    from resnest_imagenet.tasks.preview import write_preview

    rows = write_preview(config)
    print(f"wrote {config.out}: {rows} images under recipe={config.train.recipe}, in {config.epochs} epochs")


@dataclass(frozen=True)
class Action:
    """What resnest-data can do; its primary configuration is conf/data_<name>.yaml."""

    schema: type[Options]
    job: Callable[[Any], None]  # takes the schema's instance
    summary: str


ACTIONS = {
    "demo": Action(
        DemoDataConfig,
        write_demo,
        "draw a data set: classes, masks or objects",
    ),
    "prepare": Action(PrepareDataConfig, prepare, "unpack the official ImageNet archives"),
    "split": Action(SplitDataConfig, split, "make train and val of a folder of class folders"),
    "check": Action(CheckDataConfig, check, "decode every image of a data set and list what is wrong with it"),
    "preview": Action(PreviewDataConfig, preview, "draw what training makes of some images, in a contact sheet"),
    "shard": Action(ShardDataConfig, shard, "write a folder of images as WebDataset shards"),
}


# The demo images of the other tasks; the primary configuration is conf/data_demo_<task>.yaml. They are chosen before
# Hydra reads the command line: there `task` is a group of conf/, and no option of a command can have a group's name.
DEMOS = {
    "segmentation": Action(DemoScenesConfig, write_demo_with_masks, "write scenes with masks"),
    "detection": Action(DemoObjectsConfig, write_demo_with_boxes, "write objects with boxes and masks"),
}


def choose_demo(words: list[str]) -> tuple[str, Action]:
    """Take task=... out of the words of a command line, and return what writes the demo images of that task.

    Returns:
        The primary configuration and the action.

    Raises:
        ConfigError: there is no such task.
    """
    task = ([word.removeprefix("task=") for word in words if word.startswith("task=")] or ["classification"])[-1]
    words[:] = [word for word in words if not word.startswith("task=")]
    actions = {"classification": ACTIONS["demo"], **DEMOS}
    own = actions[task].schema.model_fields if task in actions else ()
    for option in (word.partition("=")[0] for word in words):
        other = next((name for name, action in actions.items() if option in action.schema.model_fields), None)
        if other is not None and own and option not in own:
            raise ConfigError(f"{option} is of task={other}: add task={other}")
    if task == "classification":
        return "data_demo", ACTIONS["demo"]
    if task not in DEMOS:
        tasks = ["classification", *DEMOS]
        raise ConfigError(f"unknown task {task!r}{suggest(task, tasks)} ({', '.join(tasks)})")
    return f"data_demo_{task}", DEMOS[task]


def format_usage() -> str:
    """Return what resnest-data without an action prints."""
    actions = "".join(f"  {name:<9}{action.summary}\n" for name, action in ACTIONS.items())
    return f"resnest-data ACTION option=value ...\n\n{actions}\nresnest-data ACTION --help shows the options."


def main() -> None:
    """Entry of resnest-data."""
    name, sys.argv[1:] = "".join(sys.argv[1:2]), sys.argv[2:]
    if name in ACTIONS:
        config, action = f"data_{name}", ACTIONS[name]
        if name == "demo":
            try:
                config, action = choose_demo(sys.argv)
            except ConfigError as error:
                print(f"resnest-data: {error}", file=sys.stderr)
                sys.exit(error.exit_code)
        run_command(config, action.schema, action.job)
    elif asks_for_version([name]):
        print(format_versions())
    elif name in ("", "-h", "--help", "help"):
        with surviving_output(may_lose=False):
            print(format_usage())
    else:
        hint = suggest(name, ACTIONS) or f": {', '.join(ACTIONS)}"
        print(f"resnest-data: unknown action {name!r}{hint}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
