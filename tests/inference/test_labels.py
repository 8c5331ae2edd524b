"""Which output of a network stands for which class: evaluation, comparison, training from weights and shards agree."""

import io
import tarfile

import pytest
import torch
from torch import nn

from conftest import compose_config, evaluate_checkpoint, predict_classes
from resnest_imagenet import build_model
from resnest_imagenet.commands.compare import compare_networks
from resnest_imagenet.config_reading import CompareConfig, PredictConfig
from resnest_imagenet.data import folder
from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.data.shards import write_shards
from resnest_imagenet.data.source import order_classes
from resnest_imagenet.data.webdataset import read_shards
from resnest_imagenet.errors import CheckpointError, DataError
from resnest_imagenet.inference.labels import label_images, name_outputs
from resnest_imagenet.models.imagenet_classes import imagenet_synsets
from resnest_imagenet.training.train import prepare, train

NUMBERS = [str(number) for number in range(12)]  # as text: 0, 1, 10, 11, 2, ...


def make_tree(root, image, *files):
    """Make files that are one image."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(image)


@pytest.fixture(scope="module")
def image(demo_images):
    return next((demo_images / "val").rglob("*.JPEG"))


def save_constant(path, outputs, answer):
    """Write bare weights of a network that always says the same: an output, and then its neighbours."""
    model = build_model("resnest14_half", outputs).eval()
    nn.init.zeros_(model.fc.weight)
    with torch.no_grad():
        model.fc.bias.copy_(-(torch.arange(outputs) - answer).abs())
    torch.save(model.state_dict(), path)
    return path


def test_the_order_of_class_folders():
    """As text, and the numbers from 0 on as numbers."""
    for expected in (
        NUMBERS,
        ["0", "01", "2"],
        [f"{number:03}" for number in range(12)],
        ["1", "10", "11", "2"],  # not from 0 on
        ["0", "1", "11"],
        ["0", "00", "1"],
        ["0", "1", "a"],
        ["Zebra", "ant", "n01440764"],
        [],
    ):
        assert order_classes(reversed(expected)) == expected


@pytest.mark.parametrize(
    ("classes", "known", "num_outputs", "names"),
    [
        (sorted(NUMBERS), None, 12, NUMBERS),
        (["2", "11"], None, 12, NUMBERS),  # a part
        (["002", "011"], None, 12, [*"01", "002", *"3456789", "10", "011"]),
        (sorted(NUMBERS), sorted(NUMBERS), 12, sorted(NUMBERS)),  # a checkpoint's own list
        (["002"], sorted(NUMBERS), 12, ["0", "1", "10", "11", "002", *"3456789"]),
        (["1", "2"], None, 2, None),  # from 1 on: which is the first output?
        (["0", "5"], None, 2, None),
        (["1", "01"], None, 2, None),
        (["0"], ["0", "00"], 2, ["0", "00"]),
        (["000"], ["0", "00"], 2, None),
        (["a", "b"], None, 2, ["a", "b"]),
        (["a", "b"], ["0", "1"], 2, ["a", "b"]),  # trained on shards without names
        (["a", "b"], ["b", "a"], 2, ["b", "a"]),
        (["a"], ["b", "a"], 2, ["b", "a"]),
        (["a", "c"], ["b", "a"], 2, None),
        (["0", "1"], ["b", "a"], 2, None),
        (["a"], None, 2, None),
    ],
)
def test_names_of_the_outputs(classes, known, num_outputs, names):
    assert name_outputs(classes, known, num_outputs) == names


@pytest.mark.process
@pytest.mark.slow
def test_numbered_folders_are_the_outputs_for_every_command(tmp_path, image, evaluation_of, small_run, capsys):
    make_tree(tmp_path, image, *(f"{part}/{number}/1.JPEG" for part in ("train", "val") for number in NUMBERS))
    make_tree(tmp_path, image, "val/2/2.JPEG")
    bare = save_constant(tmp_path / "bare.pth", 12, 2)
    options = ("device=cpu", "crop=32", "loader.workers=1")
    # Evaluation: of folders, and of shards with their names and without.
    (result,) = evaluate_checkpoint(evaluation_of(bare, "model=resnest14_half", f"data.root={tmp_path}"))
    assert (result.correct1, result.count) == (2, 13)
    assert capsys.readouterr().err == f"{tmp_path}/val: class n is output n of {bare}\n"
    write_shards(str(tmp_path), {"data.val_dir": "val"}, tmp_path / "shards", 100, shuffle=False)
    for classes in (tmp_path / "shards/val/classes.txt", None):
        shards = evaluation_of(bare, "model=resnest14_half", "data=webdataset", f"data.root={tmp_path}/shards")
        assert evaluate_checkpoint(shards)[0].correct1 == 2
        if classes:
            assert classes.read_text().split() == NUMBERS
            classes.unlink()
    # Comparison and prediction.
    both = (f"ckpt=[{bare},{bare}]", "models=[resnest14_half,resnest14_half]", f"data.root={tmp_path}")
    comparison = compare_networks(compose_config("compare", CompareConfig, *options, *both))
    assert comparison.is_right.sum(1).tolist() == [2, 2] and set(comparison.predicted[0]) == {"2"}
    single = (f"ckpt={bare}", "model=resnest14_half", f"images={image}", "top=1")
    ((prediction,), _) = predict_classes(compose_config("predict", PredictConfig, *options, *single))
    assert prediction.label == "2"
    # Training from these weights, "its classifier too".
    task, _, device = prepare(small_run(f"data.root={tmp_path}", f"train.init_from={bare}", "train.batch_size=4"))
    assert task.build_model(True, device).fc.bias.argmax() == 2
    assert task.classes[2] == "2" and "its classifier too" in capsys.readouterr().out


@pytest.mark.process
def test_a_classifier_comes_along_in_another_order(tmp_path, image, small_run):
    """A run on shards that were written with their classes in text order, from bare weights."""
    make_tree(tmp_path, image, *(f"{part}/{number}/1.JPEG" for part in ("train", "val") for number in NUMBERS))
    write_shards(str(tmp_path), {"t": "train", "v": "val"}, tmp_path / "shards", 100, shuffle=False)
    for part in ("train", "val"):
        (tmp_path / "shards" / part / "classes.txt").write_text("".join(f"{name}\n" for name in sorted(NUMBERS)))
    bare = save_constant(tmp_path / "bare.pth", 12, 2)
    options = ("data=webdataset", f"data.root={tmp_path}/shards", f"train.init_from={bare}", "train.batch_size=4")
    task, _, device = prepare(small_run(*options))
    bias = task.build_model(True, device).fc.bias
    assert task.classes[bias.argmax()] == "2" and bias.argmax() == 4


@pytest.mark.process
@pytest.mark.slow
def test_a_run_with_its_classes_in_text_order_is_not_relabelled(tmp_path, image, small_run, monkeypatch):
    """A run of a version that ordered the numbers as text, too."""
    make_tree(tmp_path, image, *(f"{part}/{number}/1.JPEG" for part in ("train", "val") for number in NUMBERS))
    config = small_run(f"data.root={tmp_path}", "train.batch_size=4", "train.epochs=1", "train.warmup_epochs=0")
    with monkeypatch.context() as context:
        context.setattr(folder, "order_classes", sorted)
        train(config)
    with pytest.raises(CheckpointError, match="was trained with"):
        train(config)


def test_numbers_that_are_no_outputs_are_refused(tmp_path, image, evaluation_of):
    make_tree(tmp_path, image, *(f"val/{number}/1.JPEG" for number in range(1, 13)))
    bare = save_constant(tmp_path / "bare.pth", 12, 2)
    with pytest.raises(
        DataError, match=r"val: its classes are numbers, but not those of the outputs 0 to 11 of .*bare\.pth"
    ):
        evaluate_checkpoint(evaluation_of(bare, "model=resnest14_half", f"data.root={tmp_path}"))


@pytest.mark.slow
def test_thousand_outputs_are_imagenets_classes(tmp_path, image, evaluation_of):
    """Two synset folders under a 1000-class model: each image has its ImageNet label, not its folder's position."""
    bare = save_constant(tmp_path / "bare.pth", 1000, 207)  # golden retriever
    make_tree(tmp_path, image, *(f"val/{imagenet_synsets()[label]}/1.JPEG" for label in (0, 207)))
    config = evaluation_of(bare, "model=resnest14_half", f"data.root={tmp_path}")
    assert evaluate_checkpoint(config)[0].correct1 == 1
    make_tree(tmp_path, image, "val/dragon/1.JPEG")
    with pytest.raises(DataError, match="1 of its classes are not among ImageNet's 1000: dragon"):
        evaluate_checkpoint(config)


def test_a_thousand_other_folders_are_labelled_in_their_order(tmp_path, image, capsys):
    """Not by names that happen to be timm's or ImageNet's."""
    make_tree(tmp_path, image, *(f"val/place{number:03}/1.JPEG" for number in range(1000)))
    images = read_image_folder(str(tmp_path), "val", "x")
    assert label_images(images, None, 1000, "x.pth").labels.tolist() == list(range(1000))
    line = f"{tmp_path}/val: its classes, in their order, are taken for the outputs of x.pth\n"
    assert capsys.readouterr().err == line
    with pytest.raises(DataError, match="1000 of its classes are not among the classes of x.pth: place000, "):
        label_images(images, imagenet_synsets(), 1000, "x.pth")


@pytest.fixture(scope="module")
def numbered_shards(image, tmp_path_factory):
    """Others' shards: 1000 images, the last one first, each with its label's digits and no names of classes."""
    root = tmp_path_factory.mktemp("numbered")
    (root / "val").mkdir()
    content = {"jpg": image.read_bytes()}
    with tarfile.open(root / "val/0.tar", "w") as tar:
        for label in range(999, -1, -1):
            for extension, member in {**content, "cls": str(label).encode()}.items():
                header = tarfile.TarInfo(f"{label}.{extension}")
                header.size = len(member)
                tar.addfile(header, io.BytesIO(member))
    return root


@pytest.mark.process
@pytest.mark.slow
def test_numbered_shards_are_labelled_as_the_outputs_are(tmp_path, evaluation_of, numbered_shards):
    """ImageNet's numbers, in the synsets' order, for bare weights."""
    bare = save_constant(tmp_path / "bare.pth", 1000, 207)
    places = ("model=resnest14_half", "data=webdataset", f"data.root={numbered_shards}")
    (result,) = evaluate_checkpoint(evaluation_of(bare, *places))
    assert (result.correct1, result.correct5, result.count) == (1, 5, 1000)


@pytest.mark.process
def test_numbers_and_names_of_classes_meet_by_position(tmp_path, image, numbered_shards):
    imagenet = imagenet_synsets()
    shards = read_shards(str(numbered_shards), "val", "data.val_dir")
    numbers = list(shards.classes)
    named = [f"place{number}" for number in range(1000)]
    for known in (numbers, None, imagenet, named):
        assert label_images(shards, known, 1000, "x").labels.tolist() == list(range(999, -1, -1))
    with pytest.raises(DataError, match="1000 of its classes are not among the classes of x: 0, 1, 2, ..."):
        label_images(shards, ["cat", "dog"], 2, "x")
    # The other way round: trained on numbered shards, evaluated on folders.
    make_tree(tmp_path, image, f"val/{imagenet[7]}/1.jpg", f"val/{imagenet[900]}/1.jpg")
    images = read_image_folder(str(tmp_path), "val", "data.val_dir")
    assert label_images(images, numbers, 1000, "x").labels.tolist() == [7, 900]
    # A part of the numbers, for all to whom ImageNet's outputs have none or public names.
    make_tree(tmp_path, image, "part/3/1.jpg", "part/10/1.jpg")
    for known in (numbers, None, imagenet):
        part = label_images(read_image_folder(str(tmp_path), "part", "x"), known, 1000, "x")
        assert part.labels.tolist() == [10, 3] and part.classes[3] == "3"


def test_folders_may_be_named_in_words(tmp_path, image):
    classes = imagenet_synsets()
    names = ("goldfish", "Golden_retriever", "n01440764")
    make_tree(tmp_path, image, *(f"val/{name}/1.JPEG" for name in names))
    images = read_image_folder(str(tmp_path), "val", "images")
    labels = label_images(images, classes, 1000, "x.pth").labels
    assert {images.classes[k]: classes[label] for k, label in zip(images.labels, labels, strict=True)} == {
        "goldfish": "n01443537",
        "Golden_retriever": "n02099601",
        "n01440764": "n01440764",
    }
    (tmp_path / "val/goldfish").rename(tmp_path / "val/crane")  # a bird and a machine
    with pytest.raises(DataError, match="1 of its classes are not among the classes of x.pth: crane"):
        label_images(read_image_folder(str(tmp_path), "val", "images"), classes, 1000, "x.pth")
