"""Files that are meant to do harm: nothing in them is executed, and nothing is written where they point to."""

import io
import itertools
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate

from faults.harness import (
    LOADERS,
    Claims,
    Command,
    Place,
    Trainer,
    call,
    encode,
    newest,
    require,
    require_equal_runs,
)
from resnest_imagenet.checkpoint import load_checkpoint, save_checkpoint
from resnest_imagenet.data import prepare

Member = tuple[str | tarfile.TarInfo, bytes]


class Bait:
    """Calls something when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._reduced = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._reduced


@dataclass(frozen=True)
class Canary:
    """A file that a trap makes where it goes off."""

    path: Path

    def try_trap(self, careless: Callable[[], Any], what: str) -> None:
        """Let it go off once: a trap that does not work would prove nothing."""
        with suppress(Exception):
            careless()
        require(self.path.exists(), f"{what} is a trap")
        self.path.unlink()


def refuse_code(place: Place) -> dict[str, Any]:
    """Checkpoints, configurations, archives and shards execute nothing, and write nothing where they point to."""
    claims, canary = Claims(), Canary(place.folder / "canary")
    run = place.new_run()
    trainer = Trainer(place, run, "loader=dali")
    require(trainer.wait() == [0], f"{run} ends well:\n{trainer.output}")
    traps = _write_traps(place.folder / "traps", load_checkpoint(newest(run)), canary)
    _offer_to_commands(place, claims, traps)
    claims.add(not canary.path.exists(), "a checkpoint was executed")
    of_each_kind = {trap.name.partition("-")[0]: trap for trap in traps if trap.suffix == ".pt"}
    _offer_to_runs(place, claims, run, list(of_each_kind.values()), canary)
    _offer_configuration(place, claims, run, canary)
    num_archives = _offer_archives(place, claims)
    num_shards = _offer_shards(place, claims, canary)
    claims.add(not canary.path.exists(), "a configuration or a shard was executed")
    claims.require()
    return {"checkpoints": len(traps), "archives": num_archives, "shards": num_shards, "claims": claims.number}


def _write_traps(folder: Path, checkpoint: dict[str, Any], canary: Canary) -> list[Path]:
    """Write checkpoints that execute something where they are read carelessly."""
    folder.mkdir()
    path = str(canary.path)
    baits = [Bait(open, path, "w"), Bait(os.system, f"touch '{path}'"), Bait(exec, f"open({path!r}, 'w')")]
    contents = [{"model": baits[0]}, {**checkpoint, "more": baits[1]}, {**checkpoint, "step": baits[2]}]
    made = []
    for number, (content, kind) in enumerate(itertools.product(contents, ("zip", "legacy"))):
        made.append(folder / f"{kind}-{number}.pt")
        torch.save(content, made[-1], _use_new_zipfile_serialization=kind == "zip")
    for protocol, bait in zip((0, 2, 5), baits, strict=True):
        made.append(folder / f"pickle-{protocol}.pt")
        made[-1].write_bytes(pickle.dumps({"model": bait}, protocol))
    made.append(folder / "tar.pt")  # of torch before 0.1.10
    _write_tar(made[-1], [(name, pickle.dumps(baits[0], 2)) for name in ("storages", "tensors", "pickle")])
    made.append(folder / "script.pt")  # a zip that says it is TorchScript's
    shutil.copy(made[0], made[-1])
    with zipfile.ZipFile(made[-1], "a") as archive:
        archive.writestr(f"{made[0].stem}/constants.pkl", pickle.dumps(baits[0], 2))
    made.append(folder / "pickle.safetensors")
    made[-1].write_bytes(pickle.dumps({"model": baits[0]}))
    for trap in made[:-2]:
        is_pickle = trap.name.startswith("pickle")
        load = partial(torch.load, trap, weights_only=False)
        canary.try_trap(partial(pickle.loads, trap.read_bytes()) if is_pickle else load, trap.name)
    return made


def _offer_to_commands(place: Place, claims: Claims, traps: list[Path]) -> None:
    data, out = f"data.root={place.data} loader=torchvision loader.workers=0", place.folder / "exported.pth"
    calls = {
        (command, trap): f"{command} ckpt={trap} {options}"
        for trap in traps
        for command, options in (("evaluate", data), ("export", f"out={out} format=pth"))
    }
    for (command, trap), (code, lines) in zip(calls, call(place, *calls.values()), strict=True):
        is_line = len(lines) == 1 and lines[0].startswith(f"resnest-{command}: {trap}: ")
        claims.add(code == 4 and is_line, f"{command} ckpt={trap.name}: exit code {code}, {lines}")
    claims.add(not out.exists(), "a trap is exported")


def _offer_to_runs(place: Place, claims: Claims, whole: Path, traps: list[Path], canary: Canary) -> None:
    """Start from a trap; and resume where one is the newest checkpoint: it counts as damaged."""
    bitten, alone = place.new_run(), place.new_run()
    shutil.copytree(whole, bitten)
    last = newest(bitten)
    for trap in traps:
        starting = Trainer(place, place.new_run(), f"train.init_from={trap}", "loader=dali")
        last.unlink()
        shutil.copy(trap, last)
        resuming = Trainer(place, bitten, "loader=dali")
        codes, lines = starting.wait(), starting.output.splitlines()
        is_line = len(lines) == 1 and lines[0].startswith(f"resnest-train: {trap}: ")
        claims.add(codes == [4] and is_line, f"train.init_from={trap.name}: {codes} {lines}")
        require(resuming.wait() == [0], f"a run resumes in spite of {trap.name}:\n{resuming.output}")
        damaged = last.with_name(f"{last.name}.damaged")
        claims.add(damaged.read_bytes() == trap.read_bytes(), f"{trap.name} in a run: does not count as damaged")
        damaged.unlink()
        lines = resuming.lines
        is_said = lines[0].startswith(f"WARNING: {last}: ") and lines[1].startswith("resuming after step 6, ")
        claims.add(is_said, f"{trap.name} in a run: {lines[:2]}")
        require_equal_runs(whole, bitten)
        claims.add(not canary.path.exists(), f"{trap.name} in a run: was executed")
    (alone / "checkpoints").mkdir(parents=True)
    shutil.copy(traps[0], alone / "checkpoints" / last.name)
    trainer = Trainer(place, alone, "loader=dali")
    claims.add(trainer.wait() == [4], f"{traps[0].name} alone in a run:\n{trainer.output}")


def _offer_configuration(place: Place, claims: Claims, run: Path, canary: Canary) -> None:
    """Put what Hydra would instantiate into good checkpoints: it stays text."""
    trap = {"_target_": "builtins.open", "_args_": [str(canary.path), "w"]}
    canary.try_trap(partial(instantiate, trap), "a configuration")
    copy = place.new_run()
    shutil.copytree(run, copy)
    newest(copy).unlink()
    good = newest(copy)
    content = load_checkpoint(good)
    for part in (content["config"], *content["config"].values()):
        if isinstance(part, dict):
            part.update(trap)
    content["config"]["train"]["recipe"] = "${oc.env:HOME}"
    path = place.folder / "instantiates.pt"
    save_checkpoint(content, path)
    evaluation = f"data.root={place.data} loader=torchvision loader.workers=0 crop=32"
    out, exported = place.folder / "instantiates.json", place.folder / "exported.safetensors"
    one, other = call(place, f"evaluate ckpt={good} {evaluation}", f"evaluate ckpt={path} {evaluation} out={out}")
    claims.add(one == other and one[0] == 0, f"_target_ in a configuration: {one}, {other}")
    answers = call(place, f"table3 results={out} format=json", f"export ckpt={path} out={exported}")
    claims.add([code for code, _ in answers] == [0, 0], f"_target_ in a configuration: {answers}")
    content["config"]["model"]["name"] = trap
    save_checkpoint(content, path)
    for code, lines in call(place, f"evaluate ckpt={path} {evaluation}", f"export ckpt={path}"):
        claims.add(code == 4 and len(lines) == 1, f"_target_ for the network's name: exit code {code}, {lines[-1:]}")
    shutil.copy(path, good)
    trainer = Trainer(place, copy, "loader=dali")
    require(trainer.wait() == [0], f"a run resumes:\n{trainer.output}")
    require_equal_runs(run, copy)


def _write_tar(path: Path, members: Iterable[Member]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for member, content in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _link(name: str, target: str | Path, kind: bytes = tarfile.SYMTYPE) -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, str(target)
    return info, b""


def _offer_archives(place: Place, claims: Claims) -> int:
    """Unpack archives in the official form, of which one has members that climb out; return their number."""
    synsets, victim = ("n00000001", "n00000002"), place.folder / "victim"
    val = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 2)]
    # Folders between where members are unpacked and the victim.
    names = {"val": (val[0], 5), "train": (f"{synsets[0]}.tar", 4), "class": (f"{synsets[0]}_9.JPEG", 4)}
    victim.write_text("alive")
    number = 0
    for where, (name, depth) in names.items():
        up = "../" * depth + victim.name
        escapes: list[list[Member]] = [
            [(up, b"dead")],
            [(str(victim), b"dead")],
            [_link(name, victim), (name, b"dead")],
            [_link(name, up), (name, b"dead")],
            [_link(name, victim, tarfile.LNKTYPE), (name, b"dead")],
            [_link("images", victim.parent), (f"images/{victim.name}", b"dead")],
        ]
        running = []
        for escape in escapes:
            number += 1
            folder = place.folder / f"archives-{number}"
            folder.mkdir()
            _write_archives(folder, synsets, val, {each: escape if each == where else [] for each in names})
            options = ("prepare", f"archives={folder}", f"out={folder / 'out'}", "verify=false")
            running.append((Command(place, "data", *options, faults=[("is_small_release", [])]), folder, escape))
        for command, folder, escape in running:
            codes, lines, what = command.wait(), command.lines, f"prepare, {escape} in {where}"
            is_line = len(lines) == 1 and "does not belong there" in lines[0]
            claims.add(codes == [3] and is_line, f"{what}: {codes}, {lines}")
            claims.add(not any(path.is_symlink() for path in folder.rglob("*")), f"{what}: has made a link")
            claims.add(victim.read_text() == "alive", f"{what}: has written what it points to")
    return number


def _write_archives(folder: Path, synsets: tuple[str, str], val: list[str], extra: dict[str, list[Member]]) -> None:
    """Write ILSVRC2012's archives with two images in each part, after the extra members."""
    from scipy.io import savemat

    meta = io.BytesIO()
    table = np.array([(1, synsets[0]), (2, synsets[1])], [("ILSVRC2012_ID", object), ("WNID", object)])
    savemat(meta, {"synsets": table.reshape(2, 1)})
    _write_tar(folder / prepare.DEVKIT, [(prepare.META, meta.getvalue()), (prepare.GROUND_TRUTH, b"1\n2\n")])
    _write_tar(folder / prepare.VAL, [*extra["val"], *((name, b"image") for name in val)])
    inner = []
    for synset in synsets:
        path = folder / f"{synset}.tar"
        _write_tar(path, [*(extra["class"] if synset == synsets[0] else []), (f"{synset}_1.JPEG", b"image")])
        inner.append((path.name, path.read_bytes()))
    _write_tar(folder / prepare.TRAIN, [*extra["train"], *inner])


def _offer_shards(place: Place, claims: Claims, canary: Canary) -> int:
    """Train on shards whose members climb out: names are names, nothing is unpacked, a link holds nothing."""
    jpeg, victim = encode("JPEG"), place.folder / "victim.jpg"
    victim.write_bytes(jpeg)
    here, up = str(victim.with_suffix("")), f"../../../{victim.stem}"

    def pair(key: str) -> list[Member]:
        return [(f"{key}.jpg", jpeg), (f"{key}.cls", b"0")]

    cases: list[tuple[int, list[Member]]] = [
        (0, [*pair(up), *pair(here)]),
        (0, [_link("x", victim.parent), *pair("x/victim")]),
        (3, [_link("x.jpg", victim), ("x.cls", b"0")]),
        (3, [_link("x.jpg", victim, tarfile.LNKTYPE), ("x.cls", b"0")]),
        (3, [("x.jpg", jpeg), _link("x.cls", victim)]),
        (3, []),  # an index that executes something
    ]
    good: list[Member] = [(f"{number}.jpg", jpeg) for number in range(16)]
    good += [(f"{number}.cls", b"%d" % (number % 2)) for number in range(16)]
    options = ("data=webdataset", "train.epochs=1", "train.warmup_epochs=0")
    trainers = []
    for number, (_, members) in enumerate(cases):
        folder = place.folder / f"shards-{number}"
        (folder / "train").mkdir(parents=True)
        _write_tar(folder / "train/0.tar", [*good, *members])
        if not members:
            index = folder / "train/index.npz"
            np.savez(index, shards=np.array([Bait(open, str(canary.path), "w")], object))
            canary.try_trap(lambda index=index: np.load(index, allow_pickle=True)["shards"], "an index")
        shutil.copytree(folder / "train", folder / "val")
        loader = LOADERS[number % 2]
        trainers.append(Trainer(place, place.new_run(), f"data.root={folder}", f"loader={loader}", *options))
    for number, ((code, members), trainer) in enumerate(zip(cases, trainers, strict=True)):
        codes, lines = trainer.wait(), trainer.output.splitlines()
        folder = place.folder / f"shards-{number}"
        is_line = code == 0 or (len(lines) == 1 and lines[0].startswith(f"resnest-train: {folder}/train/"))
        claims.add(codes == [code] and is_line, f"shards with {members}: {codes} {lines}")
        there = {path.name for path in (folder / "train").iterdir()}
        claims.add(there <= {"0.tar", "index.npz"}, f"shards with {members}: something was unpacked: {there}")
    claims.add(victim.read_bytes() == jpeg, "shards: something was overwritten")
    return len(cases)
