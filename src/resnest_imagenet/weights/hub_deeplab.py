"""A network of segmentation as a folder: weights, a description for this project, and a card for people."""

from os import PathLike

from resnest_imagenet.weights.card import DescribeScenes
from resnest_imagenet.weights.export import describe_deeplab
from resnest_imagenet.weights.hub_folder import export_folder
from resnest_imagenet.weights.load import Weights, read_weights
from resnest_imagenet.weights.segmentation import SEGMENTATION, restore_deeplab

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
    push: str | None = None,
) -> str:
    """Write model.safetensors, config.json and README.md; return a line about the folder.

    `read_weights` and torch.hub's entry deeplabv3 read the folder like the checkpoint. It has the chosen weights, with
    the auxiliary head.

    Args:
        source: a checkpoint of a run of segmentation, or the result of `read_weights` for one.
        describe: returns the description for other programs.
        out: the folder; None: deeplabv3_MODEL-hub.
        weights: "model", "ema" or "auto".
        push: a repository of the Hugging Face hub, OWNER/NAME, to which the folder is sent; or None.

    Raises:
        UserError: a user's error, in one line.
    """
    loaded = source if isinstance(source, Weights) else read_weights(source, weights, (SEGMENTATION,))
    tensors = restore_deeplab(loaded).state_dict()
    assert loaded.training
    card = describe(loaded, loaded.training["crop"])
    card["output_stride"] = str(loaded.training["output_stride"])
    name, words = f"deeplabv3_{loaded.model}", describe_deeplab(loaded)
    takers = "resnest-predict, resnest-eval and torch.hub's deeplabv3"
    return export_folder(loaded, tensors, card, _README, out, name=name, words=words, takers=takers, push=push)
