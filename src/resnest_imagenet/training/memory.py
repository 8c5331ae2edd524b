"""Whether a step fits into this machine's memory, where the system would end the run without a line: on a CPU."""

import sys
from pathlib import Path

import torch

from resnest_imagenet import distributed
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.tasks.task import Task

# Files of a control group: its limit, its use, and what stands before the names in memory.stat.
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_VERSION_2 = ("memory.max", "memory.current", "")
_SURE, PEAK = 0.9, 1.5  # of what is kept: what a step surely takes, and what it takes at its peak


def require_memory(task: Task, device: torch.device) -> None:
    """Compare what the steps of this node's ranks need with what is free; warn where it is close.

    Seconds, and only where a step may come near to what is free. A GPU's own error says as much.

    Raises:
        ConfigError: it cannot fit.
    """
    if distributed.launched_as().local_rank > 0:  # the first rank of a node counts for all of it: one verdict, one line
        return
    batch_size, num_ranks = task.config.train.batch_size, distributed.count_local_ranks()
    free = None if device.type == "cuda" else count_free_bytes()
    if free is None:
        return
    kept = num_ranks * task.count_kept_bytes(enough=free / num_ranks / PEAK)
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
    """Return the memory that this process may still take, swap included; None where the system does not show it.

    The least of what the machine has and of what the control groups around this process leave (a container's limit, a
    batch system's), of which cached files count as free.

    Args:
        proc: where the kernel shows processes.
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
            rooms += [
                _count_room(group, mounted) for group in (folder, *folder.parents) if group.is_relative_to(mounted)
            ]
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
