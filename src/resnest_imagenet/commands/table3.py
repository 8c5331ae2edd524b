"""resnest-table3: the paper's Table 3 beside this project's counted and measured figures."""

import shutil
import sys
from typing import Any, cast

from resnest_imagenet.commands.launch import find_conf, run_command
from resnest_imagenet.config_reading import Table3Config
from resnest_imagenet.errors import printable


def run(config: Table3Config) -> None:
    """Print the table."""
    from resnest_imagenet.evaluation.measured import read_measured
    from resnest_imagenet.reports.aligned import align_tables
    from resnest_imagenet.reports.table3 import build_table, format_table, list_strangers

    measured, skipped = read_measured(config.results, load_recipes())
    for line in skipped + list_strangers(measured):
        print(printable(f"resnest-table3: skipped: {line}"), file=sys.stderr)
    form, width = choose_form(config.format)
    text = format_table(build_table(measured), form)
    print(align_tables(text, width) if width else text)


def choose_form(form: str) -> tuple[str, int]:
    """Return the form to make of a table, and the width to which it is then aligned; 0: it stays as it is.

    Args:
        form: of the option.
    """
    if form == "text" or (form == "auto" and sys.stdout.isatty()):
        return "markdown", shutil.get_terminal_size().columns
    return "markdown" if form == "auto" else form, 0


def load_recipes() -> dict[str, dict[str, Any]]:
    """Return the training options of each recipe by its name, without an experiment or overrides.

    Hydra composes each one when it is first read: all of them would take seconds, and results name few.
    """
    return _Recipes()


class _Recipes(dict[str, dict[str, Any]]):
    def __init__(self) -> None:
        super().__init__()
        self._names = frozenset(file.stem for file in (find_conf() / "recipe").glob("*.yaml"))

    def __missing__(self, name: str) -> dict[str, Any]:
        if name not in self._names:
            raise KeyError(name)
        from hydra import compose
        from omegaconf import OmegaConf

        values = OmegaConf.to_container(compose("train", [f"recipe={name}"]).train)
        self[name] = cast(dict[str, Any], values)
        return self[name]

    def get(self, name: str, default: Any = None, /) -> Any:  # dict.get does not call __missing__
        return self[name] if name in self._names else default


def main() -> None:
    """Entry of resnest-table3."""
    run_command("table3", Table3Config, run)


if __name__ == "__main__":
    main()
