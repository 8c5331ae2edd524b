"""Checks on a CPU whether a step fits into memory: otherwise the system would kill the run without a message."""

import sys
from pathlib import Path

import torch

from resnest_imagenet import distributed
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.tasks.task import Task

# Files of a control group: its limit, its use, and the prefix of the names in memory.stat.
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_VERSION_2 = ("memory.max", "memory.current", "")
_SURE, PEAK = 0.9, 1.5  # a step's sure use, and its use at the peak, as multiples of the bytes kept


def require_memory(task: Task, device: torch.device) -> None:
    """Compare the memory that the steps of this node's ranks need with the free memory; warn if it is close.

    This takes seconds, but only if a step may come near to the free memory. A GPU's own error is clear.

    Raises:
        ConfigError: it cannot fit.
    """
    if distributed.launched_as().local_rank > 0:  # the first rank of a node counts for all its ranks
        return
    batch_size, num_ranks = task.config.train.batch_size, distributed.count_local_ranks()
    free = None if device.type == "cuda" else count_free_bytes()
    if free is None:
        return
    kept = num_ranks * task.count_kept_bytes(device, enough=free / num_ranks / PEAK)
    if PEAK * kept < free:
        return
    is_sure = _SURE * kept > free
    sizes = [size for size in range(2, batch_size) if batch_size % size == 0]
    fitting = [size for size in sizes if PEAK * kept * size / batch_size < free]
    hint = f": train.batch_size={fitting[-1]} fits, and train.global_batch keeps the step as it is" if fitting else ""
    line = (
        f"train.batch_size={batch_size} of {task.config.model.name} needs "
        f"{(_SURE if is_sure else PEAK) * kept / 1e9:.1f} GB {'or more ' * is_sure}for {num_ranks} rank"
        f"{'s' * (num_ranks > 1)} on this machine, of which {free / 1e9:.1f} GB are free{hint}"
    )
    if is_sure:
        raise ConfigError(line)
    if distributed.launched_as().rank == 0:
        print(f"WARNING: {line}", file=sys.stderr, flush=True)


def count_free_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the memory that this process may still take, including swap; None if the system does not show it.

    It is the smallest of the machine's free memory and what the control groups of this process (of a container or a
    batch system) leave; cached files count as free.

    Args:
        proc: the kernel's folder of processes.
        cgroups: the mount point of control groups.
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
            rooms += [
                _count_room(group, mounted) for group in (folder, *folder.parents) if group.is_relative_to(mounted)
            ]
    return min(rooms) + swap


def _count_room(folder: Path, mounted: Path) -> int:
    """Return the bytes that a control group leaves; cached files count as free."""
    limit, usage, prefix = _VERSION_1 if mounted.name == "memory" else _VERSION_2
    try:
        cached = _read_numbers(folder / "memory.stat")
        reclaimable = cached[f"{prefix}inactive_file"] + cached[f"{prefix}active_file"]
        return int((folder / limit).read_text()) - int((folder / usage).read_text()) + reclaimable
    except (OSError, ValueError, KeyError):  # there is no limit ("max"), or a container does not show it
        return sys.maxsize


def _read_numbers(path: Path) -> dict[str, int]:
    """Return the numbers of a file of names and numbers."""
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines()) if len(words) > 1}
