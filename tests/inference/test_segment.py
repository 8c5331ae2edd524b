"""Masks of images: what the network computes, in files that do not overwrite each other."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

import resnest_imagenet
from conftest import SCENE_COLOURS, compose_config, predict_classes
from resnest_imagenet.checkpoint import load_checkpoint, save_checkpoint
from resnest_imagenet.commands import predict as command
from resnest_imagenet.commands.predict import read_inputs, segment_images
from resnest_imagenet.config_reading import PredictConfig
from resnest_imagenet.data.scenes import make_palette
from resnest_imagenet.errors import CheckpointError, ConfigError, NonFiniteError
from resnest_imagenet.inference.segment import SegmentedImage, format_shares
from resnest_imagenet.models.deeplab import build_deeplab
from resnest_imagenet.reports.mask_pictures import ENDS, name_masks
from resnest_imagenet.weights.load import read_weights


def compose(*options):
    return compose_config("predict", PredictConfig, "device=cpu", *options)


def predict(*options):
    config = compose(*options)
    return segment_images(config, *read_inputs(config))


@pytest.fixture(scope="module")
def checkpoint(segmentation_run):
    return segmentation_run / "checkpoints/best.pt"


@pytest.fixture(scope="module")
def photos(segmentation_run):
    return segmentation_run.parent / "scenes/images/val"


def classify_by_hand(checkpoint, file):
    """Return the mask of an image by the network that the checkpoint's own entries describe."""
    content = load_checkpoint(checkpoint)
    recipe = content["config"]["train"]
    options = {name: recipe[name] for name in ("output_stride", "rates")}
    model = build_deeplab("resnest14_half", 6, channels=recipe["head_channels"], **options).double()
    model.load_state_dict(content["model"])
    pixels = np.asarray(Image.open(file).convert("RGB")) / 255
    images = (pixels - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    with torch.no_grad():
        return model.eval()(torch.tensor(images).permute(2, 0, 1)[None])[0].argmax(0).numpy()


@pytest.mark.slow
@pytest.mark.process
def test_writes_the_networks_mask_in_three_pictures_of_each_image(checkpoint, photos, tmp_path, capsys, monkeypatch):
    arguments = [f"ckpt={checkpoint}", f"images={photos}", f"out={tmp_path}/masks", "top=2", "device=cpu"]
    monkeypatch.setattr(sys, "argv", ["resnest-predict", *arguments])
    command.main()
    printed = capsys.readouterr()
    files = sorted(photos.iterdir())
    names = {file.stem + end for file in files for end in (".png", "_colours.png", "_overlay.png")}
    assert {path.name for path in (tmp_path / "masks").iterdir()} == names and len(names) == 9
    expected = []
    for file in files:
        index, colours, overlay = (Image.open(tmp_path / "masks" / (file.stem + end)) for end in ENDS)
        mask = np.asarray(index)
        by_hand = classify_by_hand(checkpoint, file)
        assert (mask == by_hand).mean() > 0.999 and len(np.unique(mask)) > 1
        # The palette of the masks that the network was trained on has come through the checkpoint.
        assert index.mode == "P" and index.getpalette("RGB")[:18] == SCENE_COLOURS.ravel().tolist()
        assert (np.asarray(colours) == SCENE_COLOURS[mask]).all()
        half = (np.asarray(Image.open(file), np.float64) + SCENE_COLOURS[mask]) / 2
        assert np.abs(np.asarray(overlay) - half).max() <= 1
        expected.append(str(file))
        counts = np.bincount(mask.ravel(), minlength=6)
        classes = ["background", "cross", "disk", "stripes", "target", "triangle"]
        largest = sorted(zip(-counts, range(6), strict=True))[:2]
        expected += [f"  {-100 * count / mask.size:>6.2f} %  {classes[label]}" for count, label in largest if count]
    expected.append(f"masks, colours and overlays in {tmp_path}/masks: 3 of each")
    assert printed.out.splitlines() == expected and printed.err == ""


@pytest.mark.slow
@pytest.mark.process
def test_the_library_returns_the_same_masks(checkpoint, photos, tmp_path):
    predict(f"ckpt={checkpoint}", f"images={photos}", f"out={tmp_path}")
    opened = resnest_imagenet.open_segmenter(checkpoint, device="cpu")
    for network in (checkpoint, opened):
        segmented = resnest_imagenet.segment(network, photos)
        assert segmented.skipped == () and len(segmented) == 3
        for image in segmented:
            written = np.asarray(Image.open(tmp_path / f"{image.file.rpartition('/')[2].partition('.')[0]}.png"))
            assert np.array_equal(image.mask, written)
            assert np.array_equal(image.pixels, np.asarray(Image.open(image.file)))
    with pytest.raises(
        ConfigError, match=r"^the network is a DeepLabV3: give what open_segmenter\(\.\.\.\) returns, or"
    ):
        resnest_imagenet.segment(build_deeplab("resnest14_half", 3), photos)
    with pytest.raises(ConfigError, match="^precision='half': input should be"):
        resnest_imagenet.segment(opened, photos, precision="half")


@pytest.mark.slow
@pytest.mark.process
def test_protocols(checkpoint, photos):
    """A run that is evaluated on centre crops still has a class for every pixel."""
    file = min(photos.iterdir())
    masks = {}
    for name, protocol in {
        "own": None,
        "whole": {"name": "whole"},
        "centre": {"name": "centre"},
        "slide": {"name": "slide", "crop": 48},
    }.items():
        network = resnest_imagenet.open_segmenter(checkpoint, protocol=protocol, device="cpu")
        (image,) = resnest_imagenet.segment(network, file)
        assert image.mask.shape == image.pixels.shape[:2]
        masks[name] = image.mask
    assert np.array_equal(masks["own"], masks["whole"]) and np.array_equal(masks["own"], masks["centre"])
    assert not np.array_equal(masks["own"], masks["slide"])
    text, _ = predict(f"ckpt={checkpoint}", f"images={file}", "protocol=slide", "protocol.crop=48", "top=6")
    assert text == format_shares(SegmentedImage(str(file), image.pixels, masks["slide"]), network.classes, 6)


@pytest.mark.slow
@pytest.mark.process
def test_bad_images_are_named_and_skipped(checkpoint, photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    images = f"images=[{tmp_path},{photos}]"
    arguments = [f"ckpt={checkpoint}", images, f"out={tmp_path}/out", "device=cpu"]
    monkeypatch.setattr(sys, "argv", ["resnest-predict", *arguments])
    with pytest.raises(SystemExit, match="^3$"):
        command.main()
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        f"{tmp_path}/bad.jpg: not a readable image (of no known format); skipped",
        "resnest-predict: images skipped: 1",
    ]
    assert len(list((tmp_path / "out").rglob("*.png"))) == 9
    text, skipped = predict(f"ckpt={checkpoint}", f"images={tmp_path}/bad.jpg", f"out={tmp_path}/none")
    assert text == "" and len(skipped) == 1


@pytest.mark.slow
def test_refusals(checkpoint, photos, tmp_path):
    given = (f"ckpt={checkpoint}", f"images={photos}")
    for option, message in {
        "crop=64": "^crop is of classification: .*best.pt is of segmentation, and sees images at their own size",
        "model=resnest14_half": "^model is of classification: ",
        "loader.workers=1": "^loader is of classification: ",
        "tta=flip": "^tta=flip is of classification: .*best.pt is of segmentation: protocol.flip=true sees ",
        "loader=dali": "^loader is of classification: |^loader=dali",
        "protocol=paper": "^protocol is of classification: choose own, whole, slide, centre or published$",
        f"out={tmp_path}/out.csv": r"out.csv: masks need a folder, and a table is of classification$",
        f"out={photos}": "val holds images that are asked about: choose another folder$",
        f"out={photos.parent}": "images holds images that are asked about: choose another folder$",
    }.items():
        with pytest.raises(ConfigError, match=message) as error:
            predict(*given, option)
        assert "\n" not in str(error.value)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="^out=.*file/pictures: cannot be written"):
        predict(*given, f"out={tmp_path}/file")


def test_a_network_of_classification_takes_none_of_these_protocols(tmp_path):
    path = tmp_path / "bare.pth"
    save_checkpoint(resnest_imagenet.build_model("resnest14_half", 3).state_dict(), path)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    config = compose(f"ckpt={path}", "model=resnest14_half", f"images={tmp_path}/a.png", "protocol=whole")
    with pytest.raises(
        ConfigError, match="^protocol=whole is of segmentation: choose own, paper, ecentercrop or full$"
    ):
        predict_classes(config)


@pytest.mark.slow
def test_a_checkpoint_without_colours_gets_the_usual_ones(checkpoint, tmp_path):
    content = load_checkpoint(checkpoint)
    classes = tuple(content["classes"])
    own = SCENE_COLOURS.tolist()
    for palette, expected in ((own, own), (own[:5], None), ([[1, 2, 256]] * 6, None), ("red", None), (None, None)):
        save_checkpoint({**content, "palette": palette}, tmp_path / "best.pt")
        weights = read_weights(tmp_path / "best.pt", tasks=("segmentation",))
        assert weights.palette == expected
    opened = resnest_imagenet.open_segmenter(weights, device="cpu")
    assert np.array_equal(opened.palette, make_palette(classes)) and opened.palette.dtype == np.uint8


def test_pictures_never_overwrite_each_other():
    assert name_masks([]) == []
    assert name_masks(["/x/a.jpg"]) == ["a"]
    assert name_masks(["/x/a/1.jpg", "/x/b/1.jpg"]) == ["a/1", "b/1"]
    assert name_masks(["/x/a.jpg", "/x/a.png", "/x/b.jpg"]) == ["a.jpg", "a.png", "b"]
    assert name_masks(["/x/a.jpg", "/x/a_overlay.jpg"]) == ["a.jpg", "a_overlay.jpg"]
    for files in (
        ["/x/a.jpg", "/x/a.png", "/x/a.jpg.jpg", "/x/a.jpg-2", "/x/a.jpg_colours.png"],
        ["/x/a", "/x/a_colours", "/x/a_overlay", "/x/a_colours_overlay"],
        ["/x/a.jpg.jpg", "/x/a.jpg", "/x/a.png", "/x/a.jpg.png", "/x/a.png.png"],
    ):
        stems = name_masks(files)
        pictures = [stem + end for stem in stems for end in ENDS]
        assert len(stems) == len(files) and len(set(pictures)) == len(pictures)


def test_shares_are_of_all_pixels_and_the_largest_come_first():
    mask = np.array([[2, 2, 2, 0], [2, 2, 2, 1]], np.uint8)
    image = SegmentedImage("a\x1b.jpg", np.zeros((2, 4, 3), np.uint8), mask)
    assert image.share_classes(4).tolist() == [0.125, 0.125, 0.75, 0]
    assert format_shares(image, ["sky", "tree", "road", "car"], 4).splitlines() == [
        "a\\x1b.jpg",
        "   75.00 %  road",
        "   12.50 %  sky",
        "   12.50 %  tree",
    ]
    assert len(format_shares(image, ["sky", "tree", "road", "car"], 1).splitlines()) == 2


@pytest.mark.slow
@pytest.mark.process
def test_scores_that_are_not_finite_name_the_image(checkpoint, photos):
    opened = resnest_imagenet.open_segmenter(checkpoint, device="cpu")
    opened.module.head.classify.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"JPEG: its logits are not finite in fp32"):
        list(resnest_imagenet.segment(opened, photos))


@pytest.mark.slow
def test_another_tasks_network_is_refused(tmp_path, checkpoint):
    with pytest.raises(
        CheckpointError,
        match="best.pt: a checkpoint of task segmentation, not of classification: resnest-eval, resnest-predict, "
        "resnest-compare and resnest-export take it$",
    ):
        resnest_imagenet.open_classifier(checkpoint)
    config = {"model": {"name": "resnest14_half"}, "train": {}}
    model = resnest_imagenet.build_model("resnest14_half", 2).state_dict()
    save_checkpoint({"model": model, "config": config, "classes": ["a", "b"], "epoch": 1}, tmp_path / "best.pt")
    with pytest.raises(
        CheckpointError,
        match="a checkpoint of task classification, not of segmentation: start a run from it, train.init_from=...",
    ):
        resnest_imagenet.open_segmenter(tmp_path / "best.pt")
