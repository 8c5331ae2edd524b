import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from conftest import compose_config
from resnest_imagenet.config_data import PreviewDataConfig
from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.data.loader import build_loader
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.transforms import MEAN, STD
from resnest_imagenet.errors import DataError
from resnest_imagenet.tasks.classification import build_train_transform
from scene_files import write_masks


@pytest.mark.parametrize("name", ["dali", "torchvision"])
@pytest.mark.process
def test_the_sheet_shows_what_the_run_will_see(name, demo_images, tmp_path):
    """The first, the middle and the last image: their pixels in the second epoch of a run of the same seed."""
    from resnest_imagenet.tasks.preview import CAPTION, LINE, MARGIN, write_preview  # late: it imports torchvision

    out = tmp_path / "new" / "sheet.png"
    options = (f"data.root={demo_images}", f"out={out}", "images=3", "epochs=2", "train.crop=40", "seed=5")
    config = compose_config("data_preview", PreviewDataConfig, *options, f"loader={name}", "loader.workers=1")
    assert write_preview(config) == 3
    sheet = np.array(Image.open(out))
    side = 4 * 40  # a small crop is enlarged
    height = side + MARGIN + CAPTION + 2 * LINE
    assert sheet.shape == (3 * height, 3 * (side + MARGIN) + MARGIN, 3)
    train = read_image_folder(str(demo_images), "train", "x")
    transform = build_train_transform(config.train, seed=5)
    plan = BatchPlan(len(train), 1, len(train))
    batches = list(build_loader(name, train, plan, transform, torch.device("cpu"), 1).batches(epoch=1))
    left = MARGIN + 2 * (side + MARGIN)
    for row, sample in enumerate((0, 51, 102)):
        top = row * height + CAPTION
        pixels = (batches[sample][0][0].permute(1, 2, 0).numpy() * STD + MEAN).round().clip(0, 255)
        expected = pixels.repeat(4, axis=0).repeat(4, axis=1)
        np.testing.assert_array_equal(sheet[top : top + side, left : left + side], expected)
        assert (sheet[top + side : top + side + 2 * LINE, left : left + side] < 128).any()  # words
        original = ImageOps.contain(Image.open(train.name(sample)), (side, side))
        shown = sheet[top : top + original.height, MARGIN : MARGIN + original.width]
        np.testing.assert_array_equal(shown, np.array(original))


def test_a_bad_image_is_named(tmp_path):
    from resnest_imagenet.tasks.preview import write_preview  # late: it imports torchvision

    (tmp_path / "train" / "x").mkdir(parents=True)
    (tmp_path / "train" / "x" / "0.jpg").write_text("<html>")
    config = compose_config("data_preview", PreviewDataConfig, f"data.root={tmp_path}", f"out={tmp_path / 'sheet.png'}")
    with pytest.raises(DataError, match="x/0.jpg: not a readable image"):
        write_preview(config)


def test_scenes_are_under_their_masks_after_the_same_crop(tmp_path):
    """Each cell is made from the files by the transform itself, at the mask's labelled pixels half its colour."""
    from resnest_imagenet.data.geometry import SceneTransform
    from resnest_imagenet.tasks.preview import CAPTION, MARGIN, write_preview  # late: it imports torchvision

    root, out = write_masks(tmp_path / "set"), tmp_path / "sheet.png"
    options = ("+experiment=demo_segmentation", f"data.root={root}", f"out={out}", "images=2", "epochs=2", "seed=5")
    sizes = ("train.crop=40", "train.base=48", "train.blur=0.5", "loader=dali", "loader.workers=0", "device=cpu")
    config = compose_config("data_preview", PreviewDataConfig, *options, *sizes)
    assert write_preview(config) == 2
    sheet = np.array(Image.open(out)).astype(int)
    side = 4 * 40  # a small crop is enlarged
    assert sheet.shape == (2 * (side + MARGIN + CAPTION), 3 * (side + MARGIN) + MARGIN, 3)
    recipe = config.train
    transform = SceneTransform(40, 48, 5, tuple(recipe.scales), recipe.blur)
    colours = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0)}  # PASCAL VOC's
    for row, sample in enumerate((0, 2)):
        picture = Image.open(root / f"images/train/{sample}.jpg").convert("RGB")
        mask = np.array(Image.open(root / f"masks/train/{sample}.png"))
        top = row * (side + MARGIN + CAPTION) + CAPTION
        for epoch in range(2):
            left = MARGIN + (1 + epoch) * (side + MARGIN)
            shown = sheet[top : top + side : 4, left : left + side : 4]
            pixels, labels = transform.apply(picture, mask, epoch, sample)
            assert (labels == 255).any() and (labels < 3).any()
            expected = pixels.astype(float)
            for label, colour in colours.items():
                expected[labels == label] = (expected[labels == label] + colour) / 2
            assert np.abs(shown - expected).max() <= 1


def test_a_bad_mask_is_named(tmp_path):
    from resnest_imagenet.tasks.preview import write_preview  # late: it imports torchvision

    root = write_masks(tmp_path)
    (root / "masks/train/0.png").write_text("<html>")
    options = ("+experiment=demo_segmentation", f"data.root={root}", f"out={tmp_path / 'sheet.png'}", "device=cpu")
    config = compose_config("data_preview", PreviewDataConfig, *options)
    with pytest.raises(DataError, match=r"0\.jpg: its mask .*0\.png: "):
        write_preview(config)


def test_objects_have_their_boxes_after_the_same_flip_and_scale(demo_objects, tmp_path):
    """Each cell is made from the files by the transform itself; along the lower edge of a box is its class's colour."""
    from resnest_imagenet.data.coco import open_coco
    from resnest_imagenet.data.instance_geometry import InstanceTransform
    from resnest_imagenet.evaluation.box_pictures import make_box_palette
    from resnest_imagenet.tasks.preview import CAPTION, MARGIN, write_preview  # late: it imports torchvision

    out, options = tmp_path / "sheet.png", ("+experiment=demo_detection", "images=2", "epochs=2", "seed=5")
    sizes = ("train.short_sides=[90,100,120]", "train.longest=140", "loader.workers=0", "device=cpu")
    places = (f"data.root={demo_objects}", f"out={out}")
    config = compose_config("data_preview", PreviewDataConfig, *options, *sizes, *places)
    assert write_preview(config) == 2
    sheet = np.array(Image.open(out)).astype(int)
    assert sheet.shape == (2 * (140 + MARGIN + CAPTION), 3 * (140 + MARGIN) + MARGIN, 3)
    instances = open_coco(str(demo_objects), "train")
    transform, palette = InstanceTransform(5, (90, 100, 120), 140), make_box_palette(5)
    for row, sample in enumerate((0, len(instances) - 1)):
        top = row * (140 + MARGIN + CAPTION) + CAPTION
        for epoch in range(2):
            left = MARGIN + (1 + epoch) * (140 + MARGIN)
            pixels, target = transform.apply(instances.read(sample), *instances.objects(sample), epoch, sample)
            shown = sheet[top : top + pixels.shape[0], left : left + pixels.shape[1]]
            # Boxes and names cover a part of it; of another size or flip nearly nothing would be equal.
            assert (np.abs(shown - pixels.astype(int)).max(2) <= 1).mean() > 0.4
            edge = shown[int(np.ceil(target.boxes[0, 3].item())) - 1]
            assert (edge == palette[target.labels[0]]).all(1).sum() > 4


def test_what_was_drawn_is_said_in_words():
    """Of draws that are made by hand."""
    from resnest_imagenet.data.augment import Op, describe_operations
    from resnest_imagenet.data.transforms import TrainTransform

    rows = [(Op.IDENTITY, 0), (Op.POSTERIZE, 2), (Op.ROTATE, 19.2), (Op.SHEAR_X_BICUBIC, -0.27), (Op.EQUALIZE, 0)]
    rows += [(Op.COLOR, 1.54), (Op.TRANSLATE_Y_REL, 0.13), (Op.SOLARIZE, 128), (Op.CUTOUT, 16)]
    assert describe_operations(np.array([(*row, 0, 0) for row in rows])) == [
        *("posterize 2 bits", "rotate +19°", "shear x -0.27", "equalize", "color 1.54", "translate y +0.13"),
        *("solarize from 128", "cutout 16 pixels"),
    ]
    transform = TrainTransform(32, seed=0, flip=1.0, vertical_flip=0.0)
    before, after = transform.describe_draws(3, 7, (200, 100))
    _, crops = transform.draw_crops(3, [7])
    _, _, height, width = transform.cropping.window(200, 100, crops[0].tolist())
    assert (before, after) == ("", f"crop {height * width / 200:.0f} %, mirrored")
