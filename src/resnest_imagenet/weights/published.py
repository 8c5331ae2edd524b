"""Published weights by name: downloaded once, verified each time."""

import hashlib
import re
import socket
import sys
from http.client import HTTPException
from pathlib import Path

import torch

from resnest_imagenet.errors import CheckpointError, ConfigError, first_line, suggest
from resnest_imagenet.files import file_lock
from resnest_imagenet.models.zoo import ARCHITECTURES, TIMM_RESNESTS, PeerSpec
from resnest_imagenet.weights.sources import OFFICIAL, require_known

MIRRORS = (
    "https://github.com/zhanghang1989/ResNeSt/releases/download/weights_step1",
    "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-resnest",
)
SILENCE = 30.0  # seconds without data after which the next mirror is tried


def fetch(source: str) -> tuple[Path, str]:
    """Return the local file of published weights and the name of their network (in models/zoo.py's names).

    Args:
        source: official:NAME (`OFFICIAL`), kept in torch.hub's folder, or timm:NAME (a pretrained name of timm's such
            as resnet50.tv_in1k), kept in the Hugging Face cache. Several processes may call this at once.

    Raises:
        ConfigError: the source or name is unknown.
        CheckpointError: the file is not in the cache and cannot be downloaded, or all copies are damaged.
    """
    kind, _, name = source.partition(":")
    if kind == "timm":
        network = find_by_timm_name(name)
        return _fetch_timm(name, network), network
    require_known(source)
    return _fetch_official(name), name


def find_by_timm_name(name: str) -> str:
    """Return the network of weights that timm publishes, such as resnest50 for resnest50d.in1k.

    Raises:
        ConfigError: timm has no such weights for a network of the zoo, or they need another normalisation than
            ImageNet's.
    """
    from timm import get_pretrained_cfg, list_pretrained
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    networks = {timm_name: network for network, timm_name in TIMM_RESNESTS.items()}
    peers = {name: spec for name, spec in ARCHITECTURES.items() if isinstance(spec, PeerSpec)}
    networks |= {spec.timm_name: network for network, spec in peers.items() if not spec.strides_first}
    valid = [weights for weights in list_pretrained() if weights.partition(".")[0] in networks]
    if name not in valid:
        raise ConfigError(f"unknown timm weights {name!r}{suggest(name, valid)}")
    expected = get_pretrained_cfg(name)
    # In timm 1.0.31 this is resnet50d.ra4_e3600_r224_in1k.
    if (expected.mean, expected.std) != (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD):
        raise ConfigError(
            f"timm weights {name!r} need pixels of mean {expected.mean} and std {expected.std}, not ImageNet's"
        )
    return networks[name.partition(".")[0]]


def find_timm_test(name: str) -> tuple[int, float, str]:
    """Return how timm tests its own weights: crop in pixels, its ratio to the short side, and the interpolation."""
    from timm import get_pretrained_cfg

    config = get_pretrained_cfg(name)
    size = config.test_input_size or config.input_size
    return size[-1], config.test_crop_pct or config.crop_pct, config.interpolation


def _fetch_official(name: str) -> Path:
    file = f"{name}-{OFFICIAL[name][:8]}.pth"
    path = Path(torch.hub.get_dir(), "checkpoints", file)
    failures = []
    try:
        if _has_sha256(path, OFFICIAL[name]):  # before the lock: the cache may be read-only
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(path.with_name(f".{file}.lock"), timeout=-1):  # the other ranks wait for the first one's file
            if _has_sha256(path, OFFICIAL[name]):
                return path
            if path.exists():
                _report_damaged(path)
            for mirror in MIRRORS:
                try:
                    _download(f"{mirror}/{file}", path, OFFICIAL[name])
                    return path
                except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: torch.hub's for a wrong hash
                    failures.append(first_line(error))
    except OSError as error:
        failures.append(first_line(error))
    why = "; ".join(dict.fromkeys(failures))
    raise CheckpointError(f"official:{name} not fetched ({why}): put {MIRRORS[0]}/{file} by hand at {path}")


def _download(url: str, path: Path, sha256: str) -> None:
    # torch.hub sets no timeout, and without one it would wait for a silent mirror forever.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=sys.stderr.isatty())
    finally:
        socket.setdefaulttimeout(before)


def _fetch_timm(name: str, network: str) -> Path:
    from huggingface_hub import hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # it warns of each retry: one line about the last failure is enough
    place = f"timm/{name}", "model.safetensors"
    cause = None
    try:
        path = Path(hf_hub_download(*place))
        if _is_sound(path):
            return path
        _report_damaged(path)
        # Replace it, do not delete it: other ranks may be about to open it.
        path = Path(hf_hub_download(*place, force_download=True))
        if _is_sound(path):
            return path
        failure = f"{path} differs from its SHA-256 again"
    # Transport raises HTTPError, hf_xet may raise RuntimeError, and a forced download raises ValueError when offline.
    except (OSError, HTTPError, RuntimeError, ValueError) as error:
        cause = error
        failure = first_line(error.__cause__ or error)
    raise CheckpointError(
        f"timm:{name} not fetched ({failure}): {hf_hub_url(*place)}; set HF_HOME to a cache that has it, "
        f"or give ckpt=FILE model={network}"
    ) from cause


def _is_sound(path: Path) -> bool:
    # A snapshot's file links to a blob that is named by its SHA-256. Follow one link only: the blob may link to a store
    # with other names. A cache without links has no SHA-256 to compare with.
    name = path.readlink().name if path.is_symlink() else ""
    return not re.fullmatch("[0-9a-f]{64}", name) or _has_sha256(path, name)


def _has_sha256(path: Path, expected: str) -> bool:
    """Return whether the file exists and its SHA-256 starts with the expected hexadecimal digits."""
    if not path.is_file():
        return False
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest().startswith(expected)


def _report_damaged(path: Path) -> None:
    print(f"{path}: damaged (it differs from its SHA-256), fetching it again", file=sys.stderr, flush=True)
