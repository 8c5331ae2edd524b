import json
from types import SimpleNamespace

import numpy as np

from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.evaluation.accuracy import Evaluation
from resnest_imagenet.evaluation.predictions import write_predictions
from resnest_imagenet.training.log import _drop_other_predictions, _keep_events
from resnest_imagenet.training.trackers import _read_ids


def test_predictions_of_another_than_the_best_network_go(demo_images, tmp_path):
    """As a run leaves them that dies between them and its checkpoint."""
    images = read_image_folder(str(demo_images), "val", "data.val_dir")
    said = Evaluation(images.labels, images.labels * 0, images.labels > 5, *np.full((2, len(images)), 0.5))
    path = tmp_path / "predictions.csv"
    _drop_other_predictions(path, said.top1)  # there is none yet
    for best_top1, stays in ((said.top1, True), (said.top1 + 2.5, False)):
        write_predictions(path, images, [("centre crop 32", said)])
        _drop_other_predictions(path, best_top1)
        assert path.exists() == stays
    path.write_text("cut")
    _drop_other_predictions(path, said.top1)
    assert not path.exists()


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
    assert _keep_events(path, SimpleNamespace(step=5, epoch=0)) == events[:5]
    assert path.read_bytes() == b"".join(line + b"\n" for line in lines[:5])
    assert sorted(aside.read_bytes().splitlines()) == sorted(damaged)
    assert capsys.readouterr().err == f"WARNING: {path}: damaged lines moved to {aside.name}: 6\n"
    assert _keep_events(path, SimpleNamespace(step=2, epoch=0)) == events[:2]
    assert capsys.readouterr().err == ""

    for content in (bytes(50), b"[]", b'{"wandb": "x'):
        (tmp_path / "trackers.json").write_bytes(content)
        assert _read_ids(tmp_path) == {}
    assert len(list(tmp_path.glob("trackers.json.damaged*"))) == 3 and _read_ids(tmp_path) == {}
