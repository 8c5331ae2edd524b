"""The weights of a detector out of a checkpoint, for other programs."""

from os import PathLike

from resnest_imagenet.errors import ConfigError
from resnest_imagenet.weights.detection import DETECTION, name_rcnn, restore_rcnn
from resnest_imagenet.weights.export import choose_file, require_layout, write_tensors
from resnest_imagenet.weights.layouts import rename
from resnest_imagenet.weights.load import Weights, read_weights


def export_rcnn(
    source: Weights | str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    weights: str = "auto",
    layout: str = "official",
    form: str = "safetensors",
) -> str:
    """Write a bare state dict of a detector; return a line about the file.

    The layouts of others have the backbone alone: their detectors have other names and, in part, other layers.

    Args:
        source: a checkpoint of a run of detection, or what `read_weights` has made of it.
        out: the file; None: rcnn_MODEL-official.FORMAT.
        weights: "model", "ema" or "auto".
        layout: "official", which are the names of `models.rcnn.RCNN`, or "mmdetection" or "detectron2".
        form: "safetensors" or "pth".

    Raises:
        UserError: for what a user can cause, as one line.
    """
    if layout not in ("official", "mmdetection", "detectron2"):
        raise ConfigError(f"layout={layout}: a detector has official (this project's), mmdetection or detectron2")
    loaded = source if isinstance(source, Weights) else read_weights(source, weights, (DETECTION,))
    network = restore_rcnn(loaded)
    file = choose_file(loaded.source, out, f"rcnn_{loaded.model}-{layout}.{form}")
    words = describe_rcnn(loaded)
    if layout == "official":
        return write_tensors(file, network.state_dict(), words)
    assert loaded.model
    require_layout(layout, loaded.model, loaded.source)
    renamed = {rename(key, layout): value for key, value in network.backbone.state_dict().items()}
    tensors = {key: value for key, value in renamed.items() if key}
    return write_tensors(file, tensors, f"the backbone alone of {words}")


def describe_rcnn(weights: Weights) -> str:
    """Return which detector was exported, in words."""
    name = f"{name_rcnn(weights)} with {len(weights.classes or ())} classes"
    return f"moving average of {name}" if weights.is_average else name
