import json
from types import SimpleNamespace

from resnest_imagenet.training.log import _keep_events
from resnest_imagenet.training.trackers import _read_ids


def test_of_damaged_files_that_is_kept_which_can_be_read(tmp_path, capsys):
    events = [{"event": "train", "epoch": 0, "step": step, "loss": 1.5, "time": 0.25} for step in range(1, 7)]
    lines = [json.dumps(event).encode() for event in events]
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.jsonl.damaged"
    damaged = [
        bytes(100),
        b"\xff\xfe",
        b"[" * 100_000,
        b"7",
        b'{"event": "train", "epoch": 0}',
        lines[1][:9] + lines[1],
    ]
    path.write_bytes(b"\n".join([lines[0], lines[0], *damaged, b"", *lines[2:5], lines[5]]))
    assert _keep_events(path, SimpleNamespace(step=5, epoch=0)) == (events[:5], events[5:])
    assert path.read_bytes() == b"".join(line + b"\n" for line in lines[:5])
    assert sorted(aside.read_bytes().splitlines()) == sorted(damaged)
    assert capsys.readouterr().err == f"WARNING: {path}: damaged lines moved to {aside.name}: 6\n"
    assert _keep_events(path, SimpleNamespace(step=2, epoch=0)) == (events[:2], events[2:5])
    assert capsys.readouterr().err == ""

    # An evaluation is of the epoch that it ends: where that is to be made again, it is dropped.
    evaluation = {**events[3], "event": "eval", "epoch": 1}
    path.write_text("".join(json.dumps(event) + "\n" for event in (*events[:4], evaluation)))
    assert _keep_events(path, SimpleNamespace(step=4, epoch=1)) == ([*events[:4], evaluation], [])
    assert _keep_events(path, SimpleNamespace(step=4, epoch=0)) == (events[:4], [evaluation])


def test_damaged_names_of_trackers_are_moved_aside(tmp_path):
    for content in (bytes(50), b"[]", b'{"wandb": "x'):
        (tmp_path / "trackers.json").write_bytes(content)
        assert _read_ids(tmp_path) == {}
    assert len(list(tmp_path.glob("trackers.json.damaged*"))) == 3 and _read_ids(tmp_path) == {}
