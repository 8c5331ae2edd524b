"""A network of segmentation as a folder: weights, a description for this project, and a card for people."""

from os import PathLike
from pathlib import Path

from resnest_imagenet.weights.card import DescribeScenes
from resnest_imagenet.weights.export import describe_deeplab, digest
from resnest_imagenet.weights.folders import TENSORS
from resnest_imagenet.weights.hub import read_score
from resnest_imagenet.weights.hub_folder import write_folder
from resnest_imagenet.weights.load import Weights, read_weights
from resnest_imagenet.weights.segmentation import SEGMENTATION, restore_deeplab
from resnest_imagenet.weights.sources import SETTINGS

_README = """---
license: apache-2.0
library_name: pytorch
pipeline_tag: image-segmentation
tags:
- image-segmentation
- deeplabv3
- resnest
---
# {name}

Semantic segmentation by resnest-imagenet, the project around
[ResNeSt: Split-Attention Networks](https://arxiv.org/abs/2004.08955): {words}, output stride {output_stride}.

- Input: {input}; mean {mean}, std {std}.
- Output: {output}.
- Evaluated as: {protocol}.
{score}- Classes, and their colours where there are any: `{settings}`.

```python
import torch

model = torch.hub.load("OWNER/resnest-imagenet", "deeplabv3", pretrained="FOLDER").eval()
mask = model(images).argmax(1)  # model.classes are the names
```

In resnest-imagenet: `resnest-predict ckpt=FOLDER images=...`, `resnest-eval ckpt=FOLDER data.root=...`, and
`resnest-train ... train.init_from=FOLDER`.
"""


def export_deeplab_folder(
    source: Weights | str | PathLike[str],
    describe: DescribeScenes,
    out: str | PathLike[str] | None = None,
    *,
    weights: str = "auto",
) -> str:
    """Write model.safetensors, config.json and README.md; return a line about the folder.

    `read_weights` and torch.hub's entry deeplabv3 read the folder like the checkpoint. It has the chosen weights, with
    the auxiliary head.

    Args:
        source: a checkpoint of a run of segmentation, or the result of `read_weights` for one.
        describe: returns the description for other programs.
        out: the folder; None: deeplabv3_MODEL-hub.
        weights: "model", "ema" or "auto".

    Raises:
        UserError: a user's error, in one line.
    """
    loaded = source if isinstance(source, Weights) else read_weights(source, weights, (SEGMENTATION,))
    tensors = restore_deeplab(loaded).state_dict()
    assert loaded.training
    card = describe(loaded, loaded.training["crop"])
    name = f"deeplabv3_{loaded.model}"
    folder = Path(out or f"{name}-hub")
    file = write_folder(folder, loaded, tensors, card, _write_readme(loaded, name, card))
    return (
        f"wrote {folder}: {describe_deeplab(loaded)}; {TENSORS} has {len(tensors)} tensors, SHA-256 {digest(file)}: "
        "resnest-predict, resnest-eval and torch.hub's deeplabv3 take the folder"
    )


def _write_readme(weights: Weights, name: str, card: dict[str, str]) -> str:
    score = read_score(weights)
    assert weights.training
    return _README.format(
        **{key: card[key] for key in ("input", "output", "protocol", "mean", "std")},
        name=name,
        words=describe_deeplab(weights),
        output_stride=weights.training["output_stride"],
        score=f"- {score}\n" if score else "",
        settings=SETTINGS,
    )
