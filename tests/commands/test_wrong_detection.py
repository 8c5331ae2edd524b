"""Detection with options that do not fit: one line with what to do."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from coco_files import write_set
from resnest_imagenet.commands.launch import check_config, explain_composition, find_conf
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.errors import ConfigError, DataError, UserError
from resnest_imagenet.tasks.choice import open_task


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["+experiment=demo_detection", "recipe=resnest"],
            "recipe=resnest is not of train.task=detection: choose detectron2_boxes, detectron2_masks, or start from ",
        ),
        (
            ["+experiment=demo", "recipe=detectron2_boxes"],
            "recipe=detectron2_boxes is not of train.task=classification: choose resnest, bag_of_tricks, ",
        ),
        (
            ["+experiment=demo_segmentation", "recipe=detectron2_masks"],
            "recipe=detectron2_masks is not of train.task=segmentation: choose deeplab_gluon, deeplab_encoding, or ",
        ),
        (["+experiment=demo_detection", "protocol=whole"], "protocol is not of train.task=detection: choose coco, or "),
        (
            ["+experiment=demo_detection", "task=classification"],
            "protocol is not of train.task=classification: choose paper, ",
        ),
        (["task=detection"], "protocol is not of train.task=detection: choose coco, or start from +experiment="),
        (["+experiment=demo_detection", "train.crop=64"], "train.crop is of another task than this run: remove it"),
        (["+experiment=demo_detection", "eval.crop=64"], "eval.crop is of another task than this run: remove it"),
        (
            ["+experiment=demo", "data=coco"],
            "data.kind=coco is not of train.task=classification: choose data=imagenet, data=csv or ",
        ),
        (["+experiment=demo_segmentation", "data=coco"], "data.kind=coco is not of train.task=segmentation: choose "),
        (["+experiment=demo", "data.train_json=own.json"], "data.train_json=own.json needs data=coco"),
    ],
)
def test_what_is_of_another_task_is_one_line(words, message):
    with initialize_config_dir(str(find_conf()), version_base="1.3"), pytest.raises(ConfigError) as error:
        try:
            composed = compose("train", ["data.root=/x", *words])
        except HydraException as error_of_hydra:  # as the commands take it
            raise explain_composition(error_of_hydra, TrainConfig) from None
        check_config(composed, TrainConfig)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    """The demo's run on six images, and its options, composed once."""
    root = write_set(tmp_path_factory.mktemp("set"))
    with initialize_config_dir(str(find_conf()), version_base="1.3"):
        return root, compose("train", ["+experiment=demo_detection", f"data.root={root}", "train.batch_size=2"])


def open_with(small_set, *options):
    root, composed = small_set
    changes = OmegaConf.from_dotlist([option.replace("ROOT", str(root)) for option in options])
    return open_task(check_config(OmegaConf.merge(composed, changes), TrainConfig))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data.kind=folder"], "data.kind=folder: a detector is trained on data=coco"),
        (["data.kind=masks"], "data.kind=masks: a detector is trained on data=coco"),
        (["data.root=ROOT/gone"], "data.root=ROOT/gone: no such folder"),
        (["data.train_json=no.json"], "ROOT/no.json: no such file (no .json in ROOT); set data.train_json"),
        (["data.val_json=no.json"], "ROOT/no.json: no such file (no .json in ROOT); set data.val_json"),
        (
            ["data.train_dir=gone"],
            "ROOT/gone: no such folder (in ROOT: annotations, train2017, val2017); set data.train_dir",
        ),
        (
            ["data.val_dir=train2017"],
            "ROOT/train2017/10.jpg: of 6 images in both ROOT/annotations/instances_train2017.json and "
            "ROOT/annotations/instances_train2017.json: set data.val_json, or data.val_dir",
        ),
        (["data.shuffle_shards=4"], "data.shuffle_shards=4 needs data=webdataset"),
        (["model.name=resnest5"], "unknown model 'resnest5'; did you mean 'resnest50'?"),
        (
            ["model.num_classes=91"],
            "model.num_classes=91, but ROOT/annotations/instances_train2017.json has 3 categories: set "
            "model.num_classes=null",
        ),
        (["loader.name=dali"], "loader=dali: a detector's images are decoded without DALI: set loader=auto"),
        (["train.short_sides=[800,640]"], "train.short_sides=[800, 640] must rise"),
        (["train.side_sampling=range"], "train.short_sides=[128]: side_sampling=range takes the least and the largest"),
        (["train.anchor_sizes=[32,64]"], "train.anchor_sizes=[32,64]: list should have at least 5 items, not 2"),
        (["train.norm=gn"], "train.norm=gn: input should be 'bn', 'sync' or 'frozen'"),
        (["train.cascade=maybe"], "train.cascade=maybe: input should be a valid boolean"),
        (["train.samples=3"], "samples=3 leaves no place for a positive: set 4 or more"),
        (["train.batch_size=1"], "train.batch_size=1: resnest14_half has batch norms of one value per image and "),
        (["protocol.min_score=2"], "protocol.min_score=2: input should be less than or equal to 1"),
        (
            ["train.compile=true"],
            "train.compile=true: torch does not compile a detector's step: set train.compile=false",
        ),
        (["train.steps=9"], "train.epochs=7 and train.steps=9: set one of them to null"),
    ],
)
def test_a_wrong_value_is_one_line_of_detection(options, message, small_set):
    with pytest.raises(UserError) as error:
        open_with(small_set, *options)
    line = str(error.value).replace(str(small_set[0]), "ROOT")
    assert line.startswith(message) and "\n" not in line


@pytest.mark.slow
def test_any_data_set_in_the_form_of_coco(small_set, tmp_path):
    """Files and folders of other names, within the data set and elsewhere."""
    root, own = write_set(tmp_path / "set"), tmp_path / "own.json"
    (root / "val2017").rename(tmp_path / "pictures")
    (root / "annotations/instances_val2017.json").rename(own)
    (root / "train2017").rename(root / "photographs")
    (root / "annotations/instances_train2017.json").rename(root / "objects.json")
    places = ("train_dir=photographs", "train_json=objects.json", f"val_dir={tmp_path}/pictures", f"val_json={own}")
    task = open_with(small_set, f"data.root={root}", *(f"data.{place}" for place in places))
    usual = open_with(small_set)
    assert (task.train_set.root, task.val_set.root) == (root / "photographs", tmp_path / "pictures")
    assert (task.classes, len(task.train_set), len(task.val_set)) == (usual.classes, 6, 2)
    (tmp_path / "pictures/2.jpg").unlink()
    with pytest.raises(
        DataError, match=r"pictures/2\.jpg: no such file, but an image of .*own\.json; set data\.val_dir"
    ):
        open_with(small_set, f"data.root={root}", *(f"data.{place}" for place in places))
