"""A detector as a folder: weights, a description that this project reads, and a card for people."""

from os import PathLike

from resnest_imagenet.weights.card import DescribeObjects
from resnest_imagenet.weights.detection import DETECTION, restore_rcnn
from resnest_imagenet.weights.export_rcnn import describe_rcnn
from resnest_imagenet.weights.hub_folder import export_folder
from resnest_imagenet.weights.load import Weights, read_weights

_README = """---
license: apache-2.0
library_name: pytorch
pipeline_tag: object-detection
tags:
- object-detection
- resnest
---
# {name}

Object detection by resnest-imagenet, the project around
[ResNeSt: Split-Attention Networks](https://arxiv.org/abs/2004.08955): {words}.

- Input: {channels} in 0..255; mean {mean}, std {std}; padded with zeros at the right and at the bottom to a multiple
  of 32.
- Output: of each image boxes, scores, labels, and masks where it finds them.
- Evaluated as: {protocol}.
{score}- Classes: `{settings}`.

```python
import torch

model = torch.hub.load("OWNER/resnest-imagenet", "rcnn", pretrained="FOLDER").eval()
(objects,) = model(images, [(height, width)])  # .boxes, .scores, .labels and .masks; model.classes are the names
```

In resnest-imagenet: `resnest-predict ckpt=FOLDER images=...`, `resnest-eval ckpt=FOLDER data.root=...`, and
`resnest-train ... train.init_from=FOLDER`.
"""


def export_rcnn_folder(
    source: Weights | str | PathLike[str],
    describe: DescribeObjects,
    out: str | PathLike[str] | None = None,
    *,
    weights: str = "auto",
    push: str | None = None,
) -> str:
    """Write model.safetensors, config.json and README.md; return a line about the folder.

    `read_weights` takes the folder as it takes the checkpoint, of which it has the chosen weights; torch.hub's entry
    rcnn likewise.

    Args:
        source: a checkpoint of a run of detection, or what `read_weights` has made of it.
        describe: returns what another program needs to use the network.
        out: the folder; None: rcnn_MODEL-hub.
        weights: "model", "ema" or "auto".
        push: a repository of the Hugging Face hub, OWNER/NAME, to which the folder is sent; or None.

    Raises:
        UserError: for what a user can cause, as one line.
    """
    loaded = source if isinstance(source, Weights) else read_weights(source, weights, (DETECTION,))
    tensors = restore_rcnn(loaded).state_dict()
    card = describe(loaded)
    name, words = f"rcnn_{loaded.model}", describe_rcnn(loaded)
    takers = "resnest-predict, resnest-eval, resnest-compare and torch.hub's rcnn"
    return export_folder(loaded, tensors, card, _README, out, name=name, words=words, takers=takers, push=push)
