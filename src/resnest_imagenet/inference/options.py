"""Checks the arguments of the library's functions by the rules of the commands' options."""

from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from os import PathLike
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError

from resnest_imagenet.config_reading import OwnProtocolOptions
from resnest_imagenet.errors import ConfigError, suggest
from resnest_imagenet.options import Crop, Fraction, Layer, Options, Positive, Precision, Tta


def _as_integer(value: Any) -> Any:
    """Turn NumPy's integers into Python's."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _as_crops(value: Any) -> Any:
    """Turn one crop into a list of one."""
    is_several = isinstance(value, Iterable) and not isinstance(value, str)
    return [_as_integer(crop) for crop in (value if is_several else [value])]


def _fill_protocol(value: Any) -> Any:
    """Set the options that are missing to the network's own."""
    return dict.fromkeys(OwnProtocolOptions.model_fields, "own") | dict(value) if isinstance(value, Mapping) else value


_INTEGER = BeforeValidator(_as_integer)


class Arguments(Options):
    """The arguments that functions share; each function checks its own. The defaults only fill the others."""

    crop: Annotated[list[Crop], Field(min_length=1), BeforeValidator(_as_crops)] | None = None
    protocol: Annotated[OwnProtocolOptions, BeforeValidator(_fill_protocol)] | None = None
    top: Annotated[Positive, _INTEGER] = 1
    batch_size: Annotated[Positive, _INTEGER] = 1
    score: Fraction = 0.5
    precision: Precision = "fp32"
    tta: Tta = None
    layer: Layer = "layer4"
    loader: Literal["auto", "dali", "torchvision"] = "auto"
    workers: Annotated[int, Field(ge=0), _INTEGER] | None = None

    @property
    def changes(self) -> dict[str, Any]:
        """The changes to the network's own protocol, by the names of `EvalTransform`."""
        return self.protocol.list_changes() if self.protocol else {}


def check_arguments(**arguments: Any) -> Arguments:
    """Return arguments in the form of the commands' options.

    Args:
        **arguments: of a library function, by the names of `Arguments`.

    Raises:
        ConfigError: a value is not valid; names the first, and the valid values.
    """
    try:
        return Arguments(**arguments)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(part for part in first["loc"] if isinstance(part, str))  # without the place in a list
        if first["type"] == "extra_forbidden":
            valid = list(OwnProtocolOptions.model_fields)
            raise ConfigError(f"unknown {name}{suggest(str(first['loc'][-1]), valid)} ({', '.join(valid)})") from None
        raise ConfigError(f"{name}={first['input']!r}: {first['msg'].lower()}") from None


Network = TypeVar("Network")


def take_network(
    network: Network | str | PathLike[str], kind: type[Network], open_network: Callable[[str | PathLike[str]], Network]
) -> Network:
    """Return a library function's argument as a network; a source of one is opened.

    Args:
        network: a network of this kind, or a source of one.
        kind: the type that the function takes.
        open_network: opens a source.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(network, kind):
        return network
    if not isinstance(network, str | PathLike):
        raise ConfigError(
            f"the network is a {type(network).__name__}: give what {open_network.__name__}(...) returns, or a "
            "checkpoint's path"
        )
    return open_network(network)
