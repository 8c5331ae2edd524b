"""What a report has about a run of detection, read from its folder and looked at in a real browser."""

import base64
import html
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from browser import look_at, needs_browser
from resnest_imagenet.errors import DataError
from resnest_imagenet.evaluation.box_files import ALL_CLASSES, BoxFiles, ClassRow, ImageRow, list_files
from resnest_imagenet.evaluation.box_pictures import make_box_palette
from resnest_imagenet.evaluation.boxes import FIGURES, score_detections
from resnest_imagenet.evaluation.detections import DetectionTable
from resnest_imagenet.evaluation.worst_images import rank_images
from resnest_imagenet.reports.runs import read_run
from run_files import read_events

ERRORS = ("localisation", "class", "duplicate", "background", "both", "missed")


def write(folder, out):
    from resnest_imagenet.reports.report import write_report  # late: it imports torchvision

    write_report([read_run(folder, {})], out, device="cpu")
    return out.read_text()


@pytest.fixture(scope="module")
def instances(demo_objects):
    from resnest_imagenet.data.coco import open_coco

    return open_coco(str(demo_objects), "val", masks=True)


@pytest.fixture(scope="module")
def truth(instances):
    from resnest_imagenet.evaluation.ground_truth import open_ground_truth

    return open_ground_truth(instances, masks=True)


@pytest.fixture(scope="module")
def made_up_run(detection_run, instances, truth, tmp_path_factory):
    """The run, as if its network had found all of image 0, a wrong class in 1, and an object of 2 twice."""
    table = []
    for image in range(3):
        objects = np.flatnonzero(truth.images == image).tolist()
        if image == 0:
            table += [(number, truth.labels[number], 0.9) for number in objects]
        elif image == 1:
            table.append((objects[0], (truth.labels[objects[0]] + 1) % 5, 0.8))
        else:
            table += [(objects[0], truth.labels[objects[0]], score) for score in (0.9, 0.7)]
    numbers, labels, scores = (np.array(column) for column in zip(*table, strict=True))
    masks = tuple(truth.masks[number] for number in numbers)
    found = DetectionTable(truth.images[numbers], truth.boxes[numbers], scores.astype(float), labels, masks)
    folder = tmp_path_factory.mktemp("made_up") / "run"
    shutil.copytree(detection_run, folder)
    for name, encode in list_files(score_detections(found, truth, masks=True), truth, instances.images).items():
        (folder / name).write_bytes(encode())
    return folder


@pytest.fixture(scope="module")
def page(made_up_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    write(made_up_run, out)
    return out


def read_pictures(text):
    """Return the pictures of each image, and the lines below them."""
    for strip in re.findall(r'<figure class="strip">(.*?)</figure>', text, re.DOTALL):
        encoded = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', strip)
        caption = html.unescape(re.search("<figcaption>(.*?)</figcaption>", strip)[1])
        yield [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), np.float64) for data in encoded], caption


def colour_of_edge(picture, box, scale):
    """Return the mean colour along the lower edge of a box, where no name is."""
    x1, _, x2, y2 = (value * scale for value in box)
    row = min(round(y2) - 1, len(picture) - 1)
    return picture[row, round(x1) + 3 : round(x2) - 3].mean(0)


@pytest.mark.slow
@pytest.mark.process
def test_the_page_has_what_the_evaluation_found_and_the_images_with_objects_and_detections(
    page, made_up_run, instances, truth
):
    text = page.read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", text) and "<script" not in text
    assert "Table 3" not in text and "top-1" not in text and "Intersection over union" not in text
    events = [event for event in read_events(made_up_run) if event["event"] == "eval"]
    best = max(events, key=lambda event: event["mask_ap"])
    # Without large objects their AP is not 0.
    sizes = {"ap_small": truth.areas <= 32**2, "ap_medium": truth.areas > 32**2, "ap_large": truth.areas > 96**2}
    assert not sizes["ap_large"].any()
    for kind in ("box", "mask"):
        figures = [f"{best[f'{kind}_{name}']:.2f}" for name in ("ap", "ap50", "ap75")]
        figures += [f"{best[f'{kind}_{name}']:.2f}" if is_such.any() else "" for name, is_such in sizes.items()]
        assert f"<td>{kind}</td>{''.join(f'<td>{figure}</td>' for figure in figures)}" in text
    # The cost is the detector's, not that of the backbone's classifier.
    from resnest_imagenet.inference.detector import open_detector  # late: it imports torchvision

    model = open_detector(made_up_run / "checkpoints/best.pt", device="cpu").module
    counted = re.search(r"<td>([\d.]+)</td><td>[\d.]+ at 64x96</td><td>2 of 2</td>", text)[1]
    assert float(counted) == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, abs=0.005)

    objects = np.bincount(truth.images, minlength=3)
    strips = list(read_pictures(text))
    # Without image 0, in which all is right; the others by their faults.
    faults = {1: objects[1] + 1, 2: objects[2] - 1 + 1}
    order = sorted(faults, key=lambda image: -faults[image])
    lines = {
        1: f"0 of {objects[1]} objects found, wrong detections: 1</div><div>1 class</div>",
        2: f"1 of {objects[2]} objects found, wrong detections: 1</div><div>1 duplicate</div>",
    }
    assert [caption for _, caption in strips] == [
        f"<div class=right>{Path(instances.images.name(image)).name}: {lines[image]}" for image in order
    ]
    palette = make_box_palette(5).astype(float)
    for ((shown_truth, shown_found), _), image in zip(strips, order, strict=True):
        pixels = np.asarray(instances.read(image))
        scale = shown_truth.shape[1] / pixels.shape[1]
        assert max(shown_truth.shape[:2]) == 480 and shown_truth.shape == shown_found.shape
        first = int(np.flatnonzero(truth.images == image)[0])
        x, y, width, height = truth.boxes[first]
        box, label = (x, y, x + width, y + height), int(truth.labels[first])
        for picture, expected in ((shown_truth, label), (shown_found, (label + 1) % 5 if image == 1 else label)):
            distances = np.abs(palette - colour_of_edge(picture, box, scale)).sum(1)
            assert distances.argmin() == expected


@needs_browser
@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)], ids=["wide and light", "narrow and dark"])
def test_the_page_in_a_browser(page, width, dark):
    seen = look_at(page, width, dark)
    titles = [label.rpartition(":")[0] for label in seen["charts"]]
    assert titles[:2] == ["Loss", "mask AP after each epoch"]
    of_kind = ("mean over the classes", "each class, IoU .50", "what each kind of error costs")
    assert titles[-6:] == [f"{kind}: {title}" for kind in ("Boxes", "Masks") for title in of_kind]
    assert (seen["pictures"], seen["loaded"]) == (4, [])
    assert (seen["width"] <= width, seen["outside"]) == (True, [])


@pytest.mark.slow
@pytest.mark.process
def test_what_is_gone_is_a_line_in_the_page(made_up_run, tmp_path):
    shutil.copytree(made_up_run, tmp_path / "run")
    images = (tmp_path / "run/images.csv").read_text()
    (tmp_path / "run/images.csv").write_text(images.replace("/val2017/", "/moved/"))
    text = write(tmp_path / "run", tmp_path / "report.html")
    assert text.count("(no picture: ") == 2 and "not an image of" in text
    from resnest_imagenet.reports.box_sections import render_boxes, view_images  # late: it imports torchvision

    run = read_run(tmp_path / "run", {})
    run.config["data.root"] = str(tmp_path / "nowhere")
    line = view_images(run)
    assert "nowhere" in line and f"<p>No pictures: {html.escape(line)}</p>" in render_boxes(run.boxes, line)
    del run.config["data.root"]
    assert "does not name" in view_images(run)
    # Figures of resnest-eval beside it are none of a classifier.
    results = {"task": "detection", "results": [{"protocol": "p", "box_ap": 50.0}]}
    (tmp_path / "run/eval.json").write_text(json.dumps(results, indent=2))
    # A file of another evaluation is one line.
    errors = (tmp_path / "run/errors.csv").read_text()
    (tmp_path / "run/errors.csv").write_text("\n".join(errors.splitlines()[:3]) + "\n")
    with pytest.raises(DataError, match=r"errors.csv: not of the same evaluation as ap.csv"):
        read_run(tmp_path / "run", {})
    (tmp_path / "run/detections.json").unlink()
    run = read_run(tmp_path / "run", {})
    assert run.measured == [] and run.boxes is None and view_images(run) is None


def make_files():
    """Three classes, one of which has no objects, and boxes only."""
    absent = dict.fromkeys(FIGURES)
    values = {name: float(number) for number, name in enumerate(FIGURES, 10)}
    rows = [
        ClassRow("box", "gone", absent | {"objects": 0.0, "detections": 3.0}),
        ClassRow("box", "a <b>", values | {"ap": 20.0, "ap_large": None, "objects": 4.0, "detections": 5.0}),
        ClassRow("box", "sea", values | {"ap": 90.0, "objects": 2000.0, "detections": 6.0}),
    ]
    curves = {
        ("box", iou, name): np.linspace(100, 0, 101) for iou in ("0.50", "0.75", "mean") for name in ("a <b>", "sea")
    }
    counts = [
        dict(zip(("correct", *ERRORS), numbers, strict=True))
        for numbers in ((0, 1, 0, 0, 2, 0, 0), (2, 0, 1, 1, 1, 0, 1), (5, 0, 0, 0, 1, 0, 3))
    ]
    errors = [
        ClassRow("box", row.name, {name: float(n) for name, n in of_class.items()})
        for row, of_class in zip(rows, counts, strict=True)
    ]
    gains = dict(zip(("correct", *ERRORS), (55.5, 1.0, 2.0, 3.0, 4.25, 0.0, 6.0), strict=True))
    images = [ImageRow("/set/a.jpg", 2, 1, 0), ImageRow("/set/b.jpg", 2, 2, 0), ImageRow("/set/c.jpg", 2, 0, 4)]
    return BoxFiles(rows, curves, [*errors, ClassRow("box", ALL_CLASSES, gains)], images, Path("detections.json"))


def test_the_most_faults_are_the_worst():
    rows = make_files().images
    assert [row.file for row in rank_images(rows)] == ["/set/c.jpg", "/set/a.jpg"]
    assert [row.file for row in rank_images(rows, 1)] == ["/set/c.jpg"]


@pytest.mark.slow
def test_classes_and_errors_by_hand():
    from resnest_imagenet.reports.box_sections import render_boxes  # late: it imports torchvision

    text = render_boxes(make_files(), None)
    assert "<b>" not in text and "Masks" not in text and "worst" not in text
    tables = [
        [re.findall(r"<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", body)]
        for body in re.findall(r"<tbody>(.*?)</tbody>", text, re.DOTALL)
    ]
    by_class, of_all, errors_by_class = tables
    assert [row[0] for row in by_class] == ["sea", "a &lt;b&gt;", "gone"]
    assert [row[1].rpartition(" ")[2] for row in by_class] == ["90.00", "20.00", "absent"]
    # AP50 to AR100 are the second to sixth and the ninth of COCO's figures.
    assert by_class[1][2:] == ["11.00", "12.00", "13.00", "14.00", "", "18.00", "4", "5"]
    assert by_class[2][2:] == ["", "", "", "", "", "", "0", "3"] and by_class[0][-2] == "2,000"
    # 14 detections: 7 correct, 4 of background, one each of localisation, class and duplicates.
    figures = {row[0]: tuple(row[1:4]) for row in of_all}
    assert figures["correct"] == ("7", "50.0", "") and figures["background"] == ("4", "28.6", "4.25")
    assert figures["class"] == ("1", "7.1", "2.00") and figures["missed"] == ("4", "", "6.00")
    assert figures.keys() == {"correct", *ERRORS}
    assert errors_by_class[1] == ["a &lt;b&gt;", "2", "1", "0", "1", "1", "0", "1"]
    assert "points of AP50, which is 55.50" in text
