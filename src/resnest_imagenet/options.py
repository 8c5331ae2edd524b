"""The base of every schema, and the types they share."""

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
# Five halvings need 32 pixels.
Crop = Annotated[int, Field(ge=32)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Precision = Annotated[
    Literal["fp32", "bf16", "fp16"], Field(description="Of the network's passes; bf16 and fp16 by autocast.")
]
Layer = Literal["layer1", "layer2", "layer3", "layer4", "head"]  # of a classifier, with features
Tta = Annotated[
    Literal["flip"] | None,
    Field(
        description="flip: a classifier's probabilities are the mean of those for an image and for its mirror image; "
        "null: for the image alone. The accuracies have a protocol of their own."
    ),
]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def as_list(value: Any) -> Any:
    """Take crop=224 for crop=[224]."""
    return value if isinstance(value, list) else [value]


def check_device(value: Any) -> Any:
    """Refuse what no device is called; `distributed.choose_device` refuses what torch does not have."""
    if type(value) is int:
        raise ValueError(f"device={value}: write device=cuda:{value}")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", str(value), re.ASCII):
        raise ValueError(f"device={value}: auto, cpu, cuda, cuda:1 (any number) and mps are valid")
    return value


Device = Annotated[
    str,
    BeforeValidator(check_device),
    Field(description="Where the network runs: auto (CUDA where there is one), cpu, cuda, cuda:1 or mps."),
]


def keep_own(value: Any, validate: Callable[[Any], Any]) -> Any:
    """Take "own" as it is, whatever the type is: a union would put the names of its types into an error's option."""
    return value if value == "own" else validate(value)


AUTO = "auto"


def keep_auto(value: Any, validate: Callable[[Any], Any]) -> Any:
    """Do the same with "auto", the only word that is valid."""
    if isinstance(value, str) and value != AUTO:
        raise ValueError(f"train.batch_size={value}: write a number, or {AUTO}")
    return value if value == AUTO else validate(value)


def as_path(value: Any) -> Any:
    """Take run_dir=20240501, which is a number to Hydra, for text, and ~ for the home folder."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return os.path.expanduser(value) if isinstance(value, str) else value


IS_PATH = BeforeValidator(as_path)
Place = Annotated[str, IS_PATH]  # of files and folders


def format_value(value: Any) -> str:
    """Return a value as it is typed on a command line."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return options by their dotted names, as on a command line."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


class Options(BaseModel):
    """Base: no unknown keys, no silent conversions, no changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
