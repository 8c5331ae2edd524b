"""What --version prints."""

import platform
from importlib.metadata import PackageNotFoundError, version

import resnest_imagenet

PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "DALI": "nvidia-dali-cuda130",
    "timm": "timm",
}


def asks_for_version(words: list[str]) -> bool:
    """Return whether a command line asks for the versions."""
    return bool({"--version", "-V"} & set(words))


def format_versions() -> str:
    """Return a line with the versions of this project and of what its figures depend on; nothing is imported for it."""
    versions = [f"{title} {_find_version(package)}" for title, package in PACKAGES.items()]
    return ", ".join(
        [f"resnest-imagenet {resnest_imagenet.__version__}", *versions, f"Python {platform.python_version()}"]
    )


def _find_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
