"""resnest-data: make data sets; the first argument says what to do."""

import sys
from pathlib import Path

from resnest_imagenet.commands.launch import run_command
from resnest_imagenet.config import DemoDataConfig

USAGE = """\
resnest-data ACTION option=value ...

  demo   write the demo images: ten classes of shapes and textures in the ImageNet folder layout

resnest-data ACTION --help shows the options."""


def write_demo(config: DemoDataConfig) -> None:
    """Write the demo images."""
    from resnest_imagenet.data.demo import write_demo_images

    new = write_demo_images(Path(config.out), config.seed, config.train_per_class, config.val_per_class)
    print(f"{'wrote' if new else 'already there:'} the demo images in {config.out}")


def main() -> None:
    """Entry of resnest-data."""
    action, sys.argv[1:] = "".join(sys.argv[1:2]), sys.argv[2:]
    if action == "demo":
        run_command("data_demo", DemoDataConfig, write_demo)
    elif action in ("", "-h", "--help", "help"):
        print(USAGE)
    else:
        print(f"resnest-data: unknown action {action!r}; the only one is 'demo'", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
