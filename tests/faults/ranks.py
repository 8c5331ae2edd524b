"""Several ranks: one is asked to stop, dies, hangs, fails or computes nonsense; all of them act as one."""

import os
import re
import signal
import time
from typing import Any

from faults.harness import (
    RICH,
    Place,
    Torchrun,
    Trainer,
    find_difference,
    newest,
    read_metrics,
    read_status,
    require,
    require_equal_runs,
)
from resnest_imagenet.checkpoint import load_checkpoint

LONG = (*RICH, "loader=torchvision", "train.epochs=4", "log.every_steps=2")
DEATH = r"Signal 9 \(SIGKILL\)|exitcode: -9|died|no longer answers"  # what is printed of it first


def stop_when_asked(place: Place) -> dict[str, Any]:
    """A signal to a run, to torchrun or to one rank: all ranks save after the same step, exit code 75."""
    whole = place.new_run()
    require(Trainer(place, whole, *LONG, ranks=2).wait() == [0, 0], f"{whole} ends well")
    seconds = []

    def check(run_or: Trainer | Torchrun, run: Any, started: float) -> None:
        seconds.append(time.monotonic() - started)
        status = read_status(run)
        require((status["state"], status["exit_code"]) == ("stopped", 75), f"{status}\n{run_or.output}")
        step = load_checkpoint(newest(run))["step"]
        said = re.findall(r"rank \d stopped after step (\d+)", run_or.output)
        require(said and set(said) == {str(step)}, f"all ranks stop after step {step}:\n{run_or.output}")
        own = run_or.output.partition("/torch/distributed/run.py")[0]  # torchrun itself prints one traceback
        require(own.count("Traceback") == isinstance(run_or, Torchrun), run_or.output)

    report = ("says_where_it_stops", [])
    for name in ("SIGTERM",) if place.fast else ("SIGTERM", "SIGINT", "SIGUSR1"):
        run = place.new_run()
        alone = Trainer(place, run, *LONG, faults=[report, *place.pace])
        alone.wait_for("epoch 2/4, step 2/")
        started = time.monotonic()
        os.kill(alone.processes[0].pid, signal.Signals[name])
        require(alone.wait() == [75], f"{name} to a run: exit code 75\n{alone.output}")
        check(alone, run, started)

    run = place.new_run()
    # To one rank, the other learns of it: in training, and in the middle of an evaluation.
    both = Trainer(place, run, *LONG, ranks=2, faults=[report, ("gets_signal", ["SIGTERM", 1, 5])])
    require(both.wait() == [75, 75], f"SIGTERM to one rank: exit code 75 of both\n{both.output}")
    check(both, run, time.monotonic())
    require(load_checkpoint(newest(run))["step"] == 10, "the signal came in step 9, which was not about to be reported")
    seconds.pop()  # nobody saw the signal come
    require(Trainer(place, run, *LONG, ranks=2).wait() == [0, 0], f"{run} resumes")
    require_equal_runs(whole, run)

    if not place.fast:
        run = place.new_run()
        launched = Torchrun(place, run, *LONG, faults=[report])
        launched.wait_for("epoch 2/4, step 2/")
        started = time.monotonic()
        launched.process.terminate()
        require(launched.wait() == 1, "torchrun returns 1 whatever its ranks return")
        launched.count_seconds_until_gone(15)
        check(launched, run, started)
        require(Trainer(place, run, *LONG, ranks=2).wait() == [0, 0], f"{run} resumes")
        require_equal_runs(whole, run)

    run = place.new_run()
    hasty = Trainer(place, run, *LONG, faults=[("hangs", [1, 6])])
    hasty.wait_for("epoch 2/4, step 2/")
    os.kill(hasty.processes[0].pid, signal.SIGTERM)
    time.sleep(2.5)
    os.kill(hasty.processes[0].pid, signal.SIGTERM)
    require(hasty.wait() == [128 + signal.SIGTERM], f"a second signal leaves at once\n{hasty.output}")
    require(load_checkpoint(newest(run))["step"] == 6, "the checkpoint before is whole")
    return {"seconds_to_exit": [round(each, 1) for each in sorted(seconds)]}


def recover_from_death(place: Place) -> dict[str, Any]:
    """A rank dies under torchrun: with a restart the run ends bit for bit as without; else all end, and it is named."""
    options = (*RICH, "loader=dali", "checkpoint.every_steps=2")
    whole = place.new_run()
    require(Trainer(place, whole, *options, ranks=2).wait() == [0, 0], f"{whole} ends well")
    tries = 0 if place.fast else 10
    for number in range(tries):
        run = place.new_run()
        # It dies in the first or the second epoch.
        fault = ("killed", [number // 5, 4 + number % 2])
        launched = Torchrun(place, run, *options, restarts=1, faults=[fault])
        require(launched.wait() == 0, f"recovers, try {number + 1} of {tries}\n{launched.output}")
        require("resuming after step" in launched.output, f"does not start from scratch\n{launched.output}")
        require_equal_runs(whole, run)
    run = place.new_run()
    if place.fast:  # both at once: the first rank dies, and after the restart the second
        faults, faults_of_restart, death = [("killed", [0, 4])], [("killed", [0, 9])], f"(?s)resuming after.*({DEATH})"
        launched = Torchrun(place, run, *options, restarts=1, faults=faults, faults_of_restart=faults_of_restart)
        where = "computing the loss in batch 5 of epoch 1"
    else:
        launched, death = Torchrun(place, run, *options, "loader=torchvision", faults=[("killed", [0, 5])]), DEATH
        where = "computing the loss in batch 3 of epoch 1"
    launched.wait_for(death, 180)
    started = time.monotonic()
    require(launched.wait(30) == 1, "without restarts torchrun fails")
    launched.count_seconds_until_gone(15)
    seconds = time.monotonic() - started
    require(seconds < 15, f"everything is gone within 15 s, not {seconds:.0f}")
    require(
        re.search(r"rank +: 1 \(local_rank: 1\)\s+exitcode +: -9", launched.output),
        f"the dead rank is named\n{launched.output}",
    )
    summary = launched.output.partition("ChildFailedError")[2]
    require(f"rank 1 was killed by a signal, {where}" in summary, f"and where it was\n{launched.output}")
    status = read_status(run)
    require(
        status["exit_code"] == 7 and "rank 1 no longer answers" in status["error"], f"status.json names it: {status}"
    )
    again = Trainer(place, run, *options, ranks=2)
    require(again.wait() == [0, 0], f"{run} resumes\n{again.output}")
    line = f"WARNING: rank 1 of the last attempt ended without a message, {where}; its images: "
    require(again.output.count(line) == 1, f"the next start names its images\n{again.output}")
    if place.fast:
        require_equal_runs(whole, run)
    return {"recovered": tries, "of": tries, "seconds_until_all_gone": round(seconds, 1)}


def name_the_culprit(place: Place) -> dict[str, Any]:
    """A rank hangs: it is named after the timeout. A rank meets a bug: its cause is the last that is said."""
    timeout = 2 if place.fast else 4
    options = ("loader=dali", f"timeout_seconds={timeout}")
    run = place.new_run()
    both = Trainer(place, run, *options, ranks=2, faults=[("hangs", [0, 5])])
    both.wait_for("epoch 1/2, step 2/")
    started = time.monotonic()
    require(both.wait(30) == [7, 7], f"a rank hangs: exit code 7 of both\n{both.output}")
    seconds = time.monotonic() - started
    line = f"rank 1 hangs, computing the loss in batch 3 of epoch 1: no progress for {timeout} s"
    said = [text for text in both.output.splitlines() if text.startswith("resnest-train: ")]
    require(line in said[-1], f"the rank that hangs is named last\n{both.output}")
    status = read_status(run)
    require(status["exit_code"] == 7 and line in status["error"], f"status.json: {status}")
    if place.fast:
        return {"seconds_until_named": round(seconds, 1)}
    for name, arguments, text in (
        ("raises", [0, 5], "ValueError: a bug of rank 1"),
        ("raises", [0, 4], "ValueError: a bug of rank 0"),
        ("has_bad_loss", ["nan", 0, 5], "rank 1: loss or gradient not finite at step 3"),
    ):
        run = place.new_run()
        launched = Torchrun(place, run, "loader=dali", faults=[(name, arguments)])
        require(launched.wait() == 1, "torchrun fails")
        launched.count_seconds_until_gone(15)
        ranks, _, summary = launched.output.partition("torch.distributed.elastic.multiprocessing.errors.ChildFailed")
        lines = [line for line in ranks.splitlines() if not re.match(r"[WE]\d{4} |Traceback \(most recent", line)]
        spoken = [line for line in lines if line and not line.startswith(" ")]
        require(text in spoken[-1], f"the cause is the last line\n{launched.output}")
        require(text in summary, f"torchrun's summary repeats it\n{launched.output}")
        require(text.partition(": ")[2] in read_status(run)["error"], f"{read_status(run)}")
    return {"seconds_until_named": round(seconds, 1), "causes_named": 3}


def refuse_nonsense(place: Place) -> dict[str, Any]:
    """A loss or gradient that is not finite on one rank is applied on none; fp16's overflow lowers the scale."""
    cases = [("has_bad_loss", "nan"), ("has_bad_loss", "inf"), ("has_bad_gradient", "nan"), ("has_bad_gradient", "inf")]
    for name, value in cases[::3] if place.fast else cases:
        faults = [(name, [value, 0, 5])]
        run = place.new_run()
        both = Trainer(place, run, *RICH, "loader=dali", "checkpoint.every_steps=1", ranks=2, faults=faults)
        require(both.wait() == [5, 5], f"{name} {value}: exit code 5\n{both.output}")
        line = both.output.splitlines()[-1]
        require("rank 1: loss or gradient not finite at step 3, learning rate 0.0" in line, both.output)
        require(load_checkpoint(newest(run))["step"] == 2, "the last checkpoint is of the step before")
        require(read_status(run)["exit_code"] == 5, "status.json says the same")

        skipping = (*RICH, "loader=dali", "checkpoint.keep=20", "train.max_skipped_steps=1")
        run = place.new_run()
        both = Trainer(place, run, *skipping, "checkpoint.every_steps=1", ranks=2, faults=faults)
        require(both.wait() == [0, 0], f"{name} {value}: skipped\n{both.output}")
        before, after = (load_checkpoint(run / f"checkpoints/step-{step:09d}.pt") for step in (2, 3))
        for key in ("model", "ema", "optimizer"):
            same = all(_equal(before[key], after[key]))
            require(same, f"{name} {value}: a step that is skipped leaves {key} as it was")
        require(after["skipped"] == 1 and before["skipped"] == 0, "and is counted")
        require([e["ranks"] for e in read_metrics(run) if e["event"] == "skipped"] == [[1]], "and written")
        require(
            all(value.isfinite().all() for value in load_checkpoint(newest(run))["model"].values()), "no trace is left"
        )
    # There the host learned of each step at once, for the checkpoint; here while the next one is computed.
    late = place.new_run()
    require(Trainer(place, late, *skipping, ranks=2, faults=faults).wait() == [0, 0], f"{late} ends well")
    contents = [{**load_checkpoint(newest(each)), "config": None} for each in (run, late)]
    difference = find_difference(*contents)
    require(difference is None, f"it makes a difference when the host learns of it: {difference}")
    require(read_metrics(run) == read_metrics(late), f"the metrics of {run} and {late} differ")
    run = place.new_run()
    options = ("train.precision=fp16", "loader=dali", "checkpoint.every_steps=1", "checkpoint.keep=20")
    both = Trainer(
        place,
        run,
        *options,
        "train.epochs=1",
        "train.warmup_epochs=0",
        ranks=2,
        faults=[("has_bad_gradient", ["inf", 0, 5])],
    )
    require(both.wait(300) == [0, 0], f"fp16's overflow is no failure\n{both.output}")
    before, after = (load_checkpoint(run / f"checkpoints/step-{step:09d}.pt") for step in (2, 3))
    require(after["scaler"]["scale"] == before["scaler"]["scale"] / 2, "the scale is halved")
    weights = [name for name in before["model"] if not re.search(r"running|num_batches", name)]
    require(all(before["model"][name].equal(after["model"][name]) for name in weights), "the step is applied nowhere")
    return {"cases": (2 if place.fast else len(cases)) + 1}


def _equal(one: Any, other: Any) -> list[bool]:
    """Compare the tensors of nested containers."""
    if isinstance(one, dict):
        return [same for key in one for same in _equal(one[key], other[key])]
    if isinstance(one, list):
        return [same for a, b in zip(one, other, strict=True) for same in _equal(a, b)]
    return [one.equal(other)] if hasattr(one, "equal") else []
