"""Ranks that are frozen, as by SIGSTOP or a suspended machine, for longer than timeout_seconds."""

import os
import signal
import time
from typing import Any

from faults.harness import RICH, Place, Trainer, read_status, require, require_equal_runs

OPTIONS = (*RICH, "loader=torchvision", "train.epochs=4", "log.every_steps=2")


def outlast_a_freeze(place: Place) -> dict[str, Any]:
    """Ranks frozen for longer than timeout_seconds run again and finish bit for bit; one that stays frozen is named."""
    timeout = 2 if place.fast else 4
    options = (*OPTIONS, f"timeout_seconds={timeout}")
    whole = place.new_run()
    require(Trainer(place, whole, *options, ranks=2).wait() == [0, 0], f"{whole} ends well")
    freezes = [(0, 1)] if place.fast else [(0, 1), (0,), (1,)]
    for ranks in freezes:
        run = place.new_run()
        both = Trainer(place, run, *options, ranks=2, faults=place.pace)
        both.wait_for("epoch 2/4, step 2/")
        _send(both, ranks, signal.SIGSTOP)
        # All for as long as they like; of one the others wait a few seconds more.
        time.sleep(2.5 * timeout if len(ranks) == 2 else timeout + 2.5)
        _send(both, ranks, signal.SIGCONT)
        require(both.wait() == [0, 0], f"ranks {ranks} were frozen and run again\n{both.output}")
        require("hangs" not in both.output, both.output)
        require_equal_runs(whole, run)
    if place.fast:
        return {"frozen": len(freezes)}
    run = place.new_run()
    both = Trainer(place, run, *options, ranks=2)
    both.wait_for("epoch 2/4, step 2/")
    _send(both, [1], signal.SIGSTOP)
    started = time.monotonic()
    line = "rank 1 hangs, "
    both.wait_for(line, 30)
    seconds = time.monotonic() - started
    both.processes[0].join(10)
    require(both.processes[0].exitcode == 7, f"rank 0 ends with 7\n{both.output}")
    require(line in read_status(run)["error"], f"{read_status(run)}")
    both.kill()
    return {"frozen": len(freezes), "seconds_until_named": round(seconds, 1)}


def _send(trainer: Trainer, ranks: Any, number: signal.Signals) -> None:
    for rank in ranks:
        os.kill(trainer.processes[rank].pid, number)
