"""What a source of weights stands for: a published name, a file or a folder. Needs no torch, which is slow."""

import os
import re
from os import PathLike, fspath
from pathlib import Path

from resnest_imagenet.errors import CheckpointError, ConfigError, suggest

# SHA-256 of the official files: whole where it is known, else the 8 digits in the file's name.
OFFICIAL: dict[str, str] = {
    "resnest50": "528c19ca6509420548c8359f63ff37975e7d92f42eaf72a7af152a015c8ef48c",
    "resnest101": "22405ba7",
    "resnest200": "75117900",
    "resnest269": "0cc87c48",
    "resnest50_fast_1s1x64d": "d8fbf808",
    "resnest50_fast_2s1x64d": "44938639",
    "resnest50_fast_4s1x64d": "f74f3fc3",
    "resnest50_fast_1s2x40d": "32830b84",
    "resnest50_fast_2s2x40d": "9d126481",
    "resnest50_fast_4s2x40d": "41d14ed0",
    "resnest50_fast_1s4x24d": "d4a4f76f",
}
SETTINGS = "config.json"  # of a folder that describes its weights
BEST = Path("checkpoints", "best.pt")  # of a run folder
SUFFIXES = (".pt", ".pth", ".safetensors", ".pkl")  # of files of weights, where a name is to be recognised


def is_published(source: str) -> bool:
    """Return whether a source is a published name, or a misspelt one: no file, and like no path."""
    return re.match(r"\w\w+:", source) is not None and not Path(source).exists()


def require_known(source: str) -> None:
    """Raise a ConfigError for a published name that is not official:NAME or timm:NAME; timm alone has timm's names."""
    kind, _, name = source.partition(":")
    if kind != "timm" and (kind != "official" or name not in OFFICIAL):
        valid = [f"official:{network}" for network in OFFICIAL]
        raise ConfigError(f"unknown weights {source!r}, neither official:NAME nor timm:NAME{suggest(source, valid)}")


def is_described(path: Path) -> bool:
    """Return whether a path is a folder with settings: of this project's format=hub, or another's."""
    return (path / SETTINGS).is_file()


def find_weights(source: str | PathLike[str]) -> Path:
    """Return the file of weights, or the folder that describes them.

    Args:
        source: that file or folder, or a run folder, which stands for its best checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(source)
    if is_described(path):
        return path
    if path.is_dir():
        return _find_best(path)
    if _is_missing(path):
        raise CheckpointError(f"{path}: no such checkpoint{_advise(path)}")
    return path


def _find_best(folder: Path) -> Path:
    """Return the best checkpoint of a run folder, or of the folder of its checkpoints."""
    for best in (folder / BEST, folder / BEST.name):
        if best.is_file():
            return best
    saved = sorted(folder.glob("checkpoints/step-*.pt"))
    if saved:
        raise CheckpointError(f"{folder}: a run without {BEST}, which an evaluation writes: give {saved[-1]}")
    raise CheckpointError(f"{folder}: no checkpoint in it: give a file of weights, or a run folder with {BEST}")


def _is_missing(path: Path) -> bool:
    """Return whether there is nothing; of what cannot be told, reading it tells more."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _advise(path: Path) -> str:
    """Return the end of a line about a file that is not there: what may be meant."""
    if fspath(path) in OFFICIAL:
        return f"; did you mean official:{path}?"
    try:
        names = [name for name in os.listdir(path.parent) if name.endswith(SUFFIXES)]
    except OSError:
        return ""
    return suggest(path.name, names)
