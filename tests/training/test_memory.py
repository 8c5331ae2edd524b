from pathlib import Path

import pytest
import torch

from conftest import CPU, LAUNCHED
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.models.cost import count_kept
from resnest_imagenet.tasks.choice import open_task
from resnest_imagenet.training import memory
from resnest_imagenet.training.memory import count_free_bytes, require_memory


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


MEMINFO = "MemTotal: 9000 kB\nMemAvailable: 8000 kB\nSwapFree: 100 kB\n"
SWAP = 100 * 1024


@pytest.mark.parametrize(
    ("cgroup", "files", "free"),
    [
        ("0::/\n", {}, 8000 * 1024),
        (
            "0::/\n",
            {"memory.max": "max", "memory.current": "5", "memory.stat": "inactive_file 1\nactive_file 2"},
            8192000,
        ),
        # The limit of an outer group holds too.
        (
            "1:cpuset:/\n0::/job/step\n",
            {
                "job/memory.max": "5000",
                "job/memory.current": "1000",
                "job/memory.stat": "anon 3\ninactive_file 30\nactive_file 4\n",
                "job/step/memory.max": "max",
            },
            4034,
        ),
        (
            "5:memory:/docker/abc\n",  # the path is the host's, and not seen from within
            {
                "memory/memory.limit_in_bytes": "7000",
                "memory/memory.usage_in_bytes": "2000",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 5\ntotal_active_file 6\n",
            },
            5011,
        ),
    ],
)
def test_the_least_of_what_machine_and_control_groups_leave(cgroup, files, free, tmp_path):
    write(tmp_path / "proc", {"meminfo": MEMINFO, "self/cgroup": cgroup})
    write(tmp_path / "cgroup", files)
    assert count_free_bytes(tmp_path / "proc", tmp_path / "cgroup") == free + SWAP


def test_this_machine_says_what_is_free(tmp_path):
    assert 10**8 < (count_free_bytes() or 0) < 10**14
    assert count_free_bytes(tmp_path) is None


@pytest.mark.slow
def test_a_step_that_cannot_fit_is_refused_with_what_would(small_run, monkeypatch, capsys):
    task = open_task(small_run("train.batch_size=64"))
    kept = count_kept("resnest14_half", 32, 64)
    free = 0
    monkeypatch.setattr(memory, "count_free_bytes", lambda: free)
    free = int(kept * 0.8)
    message = r"^train.batch_size=64 of resnest14_half needs .* GB or more for 1 rank .*train.batch_size=32 fits"
    with pytest.raises(ConfigError, match=message):
        require_memory(task, CPU)
    with monkeypatch.context() as launched:
        for name, value in {**LAUNCHED, "LOCAL_WORLD_SIZE": "4"}.items():
            launched.setenv(name, value)
        with pytest.raises(ConfigError, match=r"for 4 ranks on this machine, .*: train.batch_size=8 fits"):
            require_memory(task, CPU)
        launched.setenv("RANK", "1")
        launched.setenv("LOCAL_RANK", "1")
        require_memory(task, CPU)  # the first rank of the machine has said it
    free = int(kept * 1.2)
    require_memory(task, CPU)
    assert capsys.readouterr().err.startswith("WARNING: train.batch_size=64 of resnest14_half needs ")
    free = int(kept * 2)
    require_memory(task, CPU)
    free = 0
    require_memory(task, torch.device("cuda"))
    assert capsys.readouterr().err == ""
