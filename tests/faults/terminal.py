"""What a command prints to goes away: a pipe's reader, a terminal, the room on a disk, and the session itself."""

import os
import signal
from typing import Any

from faults.harness import RICH, Command, Place, Trainer, newest, read_status, require, require_equal_runs

OPTIONS = (*RICH, "loader=torchvision", "train.epochs=2", "log.every_steps=1")


def outlast_the_terminal(place: Place) -> dict[str, Any]:
    """A pipe, terminal or disk behind the output that goes away costs a run nothing; SIGHUP saves; others end: 141."""
    whole = place.new_run()
    require(Trainer(place, whole, *OPTIONS).wait() == [0], f"{whole} ends well")
    kinds = ("terminal",) if place.fast else ("pipe", "terminal", "disk")
    for kind in kinds:
        run = place.new_run()
        trainer = Trainer(place, run, *OPTIONS, faults=[("loses_output", [kind, 0, 5])])
        require(trainer.wait() == [0], f"a run that loses its {kind} ends well: {read_status(run)}")
        require_equal_runs(whole, run)

    run = place.new_run()
    hung_up = Trainer(place, run, *OPTIONS, faults=place.pace)
    hung_up.wait_for("epoch 1/2, step 3/")
    os.kill(hung_up.processes[0].pid, signal.SIGHUP)
    require(hung_up.wait() == [75], f"SIGHUP saves: exit code 75\n{hung_up.output}")
    kept = Trainer(place, run, *OPTIONS, faults=[("ignores_hangup", []), *place.pace])
    kept.wait_for("epoch 2/2, step 2/")
    os.kill(kept.processes[0].pid, signal.SIGHUP)
    require(kept.wait() == [0], f"under nohup SIGHUP is nothing\n{kept.output}")
    require_equal_runs(whole, run)

    weights = (f"ckpt={newest(run)}", "device=cpu", "loader=torchvision", "loader.workers=1", "crop=32")
    calls: dict[str, list[str]] = {
        "table3": [],
        "predict": [*weights, f"images={place.data}/val"],
        "evaluate": [*weights, f"data.root={place.data}"],
        "data": ["check", f"data.root={place.data}"],
        "info": ["model=resnest14"],
    }
    calls = {"data": calls["data"]} if place.fast else calls
    for command, arguments in calls.items():
        left = Command(place, command, *arguments, faults=[("has_no_reader", [])])
        require(left.wait() == [128 + signal.SIGPIPE], f"{command} | head: {left.processes[0].exitcode}")
    return {"runs": len(kinds) + 1, "commands": len(calls)}
