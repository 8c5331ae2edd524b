"""resnest-eval: the accuracy of a checkpoint at one or several crops."""

from resnest_imagenet.commands.launch import run_command
from resnest_imagenet.config import EvalConfig


def run(config: EvalConfig) -> None:
    """Evaluate and print the table."""
    from resnest_imagenet.distributed import launched_as
    from resnest_imagenet.tasks.evaluate_checkpoint import evaluate_checkpoint, format_results

    results = evaluate_checkpoint(config)
    if launched_as()[0] == 0:
        print(format_results(results))


def main() -> None:
    """Entry of resnest-eval and of torchrun -m resnest_imagenet.commands.evaluate."""
    run_command("eval", EvalConfig, run)


if __name__ == "__main__":
    main()
