import json

import numpy as np
import pytest

from box_sets import draw_detections, draw_objects, read_truth
from resnest_imagenet.evaluation.boxes import average_precision
from resnest_imagenet.evaluation.detection_errors import ERRORS, Outcome, find_errors
from resnest_imagenet.evaluation.detections import DetectionTable, encode_results

KINDS = {"Loc": "localisation", "Cls": "class", "Dupe": "duplicate", "Bkg": "background", "Both": "both"}


def read_objects(folder, annotations, images=2):
    content = draw_objects(0, images)
    numbers = [image["id"] for image in content["images"]]
    content["annotations"] = [
        {
            "image_id": numbers[image],
            "category_id": content["categories"][label]["id"],
            "bbox": box,
            "iscrowd": is_crowd,
        }
        for image, label, box, is_crowd in annotations
    ]
    return read_truth(folder / "instances.json", content)


def test_each_kind_of_error(tmp_path):
    """Boxes 40 pixels wide; a shift by 10 leaves an IoU of .6, one by 20 of .33, one by 36 of .05."""
    objects = [
        (0, 0, [0, 0, 40, 40], 0),
        (0, 1, [60, 0, 40, 40], 0),
        (0, 2, [0, 60, 40, 40], 0),
        (0, 0, [60, 60, 40, 40], 1),
        (1, 1, [0, 0, 40, 40], 0),
        (1, 2, [60, 60, 30, 30], 0),
    ]
    detections = [
        (0, 0, [10, 0, 40, 40], 0.9, Outcome.CORRECT, 0),
        (0, 0, [0, 0, 40, 40], 0.8, Outcome.DUPLICATE, 0),  # nearer, but later
        (0, 1, [80, 0, 40, 40], 0.7, Outcome.LOCALISATION, 1),
        (0, 0, [0, 60, 40, 40], 0.6, Outcome.CLASS, 2),
        (0, 0, [20, 60, 40, 40], 0.5, Outcome.BOTH, 2),
        (0, 3, [110, 60, 10, 10], 0.4, Outcome.BACKGROUND, -1),
        (0, 0, [62, 62, 20, 20], 0.4, Outcome.IGNORED, 3),  # within the crowd
        (1, 0, [36, 0, 40, 40], 0.3, Outcome.BACKGROUND, -1),  # it hardly touches one
    ]
    truth = read_objects(tmp_path, objects)
    images, labels, boxes, scores, outcomes, places = (np.array(column) for column in zip(*detections, strict=True))
    table = DetectionTable(images, boxes.astype(float), scores, labels)
    errors = find_errors(table, truth, "box")
    assert [Outcome(outcome) for outcome in errors.outcomes] == outcomes.tolist()
    assert errors.objects.tolist() == places.tolist()
    assert errors.is_found.tolist() == [True] + [False] * 5
    assert errors.is_missed.tolist() == [False, False, False, False, True, True]
    counts = errors.count(table, truth)
    assert {name: int(count.sum()) for name, count in counts.items()} == {
        **{"correct": 1, "localisation": 1, "class": 1, "duplicate": 1, "background": 2, "both": 1, "missed": 2}
    }
    assert counts["missed"].tolist() == [0, 1, 1, 0] and counts["background"].tolist() == [1, 0, 0, 1]
    # Class 0 has its one object: AP 100. With its place right, class 1 has one of its two objects, recalls 0 to .5.
    assert errors.ap50 == pytest.approx(100 / 3)
    half = 100 * 51 / 101
    assert errors.gains["localisation"] == pytest.approx(half / 3)
    assert errors.gains["class"] == pytest.approx(half / 3)
    assert errors.gains["background"] == errors.gains["both"] == errors.gains["duplicate"] == pytest.approx(0)


def test_removed_errors_let_others_count_more(tmp_path):
    truth = read_objects(tmp_path, [(0, 0, [0, 0, 40, 40], 0)])
    boxes = np.array([[80.0, 0, 20, 20], [0, 0, 40, 40]])
    table = DetectionTable(np.zeros(2, int), boxes, np.array([0.9, 0.8]), np.zeros(2, int))
    errors = find_errors(table, truth, "box")
    assert errors.ap50 == pytest.approx(50) and errors.gains["background"] == pytest.approx(50)


@pytest.mark.parametrize("kind", ["box", "mask"])
@pytest.mark.parametrize("seed", range(4))
def test_another_implementation_agrees(seed, kind, tmp_path):
    """hotcoco's, which counts what has found a crowd among the errors: here without crowds."""
    import hotcoco

    content = draw_objects(seed)
    for number, annotation in enumerate(content["annotations"]):
        annotation |= {"iscrowd": 0, "id": number + 1}
    truth = read_truth(tmp_path / "instances.json", content, masks=True)
    table = draw_detections(seed, truth, masks=True, has_ties=False)
    errors = find_errors(table, truth, kind)
    objects = hotcoco.COCO(content)
    results = objects.load_res(json.loads(encode_results(table, truth, kind)))
    evaluation = hotcoco.COCOeval(objects, results, {"box": "bbox", "mask": "segm"}[kind])
    evaluation.evaluate()
    expected = evaluation.tide_errors()
    counts = {name: int(count.sum()) for name, count in errors.count(table, truth).items()}
    assert {name: counts[name] for name in KINDS.values()} == {KINDS[key]: expected["counts"][key] for key in KINDS}
    assert counts["missed"] == expected["counts"]["Miss"]
    assert errors.ap50 == pytest.approx(100 * expected["ap_base"])
    for key, name in KINDS.items():
        assert errors.gains[name] == pytest.approx(100 * expected["delta_ap"][key], abs=1e-9), name
    assert min(counts.values()) >= 0 and counts["class"] > 0 and counts["localisation"] > 0


@pytest.mark.parametrize("seed", range(3))
def test_the_average_precision_is_that_of_the_evaluation(seed, tmp_path):
    """With crowds and ties, and more detections than count."""
    truth = read_truth(tmp_path / "instances.json", draw_objects(seed, images=2))
    table = draw_detections(seed, truth, count=700)
    errors = find_errors(table, truth, "box")
    assert errors.ap50 == pytest.approx(average_precision(table, truth, "box").figures["ap50"])
    assert (errors.outcomes == Outcome.IGNORED).any() and set(errors.gains) == {
        *(error.name.lower() for error in ERRORS),
        "missed",
    }


def test_nothing_is_found(tmp_path):
    truth = read_truth(tmp_path / "instances.json", draw_objects(0))
    empty = np.zeros(0, np.int64)
    table = DetectionTable(empty, np.zeros((0, 4)), np.zeros(0), empty)
    errors = find_errors(table, truth, "box")
    assert errors.ap50 == 0 and errors.is_missed.tolist() == (~truth.crowds).tolist()
    assert set(errors.gains.values()) == {0.0}
