"""A tree with every kind of fault and oddity among sound images: each is found, and nothing else."""

import io
import json
import multiprocessing
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from conftest import run_module
from resnest_imagenet.commands.data import check
from resnest_imagenet.config_data import CheckDataConfig
from resnest_imagenet.data import examine
from resnest_imagenet.data.check import FAULTS, NOTES, check_images, format_report, write_report
from resnest_imagenet.data.examine import KNOWN_CMYK, Finding, examine_files
from resnest_imagenet.errors import DataError

pytestmark = pytest.mark.process  # files are read and examined in processes

SYNSETS = ["n01440764", "n01443537", "n01484850"]


def encode(number, mode="RGB", kind="JPEG", size=(40, 30), **options):
    """Encode a texture that no other number has."""
    texture = np.random.default_rng(number).integers(0, 256, size=(size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(texture[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(texture)
    file = io.BytesIO()
    (image if mode == "I;16" else image.convert(mode)).save(file, kind, **options)
    return file.getvalue()


def write(root, path, content):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def make_sound(root):
    """Write 36 train and 6 val images of three classes."""
    for label, synset in enumerate(SYNSETS):
        for number in range(14):
            path = f"train/{synset}/{synset}_{number}.JPEG" if number < 12 else f"val/{synset}/val_{number}.jpg"
            write(root, path, encode([label, number], size=(30 + number, 40)))


def make_bomb(width=20000, height=20000):
    """Return a PNG of a few bytes whose header promises a large image."""
    png = encode(0, "1", "PNG", (8, 8)).replace(struct.pack(">2I", 8, 8), struct.pack(">2I", width, height), 1)
    return png[:29] + struct.pack(">I", zlib.crc32(png[12:29])) + png[33:]


def break_tiff():
    """Return a TIFF that Pillow opens, and over which libtiff speaks on stderr."""
    tiff = bytearray(encode(77, "RGB", "TIFF", compression="tiff_lzw"))
    tiff[8:200] = bytes(192)
    return bytes(tiff)


A, B, C = (f"train/{synset}" for synset in SYNSETS)
PNG_WITHOUT_CRC = bytearray(encode(60, kind="PNG"))
PNG_WITHOUT_CRC[100] ^= 255
WHOLE = encode(50, size=(200, 200))
FILES = {
    ("empty", f"{A}/a.JPEG"): b"",
    ("empty", f"{B}/empty.png"): b"",
    ("not an image", f"{A}/page.JPEG"): b"<html><body>404 Not Found</body></html>",
    ("damaged", f"{A}/cut.JPEG"): WHOLE[: len(WHOLE) // 2],
    ("damaged", "val/n01440764/cut.JPEG"): WHOLE[:-300],
    ("damaged", f"{B}/bits.png"): bytes(PNG_WITHOUT_CRC),
    ("damaged", f"{B}/tiff.JPEG"): break_tiff(),
    ("wrong format", f"{B}/cat.JPEG"): encode(51, kind="GIF"),
    ("wrong mode", f"{B}/float.JPEG"): encode(52, "F", "TIFF"),
    ("too large", f"{B}/bomb.png"): make_bomb(),
    ("too large", f"{B}/large.png"): make_bomb(9460, 9459),  # where Pillow only warns
    ("unseen image", f"{B}/new.gif"): encode(53, kind="GIF"),
    ("unseen image", f"{B}/photo.jpg_large"): encode(54),
    ("unseen image", f"{B}/no_suffix"): encode(54, kind="BMP"),
    ("not a file", f"{C}/folder.JPEG"): {},
    ("no images", "train/n09999999"): {"Thumbs.db": b"x"},
    ("no images", "val/n08888888"): {},  # each in one part only: told once
    ("missing class", "val/n01496331"): None,
    ("missing class", "train/n01494475"): None,
    ("misplaced image", "train/stray.JPEG"): encode(55),
    ("misplaced image", "val/ILSVRC2012_val_00000001.JPEG"): encode(56),
    ("in train and val", "val/n01443537/leak.JPEG"): encode([0, 3], size=(33, 40)),
}
LINKS = {
    ("broken link", f"{C}/link.JPEG"): "nowhere.JPEG",
    ("broken link", f"{C}/itself.JPEG"): "itself.JPEG",
    ("not a file", f"{C}/null.JPEG"): "/dev/null",
    ("unreadable", f"{C}/memory.JPEG"): "/proc/self/mem",  # reading fails, even for root
}
ODD = {
    ("hidden", f"{A}/._n01440764_1.JPEG"): b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(66),
    ("hidden", "train/.ipynb_checkpoints"): {"1.JPEG": encode(59)},
    ("nested folder", f"{C}/images"): {"1.JPEG": encode(59)},
    ("odd mode", f"{A}/grey.JPEG"): encode(60, "L"),
    ("odd mode", f"{A}/cmyk.JPEG"): encode(61, "CMYK"),
    ("odd mode", f"{A}/palette.png"): encode(62, "P", "PNG"),
    ("odd mode", f"{A}/deep.png"): encode(63, "I;16", "PNG"),
    ("odd mode", f"{A}/alpha.png"): encode(64, "RGBA", "PNG"),
    ("odd format", f"{A}/a_png.JPEG"): encode(65, kind="PNG"),
    ("odd format", f"{A}/a_jpeg.png"): encode(66),
    ("odd format", f"{A}/bitmap.jpg"): encode(67, kind="BMP"),
    ("known oddity", f"{A}/n01739381_1309.JPEG"): encode(68, "CMYK"),
    ("known oddity", f"{A}/n02105855_2933.JPEG"): encode(69, kind="PNG"),
    ("tiny", f"{A}/pixel.JPEG"): encode(70, size=(1, 1)),
    ("other file", f"{A}/Thumbs.db"): b"x",
    ("other file", "train/list.txt"): b"x",
    ("twice in a class", f"{B}/n01443537_x.JPEG"): encode([1, 3], size=(33, 40)),
    ("in two classes", f"{C}/n01484850_x.JPEG"): encode([1, 4], size=(34, 40)),
}
# Sound, though they may not look so: what cameras write, a rotation, a name that is no UTF-8, one with a line break.
SOUND = {
    f"{A}/mpo.jpg": encode(80, kind="MPO", save_all=True, append_images=[Image.new("RGB", (40, 30))]),
    f"{A}/progressive.JPEG": encode(81, progressive=True),
    f"{A}/new.webp": encode(84, kind="WEBP"),
    f"{A}/scan.TIF": encode(85, kind="TIFF"),
    f"{A}/photo.jfif": encode(86),
    f"{A}/été\n.JPEG": encode(82),
    os.fsdecode(f"{A}/".encode() + b"\xff.JPEG"): encode(83),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    root = tmp_path_factory.mktemp("planted")
    make_sound(root)
    for path, content in [*((path, content) for (_, path), content in (FILES | ODD).items()), *SOUND.items()]:
        if isinstance(content, dict):
            (root / path).mkdir(parents=True)
            for name, inner in content.items():
                write(root, f"{path}/{name}", inner)
        elif content is not None:
            write(root, path, content)
    write(root, "train/n01496331/1.JPEG", encode(57))
    write(root, "val/n01494475/1.JPEG", encode(58))
    for (_, path), target in LINKS.items():
        (root / path).symlink_to(target)
    return root


EXPECTED = sorted([*FILES, *LINKS, *ODD, ("other file", "train/n09999999/Thumbs.db")])


# Kinds of findings about scenes: see test_check_scenes.py.
OF_OBJECTS = {"no annotations", "bad annotations", "skipped objects", "unlisted image", "id 0"}  # test_check_coco.py
OF_SCENES = {"missing mask", "missing image", "wrong mask", "unknown label", "other size"}
OF_SCENES |= {"twice in a part", "absent class", "palette mask"}


def test_the_planted_tree_has_every_kind():
    planted = {kind for kind, _ in EXPECTED} | {"crash", "missing folder", "no class folders"}
    assert planted | OF_SCENES | OF_OBJECTS == {*FAULTS, *NOTES}


def test_finds_what_was_planted_and_nothing_else(planted, tmp_path, capfd):
    out = tmp_path / "reports/report.json"
    data = {
        "kind": "folder",
        "root": str(planted),
        "train_dir": "train",
        "val_dir": "val",
        "train_json": None,
        "val_json": None,
        "csv": None,
        "val_split": None,
        "split_seed": 0,
    }
    with pytest.raises(DataError) as caught:
        check(CheckDataConfig(data=data, out=str(out), workers=2))
    printed = capfd.readouterr()
    report = json.loads(out.read_text())
    findings = report["findings"]
    assert sorted((finding["kind"], finding["path"]) for finding in findings) == EXPECTED
    num_faults = len(FILES) + len(LINKS)
    for finding in findings:
        assert finding["severity"] == ("note" if finding["kind"] in NOTES else "fault")
    assert (report["faults"], report["notes"]) == (num_faults, len(EXPECTED) - num_faults)
    assert report["root"] == str(planted)
    assert [(part["folder"], part["classes"]) for part in report["parts"]] == [("train", 5), ("val", 5)]
    assert str(caught.value) == f"{planted}: faults: {num_faults} ({out})"
    assert printed.err == ""  # no warnings, nothing from libtiff
    lines = printed.out.splitlines()
    assert [line[7:25].strip() for line in lines[:-3]] == [
        kind for kind in (*FAULTS, *NOTES) if kind in {kind for kind, _ in EXPECTED}
    ]
    assert f"fault  broken link               2  {C}/itself.JPEG, {C}/link.JPEG" in lines
    assert f"note   twice in a class          1  {B}/n01443537_x.JPEG (the same as {B}/n01443537_3.JPEG)" in lines
    (odd,) = (line for line in lines if line.startswith("note   odd mode "))
    assert odd.endswith(f" 5  {A}/alpha.png (of mode RGBA), {A}/cmyk.JPEG, {A}/deep.png, ...")


def test_details_name_the_other_copy_and_the_size(planted):
    details = {finding.path: finding.detail for finding in check_images(str(planted), "train", "val", 2).findings}
    assert details["val/n01443537/leak.JPEG"] == f"the same as {A}/n01440764_3.JPEG"
    assert details[f"{B}/bomb.png"] == "a PNG image of 20000 x 20000 pixels (over 89,478,485)"
    assert details[f"{A}/n01739381_1309.JPEG"] == "ImageNet's own: a JPEG image of mode CMYK"
    assert details[f"{C}/memory.JPEG"] == "Input/output error"


def test_a_sound_tree_has_no_faults(tmp_path):
    make_sound(tmp_path)
    report = check_images(str(tmp_path), "train", "val", 2)
    assert format_report(report) == "train: 36 images in 3 classes\nval: 6 images in 3 classes\n0 faults, 0 notes"
    assert report.num_faults == 0


def test_notes_alone_are_no_faults(tmp_path):
    make_sound(tmp_path)
    for (_, path), content in ODD.items():
        for name, inner in content.items() if isinstance(content, dict) else [("", content)]:
            write(tmp_path, f"{path}/{name}".rstrip("/"), inner)
    report = check_images(str(tmp_path), "train", "val", 2)
    assert format_report(report).endswith(f"\n0 faults, {len(ODD)} notes")


def find(root, train="train", val="val"):
    return [(finding.kind, finding.path, finding.detail) for finding in check_images(str(root), train, val, 1).findings]


@pytest.mark.parametrize(
    ("folder", "detail"),
    [
        ("validation", "set data.val_dir=validation"),
        ("Val", "set data.val_dir=Val"),
        ("x", "set data.val_dir; there: train, x"),
    ],
)
def test_a_misnamed_val_folder_is_named_with_its_option(folder, detail, tmp_path):
    make_sound(tmp_path)
    (tmp_path / "val").rename(tmp_path / folder)
    assert find(tmp_path) == [("missing folder", "val", detail)]
    assert find(tmp_path, val=folder) == []


def test_a_flat_val_folder_is_one_fault(tmp_path):
    make_sound(tmp_path)
    for folder in list((tmp_path / "val").iterdir()):
        for path in folder.iterdir():
            path.rename(tmp_path / "val" / f"{folder.name}_{path.name}")
        folder.rmdir()
    assert find(tmp_path) == [("no class folders", "val", "6 images in it; they belong in val/<class>/")]


@pytest.mark.process
def test_a_missing_root_and_a_report_that_cannot_be_written_are_one_line(tmp_path):
    with pytest.raises(DataError, match="^data.root=/nowhere: no such folder$"):
        check_images("/nowhere", "train", "val")
    result = run_module("resnest_imagenet.commands.data", "check", f"data.root={tmp_path}", "out=/dev/null/report.json")
    assert result.returncode == 2
    assert result.stderr.startswith("data: out=/dev/null/report.json: cannot be written (")


def test_names_that_do_not_fit_a_line_are_escaped(tmp_path):
    make_sound(tmp_path)
    name = os.fsdecode(b"a\n\xff.JPEG")
    write(tmp_path, f"{A}/{name}", b"")
    report = check_images(str(tmp_path), "train", "val", 1)
    assert f"  {A}/a\\n\\udcff.JPEG (not a readable image (it is empty))\n" in format_report(report)
    write_report(report, tmp_path / "report.json")
    (finding,) = json.loads((tmp_path / "report.json").read_text())["findings"]
    assert os.path.exists(tmp_path / finding["path"])


@pytest.fixture
def deadly(monkeypatch):
    """Let files that say so kill the process that decodes them: what a fault in a decoder does, or the system."""

    def find_fault(encoded, real=examine.find_fault):
        return os._exit(9) if encoded == b"deadly" else real(encoded)

    fork = multiprocessing.get_context("fork")  # which inherits the patch
    monkeypatch.setattr(examine.multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setattr(examine, "find_fault", find_fault)


@pytest.mark.process
@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_kills_its_process_is_found_among_the_others(workers, deadly, tmp_path):
    paths = [f"{number:03d}.JPEG" for number in range(100)]
    for number, path in enumerate(paths):
        write(tmp_path, path, b"deadly" if number in (40, 41, 99) else encode(number))
    results = list(examine_files(str(tmp_path), paths, workers))
    assert [result.path for result in results] == paths
    crash = "the process that decoded it died"
    expected = [Finding("crash", paths[number], crash) for number in (40, 41, 99)]
    assert [finding for result in results for finding in result.findings] == expected


@pytest.mark.process
def test_a_process_that_dies_of_something_else_is_no_file_s_fault(deadly, tmp_path, monkeypatch):
    def find_fault(encoded, real=examine.find_fault):
        if not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            os._exit(9)
        return real(encoded)

    write(tmp_path, "a.JPEG", encode(1))
    monkeypatch.setattr(examine, "find_fault", find_fault)
    (result,) = examine_files(str(tmp_path), ["a.JPEG"], workers=1)
    assert (tmp_path / "killed").exists()
    assert result.findings == ()


@pytest.mark.process
def test_crashes_without_end_are_one_line(deadly, tmp_path):
    make_sound(tmp_path)
    for number in range(12):
        write(tmp_path, f"{A}/{number:02d}.JPEG", b"deadly")
    with pytest.raises(DataError, match=rf"10 processes died decoding .*: {A}/00.JPEG, {A}/01.JPEG"):
        check_images(str(tmp_path), "train", "val", 2)


def test_what_is_known_of_imagenet():
    assert len(set(KNOWN_CMYK)) == 22


def test_duplicates_below_a_class_are_where_their_class_is(tmp_path):
    for path in ("train/a/1.jpg", "train/a/x/2.jpg", "train/b/y/3.jpg", "val/a/4.jpg"):
        write(tmp_path, path, encode(0))
    write(tmp_path, "val/b/5.jpg", encode(1))
    findings = check_images(str(tmp_path), "train", "val", workers=1).findings
    assert {(finding.kind, finding.path) for finding in findings if finding.detail.startswith("the same as")} == {
        ("twice in a class", "train/a/x/2.jpg"),
        ("in two classes", "train/b/y/3.jpg"),
        ("in train and val", "val/a/4.jpg"),
    }
