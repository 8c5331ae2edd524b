"""The pictures that a finished run leaves in its folder: its curves, and validation images with predictions."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from resnest_imagenet.config import TrainConfig
from resnest_imagenet.errors import printable
from resnest_imagenet.evaluation.step_reports import read_run_events
from resnest_imagenet.files import make_way, write_atomically

RESULTS, SHEET = "results.png", "val.png"


def write_pictures(config: TrainConfig, device: torch.device) -> list[Path]:
    """Draw the pictures of a finished run; return their paths.

    A picture that cannot be drawn is a line on stderr: the run has finished, and nothing may fail it any more.

    Args:
        config: of the run.
        device: of what a picture needs of the network.
    """
    return list(_write(config, device))


def _write(config: TrainConfig, device: torch.device) -> Iterator[Path]:
    folder = Path(config.run_dir)
    drawings: dict[str, Callable[[], np.ndarray | None]] = {
        RESULTS: lambda: draw_results(folder),
        SHEET: lambda: _draw_sheet(config, device),
    }
    for name, draw in drawings.items():
        path = folder / name
        try:
            pixels = draw()
            if pixels is None:
                continue
            make_way(path)
            with write_atomically(path) as file:
                Image.fromarray(pixels).save(file, format="PNG")
        except Exception as error:  # the run is complete: a picture must not make it fail
            print(printable(f"WARNING: {path} is not drawn: {error}"), file=sys.stderr, flush=True)
            continue
        yield path


def draw_results(folder: Path) -> np.ndarray | None:
    """Draw the losses and the figures of a run over its epochs, uint8 (H, W, 3); None of a run without reports.

    Args:
        folder: of the run.
    """
    # Late: they import matplotlib, which takes half a second.
    from resnest_imagenet.evaluation.charts import draw_charts
    from resnest_imagenet.evaluation.curves import RunCurves, chart_figures, chart_losses, chart_steps

    steps, evaluations = read_run_events(folder / "metrics.jsonl", ("step", "loss", "lr"))
    if not steps:
        return None
    curves = [RunCurves(folder.name, steps, evaluations)]
    charts = [chart_losses(curves), chart_steps(curves, "lr", "Learning rate", "learning rate")]
    if evaluations:
        charts.insert(1, chart_figures(curves, curves[0].metric))
    return draw_charts(charts, (5 * len(charts), 3.6))


def _draw_sheet(config: TrainConfig, device: torch.device) -> np.ndarray | None:
    from resnest_imagenet.tasks.val_sheet import draw_val_sheet  # late: it imports torchvision

    return draw_val_sheet(config, device)
