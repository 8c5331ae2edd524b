"""Objects in single images: what the evaluation finds, in pictures, COCO's results and tables."""

import csv
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import resnest_imagenet
from conftest import compose_config
from resnest_imagenet.checkpoint import load_checkpoint, save_checkpoint
from resnest_imagenet.commands import predict as command
from resnest_imagenet.commands.predict import detect_objects, read_inputs
from resnest_imagenet.config_reading import PredictConfig
from resnest_imagenet.data.demo_objects import SHAPES
from resnest_imagenet.errors import CheckpointError, ConfigError, NonFiniteError
from resnest_imagenet.evaluation.box_pictures import make_box_palette
from resnest_imagenet.weights.load import read_weights


@pytest.fixture(scope="module")
def checkpoint(detection_run):
    return detection_run / "checkpoints/best.pt"


@pytest.fixture(scope="module")
def photos(demo_objects):
    return demo_objects / "val2017"


@pytest.fixture(scope="module")
def evaluated(detection_run):
    """What the run's evaluation found in the same images: by its loader, in its process, in COCO's form."""
    return json.loads((detection_run / "detections.json").read_text())


@pytest.fixture(scope="module")
def composed():
    return compose_config("predict", PredictConfig, "device=cpu", "ckpt=unset", "images=unset")


def predict(config, **options):
    changed = config.model_copy(update={name: str(value) for name, value in options.items() if name != "score"})
    changed = changed.model_copy(update={"images": [changed.images], "score": options.get("score")})
    return detect_objects(changed, *read_inputs(changed))


@pytest.mark.slow
@pytest.mark.process
def test_finds_what_the_evaluation_does(checkpoint, photos, evaluated, composed, tmp_path):
    options = {"ckpt": checkpoint, "images": photos, "score": 0.05}
    (of_json, skipped), (of_csv, _) = (
        predict(composed, **options, out=tmp_path / name) for name in ("x.json", "x.csv")
    )
    counts, numbers = (
        "images: 3, objects above 0.05: 60",
        "image_id is a count of the images from 1, category_id the data",
    )
    assert of_json.splitlines()[-1] == f"{tmp_path}/x.json: {counts}; {numbers} set's"
    assert of_csv.splitlines()[-1] == f"{tmp_path}/x.csv: {counts}"
    results = json.loads((tmp_path / "x.json").read_text())
    files = sorted(photos.iterdir())
    assert skipped == [] and len(results) == 60
    for result, of_evaluation in zip(results, evaluated, strict=True):
        names = {"file_name": files[result["image_id"] - 1].name, "category_name": SHAPES[result["category_id"] - 1]}
        assert result == of_evaluation | names
    with (tmp_path / "x.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, result in zip(rows, results, strict=True):
        x, y, width, height = result["bbox"]
        assert row["file"] == str(files[result["image_id"] - 1]) and row["label"] == result["category_name"]
        box = [float(row[name]) for name in ("x1", "y1", "x2", "y2")]
        np.testing.assert_allclose(box, [x, y, x + width, y + height], atol=0.0051)
        assert float(row["score"]) == round(result["score"], 6)
    assert [row["rank"] for row in rows] == [str(rank) for rank in range(1, 21)] * 3


@pytest.mark.slow
@pytest.mark.process
def test_writes_a_picture_of_each_image(checkpoint, photos, evaluated, tmp_path, capsys, monkeypatch):
    """Of the objects above the score, and of no others; a bad image is named."""
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "found").mkdir()
    (tmp_path / "found/old.png").write_bytes(b"of a call before")
    scores = sorted((result["score"] for result in evaluated), reverse=True)
    score = (scores[2] + scores[3]) / 2
    arguments = [f"ckpt={checkpoint}", f"images=[{photos},{tmp_path}/bad.jpg]", f"out={tmp_path}/found", "top=1"]
    monkeypatch.setattr(sys, "argv", ["resnest-predict", *arguments, f"score={score}", "device=cpu"])
    with pytest.raises(SystemExit, match="^3$"):
        command.main()
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        f"{tmp_path}/bad.jpg: not a readable image (of no known format); skipped",
        "resnest-predict: images skipped: 1",
    ]
    (tmp_path / "found/old.png").unlink()
    pictures = sorted((tmp_path / "found").rglob("*.png"))
    files = sorted(photos.iterdir())
    assert [picture.stem for picture in pictures] == [file.stem for file in files]
    lines, num_lines = printed.out.splitlines(), 0
    palette = make_box_palette(len(SHAPES))
    for number, (picture, file) in enumerate(zip(pictures, files, strict=True), 1):
        drawn, pixels = np.asarray(Image.open(picture)).astype(int), np.asarray(Image.open(file)).astype(int)
        shown = [result for result in evaluated if result["image_id"] == number and result["score"] > score]
        assert drawn.shape == pixels.shape and (drawn != pixels).any() == bool(shown)
        assert lines[num_lines] == str(file)
        if not shown:
            assert lines[num_lines + 1] == "  no objects"
        for result in shown[:1]:
            x, y, width, height = result["bbox"]
            label = result["category_id"] - 1
            bottom, columns = int(np.ceil(y + height)) - 1, slice(int(x) + 1, int(x + width) - 1)
            assert (drawn[bottom, columns] == palette[label]).all(1).mean() > 0.5
            expected = f"  {result['score']:.2f}  {SHAPES[label]}  x {x:.0f} to {x + width:.0f}, y "
            assert lines[num_lines + 1].startswith(expected)
        has_more = len(shown) > 1
        if has_more:
            assert lines[num_lines + 2] == f"  and {len(shown) - 1} more: top={len(shown)} lists them"
        num_lines += 2 + has_more
    assert lines[num_lines:] == [
        f"{tmp_path}/found: images: 3, objects above {score:g}: 3; other pictures there, of before: 1"
    ]


@pytest.mark.slow
@pytest.mark.process
def test_the_library_finds_the_same_and_turns_images_upright(checkpoint, photos, evaluated, tmp_path):
    file = min(photos.iterdir())
    upright = Image.open(file).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    expected = [result for result in evaluated if result["image_id"] == 1]
    opened = resnest_imagenet.open_detector(checkpoint, device="cpu")
    detected = resnest_imagenet.detect(opened, [file, *sorted(tmp_path.glob("*.png"))], score=0.05)
    assert len(detected) == 3 and detected.skipped == ()
    for image in detected:
        np.testing.assert_array_equal(image.pixels, np.asarray(upright))
        corners = np.array([result["bbox"] for result in expected])
        corners[:, 2:] += corners[:, :2]
        np.testing.assert_allclose(image.boxes, corners, atol=1e-9)
        assert image.scores.tolist() == [result["score"] for result in expected]
        assert image.labels.tolist() == [result["category_id"] - 1 for result in expected]
        assert [mask.decode() for mask in image.masks] == [result["segmentation"]["counts"] for result in expected]
        assert image.decoded_masks[0].shape == image.size and image.decoded_masks[0].dtype == bool
    (named,) = resnest_imagenet.detect(checkpoint, file, score=image.scores[2])
    assert named.scores.tolist() == image.scores[:2].tolist()  # of those as high as the score none
    with pytest.raises(ConfigError, match=r"^score=0.01 is below min_score=0.05, with which .* was opened"):
        resnest_imagenet.detect(opened, file, score=0.01)
    (most,) = resnest_imagenet.detect(checkpoint, file, score=0)
    np.testing.assert_array_equal(most.scores, image.scores)
    for parameter in opened.module.roi_heads.masks.parameters():
        parameter.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=f"{file.name}: its .* are not finite in fp32"):
        list(resnest_imagenet.detect(opened, file))


def test_arguments_of_the_library_are_refused_in_a_line():
    for options, message in {
        (("score", 2),): "^score=2: input should be less than 1$",
        (("score", -0.1),): "^score=-0.1: input should be greater than or equal to 0$",
        (("precision", "half"),): "^precision='half': input should be",
    }.items():
        with pytest.raises(ConfigError, match=message):
            resnest_imagenet.detect("no/such.pt", "nowhere", **dict(options))


@pytest.mark.slow
def test_refusals(checkpoint, photos, composed, tmp_path):
    given = {"ckpt": str(checkpoint), "images": [str(photos)]}
    loader = composed.loader
    for options, message in (
        ({"crop": 64}, "^crop is of classification: .*best.pt is of detection, and sees images one at a time, at"),
        ({"loader": loader.model_copy(update={"workers": 1})}, "^loader is of classification: "),
        ({"model": SimpleNamespace(name="resnest14_half")}, "^model is of classification: "),
        ({"out": str(photos)}, "val2017 holds images that are asked about: choose another folder$"),
        ({"out": str(photos.parent)}, "holds images that are asked about: choose another folder$"),
        ({"out": f"{tmp_path}/street.png"}, "street.png: pictures need a folder; tables end in .csv or .json$"),
    ):
        config = composed.model_copy(update=given | options)
        with pytest.raises(ConfigError, match=message) as error:
            detect_objects(config, *read_inputs(config))
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="^score=2: input should be less than 1$"):
        compose_config("predict", PredictConfig, "ckpt=x", "images=y", "score=2")


@pytest.mark.slow
def test_protocols_of_other_tasks_are_refused(checkpoint, photos):
    config = compose_config("predict", PredictConfig, f"ckpt={checkpoint}", f"images={photos}", "protocol=whole")
    with pytest.raises(ConfigError, match="^protocol=whole is of segmentation: choose own or coco$"):
        detect_objects(config, *read_inputs(config))
    with pytest.raises(ConfigError, match="^tta=flip is of classification: .*best.pt is of detection$"):
        read_inputs(config.model_copy(update={"tta": "flip"}))


def test_the_score_is_of_detection(composed, tmp_path):
    config = {"model": {"name": "resnest14_half"}, "train": {}}
    model = resnest_imagenet.build_model("resnest14_half", 2).state_dict()
    save_checkpoint({"model": model, "config": config, "classes": ["a", "b"], "epoch": 1}, tmp_path / "best.pt")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    options = {"ckpt": str(tmp_path / "best.pt"), "images": [str(tmp_path)], "score": 0.5}
    with pytest.raises(ConfigError, match="^score is of detection: .*best.pt is of classification$"):
        read_inputs(composed.model_copy(update=options))
    with pytest.raises(CheckpointError, match="a checkpoint of task classification, not of detection: "):
        resnest_imagenet.open_detector(tmp_path / "best.pt")


@pytest.mark.slow
def test_a_detector_is_refused_where_another_network_is_asked_for(checkpoint):
    message = "a checkpoint of task detection, not of {}: resnest-eval.*resnest-predict.* take it$"
    with pytest.raises(CheckpointError, match=message.format("classification")):
        resnest_imagenet.open_classifier(checkpoint)
    with pytest.raises(CheckpointError, match=message.format("segmentation")):
        resnest_imagenet.open_segmenter(checkpoint)
    with pytest.raises(ConfigError, match=r"^the network is a int: give what open_detector\(\.\.\.\) returns, or"):
        resnest_imagenet.detect(3, checkpoint)


@pytest.mark.slow
def test_numbers_of_classes_come_through_the_checkpoint(checkpoint, tmp_path):
    from resnest_imagenet.reports.object_files import list_results  # late: it imports torchvision

    content = load_checkpoint(checkpoint)
    assert content["category_ids"] == [1, 2, 3, 4, 5]
    for numbers, expected in (([9], None), (None, None), ([9, 4, 70, 2, 1.5], None), ([9, 4, 70, 2, 1],) * 2):
        save_checkpoint({**content, "category_ids": numbers}, tmp_path / "best.pt")
        weights = read_weights(tmp_path / "best.pt", tasks=("detection",))
        assert weights.category_ids == expected
    detector = resnest_imagenet.open_detector(weights, device="cpu")
    assert replace(detector, weights=replace(weights, category_ids=None)).category_ids == (1, 2, 3, 4, 5)
    detected = SimpleNamespace(detector=detector)
    (result,) = list_results(make_image(), 7, "a.jpg", detected)
    assert result == {
        "image_id": 7,
        "file_name": "a.jpg",
        "category_id": 70,
        "category_name": SHAPES[2],
        "bbox": [1.25, 2.0, 4.5, 5.0],
        "score": 0.75,
    }


def make_image(count=1, file="a.jpg"):
    from resnest_imagenet.inference.detect import DetectedImage

    boxes = np.tile([1.25, 2.0, 5.75, 7.0], (count, 1))
    pixels = np.full((40, 50, 3), 128, np.uint8)
    return DetectedImage(file, pixels, boxes, np.full(count, 0.75), np.full(count, 2))


def test_images_get_the_numbers_of_their_names():
    from resnest_imagenet.reports.object_files import number_images  # late: it imports torchvision

    assert number_images(["/x/000000397133.jpg", "/y/7.jpg"]) == ([397133, 7], True)
    for files in (["/x/1.jpg", "/x/a.jpg"], ["/x/1.jpg", "/y/1.png"], ["/x/1.jpg", "/x/01.jpg"], ["/x/²", "/x/-2"]):
        assert number_images(files) == ([1, 2], False)
    assert number_images([]) == ([], False)


def test_lines_for_people():
    from resnest_imagenet.inference.detect import format_objects

    classes = ["a", "b", "c\n"]
    assert format_objects(make_image(), classes, 1) == "a.jpg\n  0.75  c\\n  x 1 to 6, y 2 to 7"
    assert format_objects(make_image(3), classes, 2).splitlines()[2:] == [
        "  0.75  c\\n  x 1 to 6, y 2 to 7",
        "  and 1 more: top=3 lists them",
    ]
    assert format_objects(make_image(0, "\x1b.jpg"), classes, 5) == "\\x1b.jpg\n  no objects"


def test_a_detector_of_boxes_has_no_masks():
    from resnest_imagenet.reports.object_files import draw_objects, list_rows  # late: it imports torchvision

    image = make_image(2, "=x.jpg")
    rows = list(list_rows(image, ["a", "b", "@c"]))
    assert rows[1] == ("'=x.jpg", 2, "'@c", 0.75, 1.25, 2.0, 5.75, 7.0, "")
    drawn = draw_objects(image, ["a", "b", "c"], make_box_palette(3))
    assert (drawn[20:] == 128).all() and (drawn[2:7, 1] != 128).any()
