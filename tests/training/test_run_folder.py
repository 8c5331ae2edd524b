"""What is in a run folder stays: set aside in one move, and refused rather than written over."""

import json
from pathlib import Path

import numpy as np
import pytest

from conftest import ALONE
from resnest_imagenet.data.shards import write_shards
from resnest_imagenet.errors import DataError
from resnest_imagenet.tasks.choice import open_task
from resnest_imagenet.training.identity import compare_identity, describe_identity
from resnest_imagenet.training.run_folder import RunFolder
from resnest_imagenet.training.schedule import plan_steps


def fill(folder):
    """Leave what a run leaves, and some files of its user's."""
    for name in ("checkpoints/step-000000006.pt", "checkpoints/best.pt", "tensorboard/events", "wandb/x", "notes/mine"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for name in ("metrics.jsonl", "predictions.csv", "config.yaml", "environment.json", "trackers.json", "mine.tmp"):
        (folder / name).write_text(name)
    (folder / "status.json").write_text('{"state": "finished", "saved_step": 6}')
    (folder / "earlier-1").mkdir()


def list_texts(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


class Killed(BaseException):
    pass


def test_a_run_is_set_aside_in_one_move_wherever_it_is_killed(tmp_path, monkeypatch):
    real = {name: getattr(Path, name) for name in ("rename", "mkdir")}
    outcomes, moment, is_through = set(), 0, False
    while not is_through:
        moment += 1
        folder = tmp_path / str(moment)
        fill(folder)
        before, calls = list_texts(folder), []
        (folder / "rank-0.here.7.trace").touch()

        def counted(path, *args, of, calls=calls, moment=moment, **options):
            calls.append(of)
            if len(calls) == moment:
                raise Killed
            return real[of](path, *args, **options)

        for name in real:
            monkeypatch.setattr(Path, name, lambda path, *args, name=name, c=counted, **o: c(path, *args, of=name, **o))
        try:
            RunFolder(str(folder), keep=2, is_main=True).set_aside()
            is_through = True
        except Killed:
            pass
        monkeypatch.undo()
        run = RunFolder(str(folder), keep=2, is_main=True)
        with run.opened():
            aside = folder / "earlier-2"
            # Either nothing has moved, or all has: what is left behind is this process's.
            outcomes.add(aside.exists())
            assert list_texts(aside if aside.exists() else folder).items() >= before.items()
            assert run.find_remains() is None or not aside.exists()
            assert {path.name for path in folder.iterdir()} >= {
                "lock",
                "status.json",
                "earlier-1",
                "rank-0.here.7.trace",
            }
    assert moment > 12 and outcomes == {False, True}


def test_a_start_that_fails_is_told_beside_an_earlier_run_and_in_a_new_folder_as_its_end(tmp_path):
    fill(tmp_path / "old")
    before = list_texts(tmp_path / "old")
    ends = {}
    for name in ("old", "new"):
        run = RunFolder(str(tmp_path / name), keep=2, is_main=True)
        for _ in range(2):
            with pytest.raises(DataError), run.opened():
                raise DataError("no data")
        file = {"old": "failed_start.json", "new": "status.json"}[name]
        ends[name] = json.loads((tmp_path / name / file).read_text())
    assert ends["old"]["exit_code"] == ends["new"]["exit_code"] == 3 and ends["new"]["state"] == "failed"
    (tmp_path / "old/failed_start.json").unlink()
    (tmp_path / "old/lock").unlink()
    assert list_texts(tmp_path / "old") == before


TRAINED, EVALUATED = (f'{{"event": "{kind}", "epoch": 1, "step": 6, "time": 0}}\n' for kind in ("train", "eval"))


@pytest.mark.parametrize(
    ("status", "left", "is_gone"),
    [
        ('{"state": "running", "saved_step": 3}', {"metrics.jsonl": TRAINED}, True),
        ('{"state": "running", "saved_step": 3}', {"checkpoints/best.pt": ""}, True),
        ('{"state": "finished", "saved_step": 3}', {"notes.txt": ""}, False),  # all of the run was removed
        # Killed before the first checkpoint, or while it was written: best.pt comes first.
        ('{"state": "running", "saved_step": null}', {"metrics.jsonl": EVALUATED}, False),
        ('{"state": "running", "saved_step": null}', {"metrics.jsonl": EVALUATED, "checkpoints/best.pt": ""}, False),
        # Of an earlier version, which does not tell.
        ('{"state": "running"}', {"metrics.jsonl": TRAINED, "config.yaml": ""}, False),
        ('{"state": "running"}', {"metrics.jsonl": EVALUATED}, True),
        ('{"state": "finished"}', {"checkpoints/best.pt": ""}, True),
        (None, {"metrics.jsonl": TRAINED}, True),
        ("\0\0\0", {"metrics.jsonl": "\0\0\0\n"}, True),
        (None, {"metrics.jsonl": "", "config.yaml": ""}, False),
    ],
)
def test_what_is_left_of_a_run_tells_whether_it_had_checkpoints(status, left, is_gone, tmp_path):
    for name, text in {**left, **({"status.json": status} if status else {})}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert (RunFolder(str(tmp_path), keep=2, is_main=True).find_remains() is not None) == is_gone


def test_files_of_others_stay_and_what_is_no_file_makes_room(tmp_path, small_run, capsys):
    for name in ("cache.tmp", "metrics.jsonl", "status.json"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine.tmp").write_text("mine")
    run = RunFolder(str(tmp_path), keep=2, is_main=True)
    with run.opened():
        run.begin(small_run().model_dump(), ALONE, None)
    assert (tmp_path / "cache.tmp").is_dir() and (tmp_path / "mine.tmp").read_text() == "mine"
    assert (tmp_path / "metrics.jsonl.damaged").is_dir() and json.loads((tmp_path / "status.json").read_text())
    assert "status.json: not a file: moved to status.json.damaged\n" in capsys.readouterr().err


@pytest.fixture
def identify(small_run):
    """Return what a run on some data is known by."""
    configs = {digest: small_run(f"data.digest={digest}") for digest in ("names", "sizes", "content")}

    def identify(kind, root, digest="sizes", **protocol):
        config = configs[digest]
        recipe = config.train.model_copy(update={"init_from": "weights.pth"})
        data = config.data.model_copy(update={"kind": kind, "root": str(root)})
        changes = {"train": recipe, "data": data, "protocol": config.protocol.model_copy(update=protocol)}
        task = open_task(config.model_copy(update=changes))
        return describe_identity(task, plan_steps(103, recipe, 1).global_batch, ALONE)

    return identify


def test_a_change_of_the_data_is_noticed_and_said_in_words(identify, tmp_path):
    for part in ("train", "val"):
        for name in ("cat/a.jpg", "cat/b.jpg", "dog/a.jpg", "dog/b.jpg"):
            (tmp_path / "data" / part / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / part / name).write_text(name)
    before = {"identity": identify("folder", tmp_path / "data"), "classes": ["cat", "dog"]}
    full = {"identity": identify("folder", tmp_path / "data", "content")}
    (tmp_path / "data").rename(tmp_path / "moved")
    data = tmp_path / "moved"

    def compare(saved=before, **options):
        return list(compare_identity(saved, identify("folder", data, **options)).values())

    assert compare() == compare(digest="names") == compare(digest="content") == compare(full) == []
    (data / "val/cat/a.jpg").write_text("cat/a.jpG")
    assert compare() == []
    assert compare(full, digest="content") == ["val images of other content"]
    (data / "val/cat/a.jpg").write_text("cat")
    assert compare() == ["val images of other sizes (36 -> 30 bytes)"] and compare(digest="names") == []
    (data / "val/cat/a.jpg").unlink()
    assert compare() == ["val images 4 -> 3"]
    (data / "val/cat/c.jpg").write_text("cat/a.jpg")
    assert compare() == ["4 val images of other names"]
    for part in ("train", "val"):
        (data / part / "dog").rename(data / part / "wolf")
    assert compare()[0] == "class 1 dog -> wolf"
    older = {"identity": {k: v for k, v in before["identity"].items() if k.partition(" ")[0] not in ("val", "classes")}}
    assert compare(older)[0] == "classes unknown -> 2" and compare({**before, **older})[0] == "class 1 dog -> wolf"


@pytest.mark.process
def test_labels_of_shards_are_compared(identify, demo_images, tmp_path):
    write_shards(str(demo_images), {"data.train_dir": "train", "data.val_dir": "val"}, tmp_path / "s", 30, False)
    before = {"identity": identify("webdataset", tmp_path / "s")}
    for part in ("train", "val"):
        names = tmp_path / "s" / part / "classes.txt"
        names.write_text("\n".join(reversed(names.read_text().split())) + "\n")
    changes = compare_identity(before, identify("webdataset", tmp_path / "s"))
    assert list(changes.values()) == ["the classes in another order"]
    index = tmp_path / "s/val/index.npz"
    listing = dict(np.load(index))
    np.savez(index, **{**listing, "labels": listing["labels"][::-1]})
    changes = compare_identity(before, identify("webdataset", tmp_path / "s"))
    assert list(changes.values()) == ["the classes in another order", "val images of other labels"]


def test_another_protocol_is_another_run(identify, demo_images):
    """The best accuracy so far would be compared with one of another protocol."""
    before = {"identity": identify("folder", demo_images)}
    changes = compare_identity(before, identify("folder", demo_images, ratio=1.0))
    lines = ("short side 37 bilinear, centre crop 32", "short side 32 bilinear, centre crop 32")
    assert list(changes.values()) == ["evaluation={}, not {}".format(*lines)]


def test_init_from_is_the_same_however_it_is_spelled(identify, demo_images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    now = identify("folder", demo_images)
    for spelled, differences in (
        (f"{tmp_path}/weights.pth", []),
        ("./weights.pth", []),  # as earlier versions wrote it
        ("other.pth", ["train.init_from"]),
        (None, ["train.init_from"]),
    ):
        assert list(compare_identity({"identity": {**now, "train.init_from": spelled}}, now)) == differences
    assert "train.recipe" not in now
