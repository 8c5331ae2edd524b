"""A network as a folder for the Hugging Face hub that timm loads."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from resnest_imagenet.checkpoint import load_checkpoint, save_checkpoint
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.files import require_writable, write_atomically
from resnest_imagenet.models.imagenet_classes import imagenet_synsets
from resnest_imagenet.models.zoo import ARCHITECTURES, TIMM_RESNESTS, PeerSpec
from resnest_imagenet.weights.card import Card, DescribeInput, open_network
from resnest_imagenet.weights.export import describe_weights, digest, require_other
from resnest_imagenet.weights.hub_push import push_folder
from resnest_imagenet.weights.load import Weights

_README = """---
{licence}library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
---
# {model}

An image classifier of resnest-imagenet, the project around
[ResNeSt: Split-Attention Networks](https://arxiv.org/abs/2004.08955).

- Input: RGB in 0..1, minus mean {mean}, over std {std}; {protocol}.
{accuracy}
```python
import timm

model = timm.create_model("hf-hub:{repository}", pretrained=True).eval()  # or "local-dir:FOLDER"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```
{evaluation}"""
_EVALUATION = """
In resnest-imagenet: `resnest-eval ckpt=FOLDER/model.safetensors model={model} data.root=... {options}`
"""


def export_folder(
    source: Weights | str | PathLike[str],
    describe: DescribeInput,
    out: str | PathLike[str] | None = None,
    *,
    model: str | None = None,
    weights: str = "auto",
    push: str | None = None,
) -> str:
    """Write model.safetensors, config.json and README.md; return a line about the folder.

    Args:
        source: a checkpoint, a file of weights, or published weights; or the result of `read_weights` for one.
        describe: returns the network's input, from the weights and the network's name.
        out: the folder; None: MODEL-hub.
        model: name of the network; None if the weights include it.
        weights: "model", "ema" or "auto".
        push: a repository of the Hugging Face hub, OWNER/NAME, to which the folder is sent; or None.

    Raises:
        UserError: a user's error, in one line.
    """
    network, loaded, card = open_network(source, describe, model, weights)
    folder = Path(out or f"{card.model}-hub")
    file, settings, readme = (folder / name for name in ("model.safetensors", "config.json", "README.md"))
    require_other(loaded.source, out or file, file)
    require_writable(settings, "out")
    tensors = network.state_dict()
    described = describe_for_timm(card, tensors)
    # Write the settings last: timm loads nothing without them, so it never reads old settings with new weights.
    settings.unlink(missing_ok=True)
    save_checkpoint(tensors, file)
    for path, text in (
        (readme, _write_readme(card, loaded.source, read_score(loaded), bool(loaded.mean or loaded.std), push)),
        (settings, json.dumps(described, indent=2, ensure_ascii=False) + "\n"),
    ):
        with write_atomically(path) as opened:
            opened.write(text.encode())
    sent = f"\n{push_folder(folder, push)}" if push else ""
    arguments = " with model_args" if "model_args" in described else ""
    return (
        f"wrote {folder}: {describe_weights(loaded, card.model)} as timm's {described['architecture']}{arguments}; "
        f"model.safetensors has {len(tensors)} tensors, SHA-256 {digest(file)}{sent}"
    )


def describe_for_timm(card: Card, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return timm's config.json for a network.

    It does not list ImageNet's classes: timm has names for them. timm has neither "crop_resize" nor a resize without
    antialiasing: it uses the nearest protocol, a resize to crop / crop_pct and a centre crop.

    Args:
        card: the network.
        tensors: its state dict.
    """
    architecture, arguments = _find_architecture(card.model)
    num_classes, num_features = tensors["fc.weight"].shape
    size = [3, card.images.crop, card.images.crop]
    described: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": num_features,
        "global_pool": "avg",
        "pretrained_cfg": {
            "input_size": size,
            "test_input_size": size,
            "fixed_input_size": False,
            "interpolation": card.images.interpolation,
            "crop_pct": card.images.ratio,
            "crop_mode": "center",
            "mean": card.images.mean,
            "std": card.images.std,
            "num_classes": num_classes,
            "pool_size": [-(-card.images.crop // 32)] * 2,
            "first_conv": "conv1.0" if "conv1.0.weight" in tensors else "conv1",
            "classifier": "fc",
        },
    }
    if arguments:
        described["model_args"] = arguments
    if card.classes and card.class_names and list(card.classes) != imagenet_synsets():
        described["label_names"] = card.classes
        described["label_descriptions"] = dict(zip(card.classes, card.class_names, strict=True))
    return described


def _find_architecture(name: str) -> tuple[str, dict[str, Any]]:
    """Return a network's name in timm, or that of a similar network and the arguments that turn it into this one."""
    if name not in ARCHITECTURES:
        raise ConfigError(f"format=hub is for networks that timm has, and it has no {name}")
    spec = ARCHITECTURES[name]
    if isinstance(spec, PeerSpec):
        if spec.strides_first:
            raise ConfigError(
                f"format=hub is for networks that timm has: its {spec.timm_name} has other strides than {name}"
            )
        return ("skresnext50_32x4d" if spec.timm_name == "resnet" else spec.timm_name), spec.arguments
    if name in TIMM_RESNESTS:
        return TIMM_RESNESTS[name], {}
    return "resnest50d", {
        "layers": spec.layers,
        "stem_width": spec.stem_width,
        "channels": [spec.planes * 2**stage for stage in range(4)],
        "cardinality": spec.cardinality,
        "base_width": spec.width,
        "block_args": {"radix": spec.radix, "avd": True, "avd_first": spec.avd_first},
    }


def _write_readme(
    card: Card, source: str, accuracy: str | None, has_own_pixels: bool, repository: str | None = None
) -> str:
    return _README.format(
        licence="" if source.startswith("timm:") else "license: apache-2.0\n",  # timm's weights have various licences
        model=card.model,
        repository=repository or f"OWNER/{card.model}",
        mean=card.images.mean,
        std=card.images.std,
        protocol=card.images.protocol,
        accuracy=f"- {accuracy}\n" if accuracy else "",
        # These commands take bare weights for those of ImageNet's mean and std.
        evaluation="" if has_own_pixels else _EVALUATION.format(model=card.model, options=card.images.options),
    )


def read_score(weights: Weights) -> str | None:
    """Return Top-1, mIoU or AP in words if a checkpoint has it: only a run's best.pt has that of its own weights."""
    if weights.training is None or Path(weights.source).name != "best.pt":
        return None
    content = load_checkpoint(weights.source)
    metric = {
        "top1": ("Top-1", "images"),
        "miou": ("mIoU", "scenes"),
        "box_ap": ("box AP", "images"),
        "mask_ap": ("mask AP", "images"),
    }.get(content.get("metric", "top1"))
    if metric is None:
        return None
    best = content.get("best", content.get("best_top1"))  # the latter in checkpoints of earlier versions
    identity = content.get("identity")
    if weights.is_average != bool(content.get("ema")) or not isinstance(best, float) or not isinstance(identity, dict):
        return None
    return f"{metric[0]}: {best:.2f} % of the run's evaluation {metric[1]} ({identity.get('evaluation')})."
