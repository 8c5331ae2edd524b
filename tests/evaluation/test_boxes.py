import contextlib
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from box_sets import CATEGORY_IDS, CLASSES, SIZE, draw_detections, draw_objects, read_truth
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.evaluation.boxes import AREAS, FIGURES, IOUS, average_precision, score_detections
from resnest_imagenet.evaluation.detections import DetectionTable, encode_results, read_results

EVALUATORS = ("hotcoco", "pycocotools")


@pytest.fixture
def golden(tmp_path):
    """The objects and detections of cocoapi's example, and its published figures."""
    content = json.loads((Path(__file__).parent / "golden_boxes.json").read_text())
    objects = {
        "images": [{"id": number, "height": height, "width": width} for number, height, width in content["images"]],
        "categories": [{"id": number, "name": str(number)} for number in content["categories"]],
        "annotations": [
            {"image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": is_crowd}
            for image, category, *box, area, is_crowd in content["objects"]
        ],
    }
    results = [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, category, *box, score in content["detections"]
    ]
    truth = read_truth(tmp_path / "instances.json", objects)
    (tmp_path / "results.json").write_text(json.dumps(results))
    return truth, read_results(tmp_path / "results.json", truth), content["figures"]


@pytest.mark.parametrize("evaluator", [EVALUATORS[0], pytest.param(EVALUATORS[1], marks=pytest.mark.slow)])
def test_published_figures(golden, evaluator):
    truth, table, figures = golden
    assert len(truth) == 839 and truth.crowds.sum() == 9
    computed = average_precision(table, truth, "box", evaluator).figures
    np.testing.assert_allclose([value / 100 for value in computed.values()], figures, atol=5e-7)


@pytest.mark.parametrize("kind", ["box", "mask"])
@pytest.mark.parametrize("has_ties", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_both_libraries_agree(seed, has_ties, kind, tmp_path):
    truth = read_truth(tmp_path / "instances.json", draw_objects(seed), masks=True)
    table = draw_detections(seed, truth, masks=True, has_ties=has_ties)
    fast, reference = (average_precision(table, truth, kind, evaluator) for evaluator in EVALUATORS)
    np.testing.assert_array_equal(fast.precision, reference.precision)
    np.testing.assert_array_equal(fast.recall, reference.recall)
    assert fast.figures == reference.figures
    assert 1 < fast.figures["ap"] < fast.figures["ap50"] < 90


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_the_file_of_results_has_the_same_figures(kind, tmp_path):
    """pycocotools reads both files itself."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    content = draw_objects(1)
    for number, annotation in enumerate(content["annotations"]):
        annotation["id"] = number + 1
    truth = read_truth(tmp_path / "instances.json", content, masks=True)
    table = draw_detections(1, truth, masks=True)
    (tmp_path / "results.json").write_bytes(encode_results(table, truth, kind))
    with contextlib.redirect_stdout(io.StringIO()):
        objects = COCO(str(tmp_path / "instances.json"))
        results = objects.loadRes(str(tmp_path / "results.json"))
        evaluation = COCOeval(objects, results, {"box": "bbox", "mask": "segm"}[kind])
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = average_precision(table, truth, kind).figures
    np.testing.assert_allclose([value / 100 for value in figures.values()], evaluation.stats, rtol=1e-12)
    read = read_results(tmp_path / "results.json", truth)
    assert average_precision(read, truth, kind).figures == figures
    if kind == "box":
        assert [getattr(read, name).tolist() for name in ("images", "boxes", "scores", "labels")] == [
            getattr(table, name).tolist() for name in ("images", "boxes", "scores", "labels")
        ]
    else:
        assert read.masks == table.masks


def overlap(box, true, is_crowd):
    width = min(box[0] + box[2], true[0] + true[2]) - max(box[0], true[0])
    height = min(box[1] + box[3], true[1] + true[3]) - max(box[1], true[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / (box[2] * box[3] + (0 if is_crowd else true[2] * true[3] - width * height))


def compute_naively(table, truth, label, iou, area, most):
    """Return precision at 101 recalls and the highest recall of one class, by COCO's rule; None without objects."""
    low, high = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}[area]
    judged, num_objects = [], 0
    for image in np.argsort(truth.image_ids).tolist():
        objects = [row for row in range(len(truth)) if truth.images[row] == image and truth.labels[row] == label]
        ignored = {row: bool(truth.crowds[row]) or not low <= truth.areas[row] <= high for row in objects}
        num_objects += sum(not ignored[row] for row in objects)
        found = [row for row in range(len(table)) if table.images[row] == image and table.labels[row] == label]
        found.sort(key=lambda row: -table.scores[row])
        taken = set()
        for row in found[:100][:most]:
            # The best of the objects that count; only where there is none, of those that do not.
            best, best_iou = None, iou
            for counts in (True, False):
                for candidate in objects:
                    is_free = candidate not in taken or truth.crowds[candidate]
                    if best is None or ignored[best] is not counts:
                        if ignored[candidate] is counts or not is_free:
                            continue
                        value = overlap(table.boxes[row], truth.boxes[candidate], truth.crowds[candidate])
                        if value >= best_iou:
                            best, best_iou = candidate, value
                if best is not None:
                    break
            if best is not None:
                taken.add(best)
            size = table.boxes[row][2] * table.boxes[row][3]
            is_ignored = ignored[best] if best is not None else not low <= size <= high
            if not is_ignored:
                judged.append((float(table.scores[row]), best is not None))
    if not num_objects:
        return None
    judged.sort(key=lambda pair: -pair[0])
    points, hits = [], 0
    for count, (_, is_hit) in enumerate(judged, start=1):
        hits += is_hit
        points.append((hits / num_objects, hits / count))
    precision = [max((p for r, p in points if r >= step / 100 - 1e-9), default=0.0) for step in range(101)]
    return precision, hits / num_objects


def test_equals_a_naive_transcription(tmp_path):
    truth = read_truth(tmp_path / "instances.json", draw_objects(5, images=4, objects=30))
    # Without ties: between equal scores, COCO's figure depends on the order in which its tool has sorted them.
    table = draw_detections(5, truth, count=90, has_ties=False)
    result = average_precision(table, truth, "box")
    for label in range(len(CLASSES)):
        for step, iou in enumerate(IOUS):
            for number, area in enumerate(AREAS):
                for place, most in enumerate((1, 10, 100)):
                    expected = compute_naively(table, truth, label, iou, area, most)
                    precision = result.precision[step, :, label, number, place]
                    recall = result.recall[step, label, number, place]
                    if expected is None:
                        assert recall == -1 and (precision == -1).all()
                    else:
                        np.testing.assert_allclose(precision, expected[0], atol=1e-9)
                        assert recall == pytest.approx(expected[1])


def test_figures_are_means_over_classes_with_objects(tmp_path):
    truth = read_truth(tmp_path / "instances.json", draw_objects(1))
    result = average_precision(draw_detections(1, truth), truth, "box")
    for name in FIGURES:
        per_class = result.per_class(name)
        assert per_class.shape == (len(CLASSES),)
        assert math.isnan(per_class[3])  # the class has no objects
        assert np.nanmean(per_class) == pytest.approx(result.figures[name])
    curves = result.precision_at(0.5)
    assert curves.shape == (len(CLASSES), 101) and np.isnan(curves[3]).all()
    np.testing.assert_allclose(curves[:3].mean(1), result.per_class("ap50")[:3])
    np.testing.assert_allclose(result.precision_at(None)[:3].mean(1), result.per_class("ap")[:3])


def test_values_by_name(tmp_path):
    truth = read_truth(tmp_path / "instances.json", draw_objects(1), masks=True)
    scores = score_detections(draw_detections(1, truth, masks=True), truth, masks=True)
    values = scores.values()
    assert list(values)[:4] == ["box_ap", "box_ap50", "box_ap75", "box_ap_small"] and len(values) == 24
    assert values["mask_ar100"] == scores.masks.figures["ar100"]
    assert list(score_detections(scores.detections, truth, masks=False).values())[-1] == "box_ar_large"


def no_detections(masks=False):
    empty = np.zeros(0, np.int64)
    return DetectionTable(empty, np.zeros((0, 4)), np.zeros(0), empty, () if masks else None)


@pytest.mark.parametrize("kind", ["box", "mask"])
@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_nothing_is_found(kind, evaluator, tmp_path):
    truth = read_truth(tmp_path / "instances.json", draw_objects(0), masks=True)
    assert set(average_precision(no_detections(), truth, kind, evaluator).figures.values()) == {0.0}


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_no_objects_of_a_size(evaluator, tmp_path):
    content = draw_objects(0)
    for annotation in content["annotations"]:
        annotation["area"] = 2000
    truth = read_truth(tmp_path / "instances.json", content)
    figures = average_precision(draw_detections(0, truth), truth, "box", evaluator).figures
    absent = {name for name, figure in figures.items() if figure is None}
    assert absent == {"ap_small", "ap_large", "ar_small", "ar_large"}
    assert 0 < figures["ap"] <= figures["ap_medium"]  # where detections of other sizes do not count


def test_what_is_right_scores_100_whatever_the_numbers(tmp_path):
    """Huge, negative and unordered numbers of images and categories, and objects without numbers, areas or crowds."""
    content = draw_objects(2)
    for image in content["images"]:
        image["id"] = -(2**40) * image["id"]
    for annotation in content["annotations"]:
        annotation["image_id"] *= -(2**40)
        for key in ("id", "area", "iscrowd"):
            del annotation[key]
    truth = read_truth(tmp_path / "instances.json", content)
    order = np.argsort(truth.images, kind="stable")
    table = DetectionTable(truth.images[order], truth.boxes[order], np.ones(len(truth)), truth.labels[order])
    for evaluator in EVALUATORS:
        result = average_precision(table, truth, "box", evaluator)
        assert result.figures["ap"] == pytest.approx(100) and result.per_class("ap50")[:3].tolist() == [100.0] * 3
    np.testing.assert_array_equal(truth.areas, truth.boxes[:, 2] * truth.boxes[:, 3])


def test_the_order_of_the_set_does_not_count(tmp_path):
    """Ties are broken by the data set's own numbers of the images, as COCO's tools do."""
    content = draw_objects(4)
    truth = read_truth(tmp_path / "instances.json", content)
    table = draw_detections(4, truth)
    content["images"].reverse()
    other = read_truth(tmp_path / "other.json", content)
    place = {number: index for index, number in enumerate(other.image_ids.tolist())}
    images = np.array([place[number] for number in truth.image_ids[table.images].tolist()])
    order = np.argsort(images, kind="stable")
    turned = DetectionTable(images[order], table.boxes[order], table.scores[order], table.labels[order])
    assert average_precision(turned, other, "box").figures == average_precision(table, truth, "box").figures


def test_more_detections_than_count(tmp_path):
    truth = read_truth(tmp_path / "instances.json", draw_objects(6, images=2))
    table = draw_detections(6, truth, count=900)
    fast, reference = (average_precision(table, truth, "box", evaluator) for evaluator in EVALUATORS)
    np.testing.assert_array_equal(fast.precision, reference.precision)
    assert (fast.recall[..., 2] > fast.recall[..., 0]).any()


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_a_library_is_missing(evaluator, tmp_path, monkeypatch):
    truth = read_truth(tmp_path / "instances.json", draw_objects(0))
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ConfigError) as error:
        average_precision(no_detections(), truth, "box", evaluator)
    assert str(error.value).startswith(
        f"detection needs {evaluator}: add the extra [detection] of resnest-imagenet: pip install "
    )


def test_masks_that_are_not_there(tmp_path):
    truth = read_truth(tmp_path / "instances.json", draw_objects(0), masks=True)
    with pytest.raises(ValueError, match="the network finds no masks"):
        average_precision(draw_detections(0, truth), truth, "mask")


def test_numbers_are_the_data_sets_own(tmp_path):
    truth = read_truth(tmp_path / "instances.json", draw_objects(0), masks=True)
    table = draw_detections(0, truth, masks=True)
    rows = {kind: json.loads(encode_results(table, truth, kind)) for kind in ("box", "mask")}
    for kind, key in (("box", "bbox"), ("mask", "segmentation")):
        assert len(rows[kind]) == len(table) and list(rows[kind][0]) == ["image_id", "category_id", "score", key]
        assert [row["category_id"] for row in rows[kind]] == CATEGORY_IDS[table.labels].tolist()
        assert [row["image_id"] for row in rows[kind]] == truth.image_ids[table.images].tolist()
    assert rows["mask"][0]["segmentation"]["size"] == list(SIZE)
