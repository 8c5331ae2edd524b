"""resnest-export: the weights of a checkpoint in another project's layout."""

from resnest_imagenet.commands.launch import run_command
from resnest_imagenet.config import ExportConfig


def run(config: ExportConfig) -> None:
    """Import torch only now, and export."""
    from resnest_imagenet.weights.export import export_weights

    print(export_weights(config))


def main() -> None:
    """Entry of resnest-export."""
    run_command("export", ExportConfig, run)


if __name__ == "__main__":
    main()
