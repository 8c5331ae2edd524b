"""Detectors of other programs: their numbers, all 17 rows' names, and each way in which a file does not fit."""

import functools
import json
import pickle
import re
from dataclasses import replace

import pytest
import torch

import detectron2_names as d2
from resnest_imagenet.checkpoint import save_checkpoint
from resnest_imagenet.errors import CheckpointError, ConfigError
from resnest_imagenet.weights.load import Weights, read_weights

NAME, LAYERS = "resnest14_half", (1, 1, 1, 1)
SMALL = {"planes": 32, "channels": 8, "width": 16}
WIDTHS = {"channels": 8, "box_width": 16}


@functools.cache
def draw_small(cascade=False, masks=False, classes=80, **options):
    """Return the tensors of a small detector under detectron2's names."""
    settings = {**SMALL, "cascade": cascade, "masks": masks, "classes": classes, **options}
    return d2.draw_tensors(d2.list_tensors(LAYERS, 16, **settings), dtype=torch.float32)


def write_pickle(path, tensors):
    """Write a file as detectron2's model zoo has it."""
    arrays = {key: value.numpy() for key, value in tensors.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "detectron2"}))
    return path


def write_checkpoint(path, tensors):
    """Write a file as its training does: counters of batches, and what is beside the network."""
    counters = {f"{key.removesuffix('running_mean')}num_batches_tracked": torch.tensor(7) for key in tensors
                if key.endswith("running_mean")}  # fmt: skip
    buffers = {
        "pixel_mean": torch.tensor([123.68, 116.779, 103.939]).view(3, 1, 1),
        "pixel_std": torch.tensor([58.393, 57.12, 57.375]).view(3, 1, 1),
        "proposal_generator.anchor_generator.cell_anchors.0": torch.tensor(
            [[-22.6274, -11.3137, 22.6274, 11.3137], [-16.0, -16, 16, 16], [-11.3137, -22.6274, 11.3137, 22.6274]]
        ),
    }
    save_checkpoint({"model": {**tensors, **counters, **buffers}, "iteration": 89999}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "options"),
    [
        (write_pickle, {"cascade": True, "masks": True}),
        (write_checkpoint, {"masks": True}),
        (write_checkpoint, {"norms": False, "convs": 0, "fcs": 2}),  # detectron2's own Faster R-CNN
    ],
    ids=["cascade mask, pkl", "mask, pth", "two fully connected layers"],
)
def test_a_file_computes_what_detectron2_would(write, options, tmp_path):
    """From pixels to logits, part by part, in float64."""
    from resnest_imagenet.inference.detector import open_detector

    tensors = draw_small(**options)
    detector = open_detector(write(tmp_path / f"a.{'pkl' if write is write_pickle else 'pth'}", tensors))
    assert (detector.name, len(detector.classes), detector.classes[-1]) == (NAME, 80, "toothbrush")
    assert detector.category_ids[:12] == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13) and detector.category_ids[-1] == 90
    assert detector.finds_masks == options.get("masks", False)
    assert detector.protocol.short_side == 800 and detector.weights.training is None
    model, s = detector.module.double(), {key: value.double() for key, value in tensors.items()}
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=generator)
    levels = d2.run_pyramid(d2.run_bottom_up(images, s, LAYERS), s)
    check = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    for ours, expected in zip(model.pyramid(images), levels, strict=True):
        check(ours, expected)
    for objectness, differences, level in zip(*model.rpn.head(levels), levels, strict=True):
        for ours, expected in zip((objectness, differences), d2.run_rpn(level, s), strict=True):
            check(ours, expected)
    pooled = torch.randn(5, 8, 7, 7, dtype=torch.float64, generator=generator)
    stages = model.roi_heads.box_heads
    assert len(stages) == (3 if options.get("cascade") else 1)
    for number, stage in enumerate(stages):
        logits, differences = stage(pooled)
        expected, boxes = d2.run_box_head(pooled, s, f".{number}" if options.get("cascade") else "")
        check(logits[:, 0], expected[:, -1])  # the background
        check(logits[:, 1:], expected[:, :-1])
        check(differences, boxes)
    if options.get("masks"):
        pooled = torch.randn(3, 8, 14, 14, dtype=torch.float64, generator=generator)
        check(model.roi_heads.masks(pooled), d2.run_mask_head(pooled, s))


RESNESTS = {"resnest50": ((3, 4, 6, 3), 32), "resnest101": ((3, 4, 23, 3), 64), "resnest200": ((3, 24, 36, 3), 64)}
RESNETS = {"resnet50_msra": (3, 4, 6, 3), "resnet101_msra": (3, 4, 23, 3)}
# Parameters in millions of the 17 rows, counted from the authors' configurations: Faster, Cascade, Mask, Cascade Mask.
ROWS = {
    "resnet50_msra": (43.067, 73.332, 45.711, 75.976),
    "resnet101_msra": (62.059, 92.324, 64.703, 94.968),
    "resnest50": (44.993, 75.258, 47.637, 77.903),
    "resnest101": (65.785, 96.050, 68.429, 98.694),
    "resnest200": (None, 117.977, None, None),
}
CASES = [
    (name, bool(kind % 2), kind > 1, millions)
    for name, counts in ROWS.items()
    for kind, millions in enumerate(counts)
    if millions is not None
]


@pytest.mark.slow
def test_names_of_the_17_rows():
    """The list by rule has as many parameters as the authors' networks, and is read as the row's network, whole."""
    from resnest_imagenet.models.rcnn_options import RCNNOptions
    from resnest_imagenet.weights.published_rcnn import adopt_rcnn

    assert len(CASES) == 17
    for name, cascade, masks, millions in CASES:
        layers, stem = RESNESTS.get(name) or (RESNETS[name], 0)
        shapes = d2.list_tensors(layers, stem, resnest=name in RESNESTS, cascade=cascade, masks=masks)
        with torch.device("meta"):
            tensors = {key: torch.empty(shape) for key, shape in shapes.items()}
        count = sum(value.numel() for key, value in tensors.items() if not key.endswith(d2.STATISTICS))
        assert count / 1e6 == pytest.approx(millions, abs=6e-4)
        weights = adopt_rcnn(Weights("a.pth", tensors))
        assert (weights.model, weights.task, len(weights.classes)) == (name, "detection", 80)
        # Of a network that is the row's, and of all of it: each key has a tensor, and no tensor is unused.
        row = RCNNOptions(cascade=cascade, masks=masks, head_norm="bn", class_agnostic=cascade)
        assert RCNNOptions(**{**weights.rcnn_options, "mask_convs": 4}) == row
        counters = [key for key in weights.tensors if key.endswith("num_batches_tracked")]
        assert len(weights.tensors) == len(tensors) + len(counters)


def without(key):
    return lambda tensors: {name: value for name, value in tensors.items() if name != key}


def with_(key, value):
    return lambda tensors: {**tensors, key: value}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            without("roi_heads.box_predictor.1.cls_score.bias"),
            "roi_heads.box_predictor.1.cls_score.bias is missing: not all the weights of a Cascade Mask R-CNN on resn",
        ),
        (
            without("backbone.bottom_up.res4.0.conv2.bn1.weight"),
            "backbone.bottom_up.res4.0.conv2.bn1.weight is missing",
        ),
        (without("backbone.fpn_lateral3.norm.running_var"), "backbone.fpn_lateral3.norm.running_var is missing"),
        (without("roi_heads.mask_head.deconv.bias"), "roi_heads.mask_head.deconv.bias is missing"),
        (with_("roi_heads.keypoint_head.fc.weight", torch.ones(1)), "unexpected key roi_heads.keypoint_head.fc.weight"),
        (
            with_("proposal_generator.rpn_head.anchor_deltas.bias", torch.ones(60)),
            r"proposal_generator.rpn_head.anchor_deltas.bias has shape \(60,\), not \(12,\)",
        ),
        (with_("pixel_std", torch.ones(3, 1, 1)), "pixel_std is not that of a detector on resnest14_half"),
        (
            with_("proposal_generator.anchor_generator.cell_anchors.1", torch.ones(3, 4)),
            "proposal_generator.anchor_generator.cell_anchors.1 is not that of a detector",
        ),
        (
            lambda s: {key.replace("res5.0", "res5.1"): value for key, value in s.items()},
            "a detector on a backbone that is not one of this project's networks",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_and_changes_nothing(damage, message):
    from resnest_imagenet.weights.published_rcnn import adopt_rcnn

    with pytest.raises(CheckpointError, match=f"^a.pth: {message}") as error:
        adopt_rcnn(Weights("a.pth", damage(draw_small(cascade=True, masks=True))))
    assert "\n" not in str(error.value)


def build(classes, seed=1, **options):
    from resnest_imagenet.models.rcnn import build_rcnn

    torch.manual_seed(seed)
    return build_rcnn(NAME, classes, norm="bn", **WIDTHS, **options)


def start(source, classes, **options):
    """Return a new network, its state before, and what it is started with."""
    from resnest_imagenet.weights.detection import start_rcnn

    model = build(len(classes), **options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    return model.state_dict(), before, start_rcnn(model, NAME, classes, source)


@pytest.mark.slow
def test_a_file_starts_a_run(tmp_path):
    """With COCO's classes whole, in any order; with others without their rows; a part with other layers not at all."""
    from resnest_imagenet.models.coco_classes import coco_classes

    tensors, source = draw_small(masks=True), write_pickle(tmp_path / "a.pkl", draw_small(masks=True))
    names = coco_classes()
    state, _, message = start(source, names[::-1], masks=True)
    assert message == "all of it"
    boxes, masks = tensors["roi_heads.box_predictor.bbox_pred.weight"], tensors["roi_heads.mask_head.predictor.bias"]
    scores = tensors["roi_heads.box_predictor.cls_score.weight"]
    assert torch.equal(state["roi_heads.stages.0.classify.weight"], scores.flip(0))
    assert torch.equal(state["roi_heads.stages.0.regress.weight"][:4], boxes[-4:])
    assert torch.equal(state["roi_heads.masks.predictor.mask_fcn_logits.bias"], masks.flip(0))
    assert torch.equal(state["backbone.conv1.3.weight"], tensors["backbone.bottom_up.stem.conv1_2.weight"])

    state, before, message = start(source, ["cat", "dog"], masks=True)
    assert message == "all of it but 6 tensors of other layers or classes"
    for key, value in state.items():
        skipped = any(part in key for part in ("classify", "regress", "mask_fcn_logits"))
        assert torch.equal(value, before[key]) == skipped or key.endswith("num_batches_tracked"), key

    state, before, message = start(source, names, box_convs=2)  # another box head
    stage = [key for key in state if key.startswith("roi_heads.stages.")]
    assert message == f"all of it but {len(stage)} tensors of other layers or classes"
    assert all(torch.equal(state[key], before[key]) for key in stage)
    assert torch.equal(state["rpn.head.cls_logits.bias"], tensors["proposal_generator.rpn_head.objectness_logits.bias"])


@pytest.mark.slow
def test_a_file_with_other_classes_starts_a_run_of_as_many(tmp_path):
    from resnest_imagenet.inference.detector import open_detector

    source = write_pickle(tmp_path / "a.pkl", draw_small(classes=2))
    assert start(source, ["cat", "dog"])[2] == "all of it"
    with pytest.raises(CheckpointError, match=r"a.pkl: it does not name its 2 classes: start a run from it"):
        open_detector(source)


@pytest.mark.slow
def test_another_network_is_not_started_from_a_file(tmp_path):
    from resnest_imagenet.weights.detection import start_rcnn

    model, source = build(2), write_pickle(tmp_path / "a.pkl", draw_small())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=f"^model=resnest14, but {re.escape(str(source))} holds a {NAME}$"):
        start_rcnn(model, "resnest14", ["cat", "dog"], source)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def classify(form, tmp_path, monkeypatch):
    """Return a source of a classification network of 5 classes, and its tensors."""
    from resnest_imagenet import build_model
    from resnest_imagenet.weights import published

    torch.manual_seed(2)
    state, path = build_model(NAME, 5).state_dict(), tmp_path / "best.pt"
    if form == "run":
        config = {"model": {"name": NAME}, "train": {}}
        content = {"model": state, "ema": None, "config": config, "classes": list("abcde"), "epoch": 1}
        save_checkpoint({**content, "task": "classification"}, path)
        return str(path), state
    save_checkpoint(state, path)
    names = {"official": "resnest14_half", "timm": "resnest14d.gluon_in1k"}
    monkeypatch.setitem(published.OFFICIAL, NAME, "0" * 8)
    monkeypatch.setattr(published, "_fetch_official", lambda *_: path)
    monkeypatch.setattr(published, "_fetch_timm", lambda *_: path)
    monkeypatch.setattr(published, "find_by_timm_name", lambda *_: NAME)
    return f"{form}:{names[form]}", state


@pytest.mark.slow
@pytest.mark.parametrize("form", ["run", "official", "timm"])
def test_a_classification_network_starts_the_backbone(form, tmp_path, monkeypatch):
    """The demo's best.pt, official:NAME and timm:NAME; what a host would send is a file here."""
    source, expected = classify(form, tmp_path, monkeypatch)
    state, before, message = start(source, ["cat", "dog"])
    assert message == "its backbone"
    for key, value in state.items():
        name = key.removeprefix("backbone.")
        assert torch.equal(value, expected[name] if key.startswith("backbone.") else before[key]), key


def of_caffe2(name):
    """Return what detectron2's file of MSRA's weights calls a tensor of the backbone, for its own name of it."""
    branch = {"shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}
    kind = {"weight": "gamma", "bias": "beta"}
    *block, layer, last = name.replace(".norm.", ".norm_").split(".")
    stem = "conv1" if block == ["stem"] else f"{block[0]}_{block[1]}_{branch[layer]}"
    if not last.startswith("norm_"):
        return f"{stem}_w"
    last = last.removeprefix("norm_")
    return f"{'res_' if stem == 'conv1' else ''}{stem}_bn_{kind.get(last, last)}"


@pytest.mark.slow
@pytest.mark.parametrize("caffe2", [True, False])
def test_msras_backbone(caffe2, tmp_path, monkeypatch):
    """detectron2's R-50.pkl, with its classifier and what nobody reads; the numbers are those of its strides."""
    from resnest_imagenet.models.rcnn import build_rcnn
    from resnest_imagenet.weights import load
    from resnest_imagenet.weights.detection import start_rcnn

    prefix, layers = "backbone.bottom_up.", RESNETS["resnet50_msra"]
    shapes = d2.list_tensors(layers, 0, resnest=False)
    shapes = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    tensors = d2.draw_tensors(shapes, dtype=torch.float32)
    file = {of_caffe2(key) if caffe2 else key: value for key, value in tensors.items()}
    if caffe2:
        assert {"conv1_w", "res_conv1_bn_gamma", "res2_0_branch1_bn_running_var", "res5_2_branch2c_bn_beta"} <= set(
            file
        )
        file |= {"fc1000_w": torch.ones(1000, 2048), "fc1000_b": torch.ones(1000), "conv1_b": torch.ones(64)}
        path = tmp_path / "R-50.pkl"
        path.write_bytes(pickle.dumps({key: value.numpy() for key, value in file.items()}))
    else:
        path = write_pickle(tmp_path / "R-50.pkl", file)
    model = build_rcnn("resnet50_msra", 2, norm="bn", **WIDTHS).eval()
    assert start_rcnn(model, "resnet50_msra", ["cat", "dog"], path) == "its backbone"
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        for ours, expected in zip(model.backbone(images), d2.run_bottom_up(images, tensors, layers, ""), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    if caffe2:
        monkeypatch.setattr(load, "list_models", lambda: ["resnet50", "resnet50_msra"])
        with pytest.raises(CheckpointError, match=r"not the weights of resnet50; they fit model=resnet50_msra$"):
            start_rcnn(build_rcnn("resnet50", 2, norm="bn", **WIDTHS), "resnet50", ["cat", "dog"], path)
        assert read_weights(path).tensors["conv1_b"].shape == (64,)


@pytest.mark.slow
def test_torchvisions_detectors_find_the_same(tmp_path):
    """maskrcnn_resnet50_fpn_v2: boxes, scores, classes and masks of an image; the ids without a class never win."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn_v2
    from torchvision.models.detection.image_list import ImageList

    from resnest_imagenet.inference.detector import open_detector
    from resnest_imagenet.models.coco_classes import coco_categories

    torch.manual_seed(0)
    network = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, box_score_thresh=0.014).eval()
    nothing = [number for number, name in enumerate(coco_categories(), 1) if name == "N/A"]
    assert nothing == [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
    with torch.no_grad():
        network.roi_heads.box_predictor.cls_score.weight.mul_(0.1)
        network.roi_heads.box_predictor.cls_score.bias.normal_()
        network.roi_heads.box_predictor.cls_score.bias[nothing] = -1e4
        network.roi_heads.box_predictor.bbox_pred.bias.normal_(std=0.5)
    torch.save(network.state_dict(), tmp_path / "a.pth")
    detector = open_detector(tmp_path / "a.pth", protocol={"min_score": 0.014})
    assert detector.name == "resnet50" and len(detector.classes) == 80
    images, sizes = torch.randn(1, 3, 64, 64), [(60, 56)]
    with torch.no_grad():
        features = network.backbone(images)
        proposals, _ = network.rpn(ImageList(images, sizes), features)
        (expected,), _ = network.roi_heads(features, proposals, sizes)
        (found,) = detector.module(images, sizes)
    numbers = [number for number in range(1, 91) if number not in nothing]
    assert len(found) > 20 and len(set(found.labels.tolist())) > 3 and len(found.boxes.round().unique(dim=0)) > 10
    assert [numbers[label] for label in found.labels] == expected["labels"].tolist()
    torch.testing.assert_close(found.scores, expected["scores"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.boxes, expected["boxes"], rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(found.masks, expected["masks"][:, 0], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_recipe_can_have_torchvisions_network():
    """With the options that it has otherwise, a run starts from all of the file."""
    from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2

    from conftest import compose_config
    from resnest_imagenet.config import TrainConfig
    from resnest_imagenet.models.rcnn_options import RCNNOptions
    from resnest_imagenet.weights.detection import read_options
    from resnest_imagenet.weights.published_rcnn import adopt_rcnn

    options = ["rpn_convs=2", "anchors_rounded=true", "aligned=false", "sampling=2"]
    options = ["+experiment=faster_rcnn_resnet50", "model=resnet50", *(f"train.{option}" for option in options)]
    config = compose_config("train", TrainConfig, *options, "data.root=/coco")
    recipe = RCNNOptions(**read_options(config.train.model_dump(), config.protocol.model_dump()))
    with torch.device("meta"):
        weights = adopt_rcnn(Weights("a.pth", fasterrcnn_resnet50_fpn_v2(weights_backbone=None).state_dict()))
    torchvisions = RCNNOptions(**{**weights.rcnn_options, "mask_convs": 4, "norm": "sync", "head_norm": None})
    lists = {"anchor_sizes": torchvisions.anchor_sizes}
    assert weights.model == "resnet50" and replace(recipe, **lists) == torchvisions


@pytest.mark.slow
def test_resnest_eval_takes_a_file(tmp_path, capsys):
    """By names of classes and COCO's ids; the results say that no run of this project trained it."""
    pytest.importorskip("pycocotools")
    from coco_files import describe_image, describe_object, write_part
    from conftest import compose_config
    from resnest_imagenet.commands import evaluate
    from resnest_imagenet.config_reading import EvalConfig
    from resnest_imagenet.models.coco_classes import coco_categories

    categories = [{"id": k, "name": name} for k, name in enumerate(coco_categories(), 1) if name != "N/A"]
    root = write_part(tmp_path, "val", [describe_image(1)], [describe_object(1, 1, category=90)], categories)
    source = write_pickle(tmp_path / "a.pkl", draw_small(cascade=True))
    files = {name: tmp_path / f"{name}.json" for name in ("out", "predictions")}
    options = [f"{name}={path}" for name, path in files.items()]
    shown = ["protocol=coco", "protocol.short_side=32", "protocol.longest=64", "protocol.min_score=0"]
    options += [f"ckpt={source}", f"data.root={root}", "loader.workers=0", "device=cpu", *shown]
    evaluate.run(compose_config("eval", EvalConfig, *options))
    out = capsys.readouterr().out
    assert "1 images, 1 objects: short side 32, long side at most 64, scores above 0," in out
    results, detections = (json.loads(path.read_bytes()) for path in files.values())
    assert (results["model"], results["training"], results["ckpt"]) == (NAME, None, str(source))
    assert len(results["results"][0]["ap_per_class"]["box"]) == 80
    assert {detection["category_id"] for detection in detections} <= {category["id"] for category in categories}
    assert len(detections) == 100


def test_torchvisions_first_version_is_refused():
    from resnest_imagenet.weights.published_rcnn import adopt_rcnn

    tensors = {key: torch.ones(1) for key in ("backbone.body.conv1.weight", "roi_heads.box_head.fc6.weight")}
    with pytest.raises(CheckpointError, match="^a.pth: of torchvision's first version .*: take fasterrcnn_res"):
        adopt_rcnn(Weights("a.pth", tensors))
