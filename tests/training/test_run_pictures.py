"""The pictures that a finished run leaves in its folder."""

import csv

import numpy as np
import pytest
from PIL import Image, ImageOps

from conftest import CPU, compose_config
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.training.train import train


@pytest.mark.slow
@pytest.mark.process
def test_a_finished_run_has_its_curves_and_a_sheet_of_predictions(few_images, tmp_path, capsys, small_run):
    """Each cell is made from predictions.csv and the files by hand; a wrong one has a frame."""
    from resnest_imagenet.tasks.val_sheet import CAPTION, COLUMNS, MARGIN, SIDE, WRONG

    options = ("train.epochs=1", "train.warmup_epochs=0", "log.trackers=[]", f"data.root={few_images}")
    run = tmp_path / "run"
    train(small_run(*options, "log.pictures=true"))
    assert capsys.readouterr().out.splitlines()[-1].split(maxsplit=1) == [
        "pictures",
        f"{run}/results.png, {run}/val.png",
    ]
    assert np.asarray(Image.open(run / "results.png")).shape == (360, 1500, 3)
    sheet = np.asarray(Image.open(run / "val.png")).astype(int)
    rows = list(csv.DictReader((run / "predictions.csv").open()))
    assert len(rows) == 10 and sheet.shape[:2] == (2 * (SIDE + MARGIN + CAPTION) + MARGIN, 6 * (SIDE + MARGIN) + MARGIN)
    wrong = tuple(int(WRONG[place : place + 2], 16) for place in (1, 3, 5))
    seen = set()
    for number, row in enumerate(rows):
        top, left = (
            (number // COLUMNS) * (SIDE + MARGIN + CAPTION) + MARGIN,
            (number % COLUMNS) * (SIDE + MARGIN) + MARGIN,
        )
        picture = np.asarray(ImageOps.fit(Image.open(row["file"]).convert("RGB"), (SIDE, SIDE))).astype(int)
        inner = slice(3, SIDE - 3)
        shown = sheet[top : top + SIDE, left : left + SIDE]
        assert (shown[inner, inner] == picture[inner, inner]).all()
        is_framed = tuple(sheet[top - 2, left + SIDE // 2]) == wrong
        assert is_framed == (row["class"] != row["predicted"])
        seen.add(is_framed)
    assert True in seen

    # What is gone is a line, and the other picture is drawn.
    from resnest_imagenet.training.pictures import write_pictures

    (run / "predictions.csv").unlink()
    assert write_pictures(small_run(*options), CPU) == [run / "results.png"]
    assert f"WARNING: {run}/val.png is not drawn: {run}/predictions.csv" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.process
def test_scenes_and_objects_have_sheets_too(segmentation_run, detection_run, object_values, demo_objects):
    from conftest import change_config
    from resnest_imagenet.tasks.val_sheet import CAPTION, LARGE_SIDE, MARGIN, draw_val_sheet

    places = (f"data.root={segmentation_run.parent / 'scenes'}", f"run_dir={segmentation_run}")
    of_scenes = compose_config("train", TrainConfig, "+experiment=demo_segmentation", *places)
    of_objects = change_config(object_values, f"run_dir={detection_run}")
    for config in (of_scenes, of_objects):
        sheet = draw_val_sheet(config, CPU)
        assert sheet.shape == (LARGE_SIDE + 2 * MARGIN + CAPTION, 3 * (LARGE_SIDE + MARGIN) + MARGIN, 3)
        for column in range(3):  # three images each, none of them white
            left = MARGIN + column * (LARGE_SIDE + MARGIN)
            assert (sheet[MARGIN : MARGIN + 100, left : left + LARGE_SIDE] != 255).any(2).mean() > 0.5


def test_two_classes_of_one_short_name_are_not_taken_for_one_another(tmp_path):
    """ImageNet has two cranes: a bird that is taken for a machine is wrong."""
    from resnest_imagenet.tasks.val_sheet import draw_val_sheet

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    header = "protocol,file,class,predicted,in_top5,confidence,true_probability\n"
    config = compose_config("train", TrainConfig, "+experiment=demo", f"run_dir={tmp_path}")

    def draw(predicted: str) -> np.ndarray:
        row = f"paper,{tmp_path}/a.png,n02012849,{predicted},1,0.9,0.05\n"
        (tmp_path / "predictions.csv").write_text(header + row)
        return draw_val_sheet(config, CPU)

    assert (draw("n02012849")[4, 50] == 255).all() and (draw("n03126707")[4, 50] != 255).any()
