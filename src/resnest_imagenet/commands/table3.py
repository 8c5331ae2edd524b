"""resnest-table3: the paper's Table 3 beside what was counted and measured here."""

from typing import Any

from resnest_imagenet.commands.launch import find_conf, run_command
from resnest_imagenet.config import Table3Config


def run(config: Table3Config) -> None:
    """Print the table."""
    from resnest_imagenet.evaluation.results import read_measured
    from resnest_imagenet.evaluation.table3 import build_table, format_table

    print(format_table(build_table(read_measured(config.results, load_recipes())), config.format))


def load_recipes() -> dict[str, dict[str, Any]]:
    """Return the training options of each recipe by its name, as they are without an experiment or overrides."""
    from omegaconf import OmegaConf

    common = OmegaConf.load(find_conf() / "train.yaml").train
    files = (find_conf() / "recipe").glob("*.yaml")
    return {file.stem: dict(OmegaConf.merge(common, OmegaConf.load(file))) for file in files}


def main() -> None:
    """Entry of resnest-table3."""
    run_command("table3", Table3Config, run)


if __name__ == "__main__":
    main()
