"""Whether a step fits into this machine's memory, where the system would end the run without a line: on a CPU."""

import sys
from pathlib import Path

import torch

from resnest_imagenet import distributed
from resnest_imagenet.compute import autocast
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.models.cost import count_kept

_BYTES_PER_PIXEL = 10_000  # more than any network keeps of a pixel of its input; resnest269 7,500, resnest50 2,100
# Files of a control group: its limit, its use, and what stands before the names in memory.stat.
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_VERSION_2 = ("memory.max", "memory.current", "")
_SURE, _LIKELY = 0.9, 1.5  # of what is kept: what a step surely takes, and what it takes at its peak


def require_memory(config: TrainConfig, device: torch.device) -> None:
    """Compare what the steps of this node's ranks need with what is free; warn where it is close.

    Seconds, and only where a step may come near to what is free. A GPU's own error says as much.

    Raises:
        ConfigError: it cannot fit.
    """
    if distributed.launched_as()[1] > 0:  # the first rank of a node counts for all of it: one verdict, one line
        return
    recipe, num_ranks = config.train, distributed.count_local_ranks()
    free = None if device.type == "cuda" else count_free_bytes()
    if free is None or num_ranks * recipe.batch_size * recipe.crop**2 * _BYTES_PER_PIXEL < free:
        return
    with autocast(device, recipe.precision):
        kept = num_ranks * count_kept(config.model.name, recipe.crop, recipe.batch_size)
    if _LIKELY * kept < free:
        return
    is_sure = _SURE * kept > free
    sizes = [size for size in range(2, recipe.batch_size) if recipe.batch_size % size == 0]
    fitting = [size for size in sizes if _LIKELY * kept * size / recipe.batch_size < free]
    hint = f": train.batch_size={fitting[-1]} fits, and train.global_batch keeps the step as it is" if fitting else ""
    line = (
        f"train.batch_size={recipe.batch_size} of {config.model.name} at {recipe.crop} pixels needs "
        f"{(_SURE if is_sure else _LIKELY) * kept / 1e9:.1f} GB {'or more ' * is_sure}for {num_ranks} rank"
        f"{'s' * (num_ranks > 1)} on this machine, of which {free / 1e9:.1f} GB are free{hint}"
    )
    if is_sure:
        raise ConfigError(line)
    if distributed.launched_as()[0] == 0:
        print(f"WARNING: {line}", file=sys.stderr, flush=True)


def count_free_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the memory that this process may still take, swap included; None where the system does not say.

    The least of what the machine has and of what the control groups around this process leave (a container's limit, a
    batch system's), of which cached files count as free.

    Args:
        proc: where the kernel tells of processes.
        cgroups: where control groups are mounted.
    """
    try:
        meminfo = _read_numbers(proc / "meminfo")
        memory, swap = 1024 * meminfo["MemAvailable:"], 1024 * meminfo.get("SwapFree:", 0)
        lines = (proc / "self/cgroup").read_text().splitlines()
    except (OSError, KeyError):
        return None
    rooms = [memory]
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers in ("", "memory"):
            mounted = cgroups / controllers
            folder = mounted / path.lstrip("/")
            rooms += [_count_room(each, mounted) for each in (folder, *folder.parents) if each.is_relative_to(mounted)]
    return min(rooms) + swap


def _count_room(folder: Path, mounted: Path) -> int:
    """Return what a control group leaves, cached files included."""
    limit, usage, prefix = _VERSION_1 if mounted.name == "memory" else _VERSION_2
    try:
        cached = _read_numbers(folder / "memory.stat")
        reclaimable = cached[f"{prefix}inactive_file"] + cached[f"{prefix}active_file"]
        return int((folder / limit).read_text()) - int((folder / usage).read_text()) + reclaimable
    except (OSError, ValueError, KeyError):  # no limit ("max"), or not seen from within a container
        return sys.maxsize


def _read_numbers(path: Path) -> dict[str, int]:
    """Return the numbers of a file of names and numbers."""
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines()) if len(words) > 1}
