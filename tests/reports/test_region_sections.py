"""What a report has about a run of segmentation, read from its folder and looked at in a real browser."""

import base64
import html
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import resnest_imagenet
from browser import look_in_windows, needs_browser
from conftest import CPU, SCENE_COLOURS
from resnest_imagenet.evaluation.region_files import NamedRegions
from resnest_imagenet.evaluation.regions import Regions
from resnest_imagenet.inference.worst_scenes import WorstScene, WorstScenes, rank_scenes
from resnest_imagenet.reports.runs import read_run

CLASSES = ["background", "cross", "disk", "stripes", "target", "triangle"]


def write(folder, recipes, out):
    from resnest_imagenet.reports.report import write_report  # late: it imports torchvision

    write_report([read_run(folder, recipes)], out, device="cpu")
    return out.read_text()


@pytest.fixture(scope="module")
def page(segmentation_run, recipes, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    write(segmentation_run, recipes, out)
    return out


def read_pictures(text):
    """Return the pictures of each scene, and the lines below them."""
    for strip in re.findall(r'<figure class="strip">(.*?)</figure>', text, re.DOTALL):
        encoded = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', strip)
        caption = html.unescape(re.search("<figcaption>(.*?)</figcaption>", strip)[1])
        yield [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), np.float64) for data in encoded], caption


def blend(image, mask):
    return np.where((mask == 255)[..., None], image, (image + SCENE_COLOURS[np.where(mask == 255, 0, mask)]) / 2)


@pytest.mark.slow
@pytest.mark.process
def test_the_page_has_what_the_evaluation_counted_and_the_scenes_with_both_masks(page, segmentation_run):
    text = page.read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", text) and "<script" not in text
    assert "Table 3" not in text and "top-1" not in text
    events = [json.loads(line) for line in (segmentation_run / "metrics.jsonl").read_text().splitlines()]
    best = max((event for event in events if event["event"] == "eval"), key=lambda event: event["miou"])
    assert (
        f"<td>{best['miou']:.2f}</td><td>{best['miou_present']:.2f}</td><td>{best['pixel_accuracy']:.2f}</td>" in text
    )
    # The cost is DeepLabV3's, not that of the backbone's classifier.
    model = resnest_imagenet.open_segmenter(segmentation_run / "checkpoints/best.pt", device="cpu").module
    counted = float(re.search(r"<td>([\d.]+)</td><td>[\d.]+ at 64</td><td>2 of 2</td>", text)[1])
    assert counted == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, rel=0.02)

    rows = (segmentation_run / "scenes.csv").read_text().splitlines()[1:]
    scenes = [(row.split(",")[-3].strip('"'), *map(int, row.split(",")[-2:])) for row in rows]
    scenes.sort(key=lambda scene: scene[1] / scene[2])
    strips = list(read_pictures(text))
    assert len(strips) == len(scenes) == 3
    for (file, correct, labelled), ((image, truth, prediction), caption) in zip(scenes, strips, strict=True):
        assert caption.startswith(f"<div class=right>{file.rpartition('/')[2]}: {100 * correct / labelled:.1f} % of")
        pixels = np.asarray(Image.open(file), np.float64)
        mask = np.asarray(Image.open(file.replace("/images/", "/masks/").replace(".JPEG", ".png")))
        (segmented,) = resnest_imagenet.segment(segmentation_run / "checkpoints/best.pt", file)
        # JPEG changes sharp edges.
        assert np.abs(image - pixels).mean() < 6
        assert np.abs(truth - blend(pixels, mask)).mean() < 6
        assert np.abs(prediction - blend(pixels, segmented.mask)).mean() < 6
        assert np.abs(truth - blend(pixels, segmented.mask)).mean() > 6
    legend = re.search(r'<ul class="legend">(.*?)</ul>', text)[1]
    for name, colour in re.findall(r"<li>.*?</i>([^<]*)</li>|rgb\((.*?)\)", legend):
        assert name in ("", *CLASSES)
        assert not colour or colour in {",".join(map(str, row)) for row in SCENE_COLOURS.tolist()}


@needs_browser
@pytest.mark.slow
@pytest.mark.process
def test_the_page_in_a_browser(page):
    widths = (1280, 400)
    for width, seen in zip(widths, look_in_windows(page, widths), strict=True):
        titles = [label.partition(":")[0] for label in seen["charts"]]
        assert titles[:2] == ["Loss", "mIoU after each epoch"] and titles[-1].startswith("Confusion matrix")
        assert (seen["pictures"], seen["loaded"]) == (9, [])
        assert (seen["width"] <= width, seen["outside"]) == (True, [])


@pytest.mark.slow
@pytest.mark.process
def test_what_is_gone_is_a_line_in_the_page(segmentation_run, recipes, tmp_path):
    shutil.copytree(segmentation_run, tmp_path / "run")
    scenes = (tmp_path / "run/scenes.csv").read_text()
    (tmp_path / "run/scenes.csv").write_text(scenes.replace("/images/val/", "/images/val/moved/"))
    text = write(tmp_path / "run", recipes, tmp_path / "report.html")
    assert text.count("(no picture: ") == 3 and "moved" in text and "IoU by class" in text
    # An evaluation of resnest-eval beside it is none of a classifier.
    results = {"task": "segmentation", "results": [{"protocol": "whole, own size", "miou": 50.0}]}
    (tmp_path / "run/eval.json").write_text(json.dumps(results, indent=2))
    (tmp_path / "run/checkpoints/best.pt").unlink()
    run = read_run(tmp_path / "run", recipes)
    assert run.measured == []
    from resnest_imagenet.reports.region_sections import view_scenes  # late: it imports torchvision

    (line,) = view_scenes(run, CPU)
    assert "best.pt" in line and f"<p>No pictures: {line}</p>" in render(run.regions[0], line)
    run.config["data.kind"] = "other"
    assert view_scenes(run, CPU)[0].startswith("unknown data.kind=other")


def make_evaluation():
    """Four classes, the last of which is not in the ground truth."""
    matrix = np.array([[50, 0, 10, 0], [0, 5, 1, 4], [20, 0, 110, 0], [0, 0, 0, 0]])
    correct, labelled = np.array([90, 0, 5, 70]), np.array([90, 0, 10, 100])
    files = tuple(f"/set/images/val/{number}.jpg" for number in range(4))
    return NamedRegions("whole, own size", ("sky", "a <b>", "sea", "gone"), files, Regions(matrix, correct, labelled))


def render(evaluation, worst=None):
    from resnest_imagenet.reports.region_sections import render_regions  # late: it imports torchvision

    return render_regions(evaluation, worst)


@pytest.mark.slow
def test_classes_and_confusions_by_hand():
    text = render(make_evaluation())
    assert "<b>" not in text
    assert "whole, own size; 35 of 200 labelled pixels wrong." in text
    by_class, pairs = re.findall(r"<tbody>(.*?)</tbody>", text, re.DOTALL)
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", by_class)]
    # 110 of 141, 50 of 80, 5 of 10; what is absent comes last, though something was taken for it.
    assert [row[0] for row in rows] == ["sea", "sky", "a &lt;b&gt;", "gone"]
    assert [row[1].rpartition(" ")[2] for row in rows] == ["78.01", "62.50", "50.00", "absent"]
    assert [row[2].rpartition(" ")[2] for row in rows] == ["65.00", "30.00", "5.00", "0.00"]
    assert [row[3] for row in rows] == ["130", "60", "10", "0"]
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", pairs)]
    assert cells[0] == ["sea", "sky", "20", "15.4", "10.00"] and cells[1][:3] == ["sky", "sea", "10"]
    assert len(cells) == 4


def test_the_lowest_share_of_right_pixels_is_the_worst():
    regions = make_evaluation().regions
    assert rank_scenes(regions, 9) == [2, 3] and rank_scenes(regions, 1) == [2]


@pytest.mark.slow
def test_a_scene_that_is_gone_leaves_the_others():
    from resnest_imagenet.inference.segment import SegmentedImage

    mask, truth = np.array([[0, 1, 1], [2, 2, 2]], np.uint8), np.array([[0, 0, 1], [255, 0, 2]], np.uint8)
    image = SegmentedImage("/set/images/val/2.jpg", np.zeros((2, 3, 3), np.uint8), mask)
    shown = WorstScene(image.file, 50, image, truth)
    gone = WorstScene("/set/images/val/3.jpg", 70, fault="it is <gone>")
    palette = np.array([[0, 0, 0], [1, 2, 3], [4, 5, 6], [7, 8, 9]], np.uint8)
    text = render(make_evaluation(), WorstScenes((shown, gone), "whole, own size", palette))
    assert text.count("<img ") == 3 and "3.jpg: 70.0 % of the pixels right" in text and "it is &lt;gone&gt;" in text
    assert "sky taken for a &lt;b&gt;: 20.0 %; sky taken for sea: 20.0 %" in text
    legend = re.search(r'<ul class="legend">(.*?)</ul>', text)[1]
    assert re.findall("</i>(.*?)</li>", legend) == ["sky", "a &lt;b&gt;", "sea", "not labelled: as in the image"]
