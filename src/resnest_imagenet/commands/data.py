"""resnest-data: make and unpack data sets; the first argument says what to do."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnest_imagenet.commands.launch import run_command
from resnest_imagenet.config import DemoDataConfig, Options, PrepareDataConfig
from resnest_imagenet.errors import suggest


def write_demo(config: DemoDataConfig) -> None:
    """Write the demo images."""
    from resnest_imagenet.data.demo import write_demo_images

    new = write_demo_images(Path(config.out), config.seed, config.train_per_class, config.val_per_class)
    print(f"{'wrote' if new else 'already there:'} the demo images in {config.out}")


def prepare(config: PrepareDataConfig) -> None:
    """Unpack ImageNet."""
    from resnest_imagenet.data.prepare import prepare_images

    new = prepare_images(Path(config.archives), Path(config.out), config.verify)
    print(f"{'wrote' if new else 'already there:'} ImageNet's images in {config.out}")


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
        "write the demo images: ten classes of shapes and textures in the ImageNet folder layout",
    ),
    "prepare": Action(PrepareDataConfig, prepare, "unpack the official ImageNet archives to the folder layout"),
}


def format_usage() -> str:
    """Return what resnest-data without an action prints."""
    actions = "".join(f"  {name:<9}{action.summary}\n" for name, action in ACTIONS.items())
    return f"resnest-data ACTION option=value ...\n\n{actions}\nresnest-data ACTION --help shows the options."


def main() -> None:
    """Entry of resnest-data."""
    name, sys.argv[1:] = "".join(sys.argv[1:2]), sys.argv[2:]
    if name in ACTIONS:
        run_command(f"data_{name}", ACTIONS[name].schema, ACTIONS[name].job)
    elif name in ("", "-h", "--help", "help"):
        print(format_usage())
    else:
        hint = suggest(name, ACTIONS) or f": {', '.join(ACTIONS)}"
        print(f"resnest-data: unknown action {name!r}{hint}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
