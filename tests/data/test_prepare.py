"""Archives in the form of the official ones, made here, with fewer and smaller members."""

import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from resnest_imagenet.data import prepare
from resnest_imagenet.data.prepare import DEVKIT, GROUND_TRUTH, ILSVRC2012, META, TRAIN, VAL, Release, prepare_images
from resnest_imagenet.errors import ConfigError, DataError

# By their numbers in the devkit, which are in no order of the synsets.
SYNSETS = ["n02119789", "n01440764", "n15075141", "n02077923"]
INNER_NODES = ["n00001740", "n00001930"]
TRUTH = [2, 1, 4, 4, 3, 1, 2, 3]


def write_tar(path, members):
    """Write a tar of (name or TarInfo, content)."""
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for member, content in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def make_meta(synsets=SYNSETS):
    """Return a meta.mat of the official structure: a struct array, the inner nodes after the classes."""
    from scipy.io import savemat

    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    table = np.zeros(
        (len(synsets) + len(INNER_NODES), 1), dtype=[(name, object) for name in [*fields, "num_train_images"]]
    )
    for row, wnid in enumerate([*synsets, *INNER_NODES]):
        number, children = (row + 1, []) if wnid in synsets else (1001 + row - len(synsets), [1.0, 2.0])
        table[row, 0] = (number, wnid, "kit fox, Vulpes", "small", len(children), np.array(children), 1, 1300)
    file = io.BytesIO()
    savemat(file, {"synsets": table}, do_compression=True)
    return file.getvalue()


def image_of(name):
    """Return content that tells whose it is; no decoder sees it here."""
    return f"{name} ".encode() * 40


def train_images(synset):
    return [f"{synset}_{number}.JPEG" for number in (3, 10026, 7)]


def make_class_tar(synset, *more):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in [*((name, image_of(name)) for name in train_images(synset)), *more]:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def list_val():
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, len(TRUTH) + 1)]
    return [(name, image_of(name)) for name in names]


def list_devkit(meta=None, truth=TRUTH):
    lines = "".join(f"{number}\n" for number in truth).encode()
    return [("ILSVRC2012_devkit_t12/readme.txt", b""), (META, meta or make_meta()), (GROUND_TRUTH, lines)]


def release_of(archives):
    """Describe the archives as they are."""
    md5 = {name: hashlib.md5((archives / name).read_bytes()).hexdigest() for name in (DEVKIT, VAL, TRAIN)}
    return Release(md5, len(SYNSETS), {"train": 3 * len(SYNSETS), "val": len(TRUTH)})


@pytest.fixture
def archives(tmp_path):
    folder = tmp_path / "archives"
    folder.mkdir()
    write_tar(folder / TRAIN, [(f"{synset}.tar", make_class_tar(synset)) for synset in SYNSETS])
    write_tar(folder / VAL, reversed(list_val()))
    write_tar(folder / DEVKIT, list_devkit())
    return folder


def read_tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


EXPECTED = {f"train/{synset}/{name}": image_of(name) for synset in SYNSETS for name in train_images(synset)}
EXPECTED |= {
    f"val/{SYNSETS[number - 1]}/{name}": content for number, (name, content) in zip(TRUTH, list_val(), strict=True)
}


def test_the_official_release():
    assert ILSVRC2012.num_images == {"train": 1_281_167, "val": 50_000}
    assert ILSVRC2012.num_classes == 1000
    assert ILSVRC2012.md5 == {
        "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
        "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
        "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
    }


@pytest.mark.slow
def test_unpacks_every_image_to_its_class_and_then_has_nothing_to_do(archives, tmp_path):
    out, release = tmp_path / "a/new/out", release_of(archives)
    assert prepare_images(archives, out, verify=True, release=release)
    assert read_tree(out) == EXPECTED
    shutil.rmtree(archives)  # nothing is read again
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert not prepare_images(archives, out, verify=True, release=release)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == written


# Runs prepare_images once for every moment at which it can be killed: before each operation on a file or folder (as the
# interpreter announces them to audit hooks), and in the middle of each image. After each it checks what has its final
# name, and lets a second call finish.
KILL_EVERYWHERE = """
import os, shutil, signal, sys
from pathlib import Path
from scipy.io import loadmat
from scipy.io.matlab import MatReadError
sys.path.insert(0, os.environ["TESTS"])
from test_prepare import EXPECTED, read_tree, release_of
from resnest_imagenet.data.prepare import prepare_images

archives, place = Path(sys.argv[1]), Path(sys.argv[2])
release = release_of(archives)
WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "in an image"}
left = None

def kill(event, arguments):
    global left
    if left is not None and event in WATCHED:
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

def copy_in_halves(source, file):
    content = source.read()
    file.write(content[: len(content) // 2])
    file.flush()
    sys.audit("in an image")
    file.write(content[len(content) // 2 :])

sys.addaudithook(kill)
shutil.copyfileobj = copy_in_halves
moments = halves = 0
while True:
    out = place / str(moments)
    child = os.fork()
    if child == 0:
        left = moments
        prepare_images(archives, out, verify=True, release=release)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    left_behind = read_tree(out) if out.exists() else {}
    for name, content in left_behind.items():
        if name.startswith(("train/", "val/")):
            assert EXPECTED[name] == content, name
        elif name.startswith("prepare.tmp/train/"):
            assert EXPECTED[name.removeprefix("prepare.tmp/")] == content, name
        else:
            halves += len(content) == len(next(iter(EXPECTED.values()))) // 2
    classes = {path: path.stat().st_ino for path in out.glob("prepare.tmp/train/*")}
    prepare_images(archives, out, verify=True, release=release)
    assert read_tree(out) == EXPECTED and not (out / "prepare.tmp").exists()
    for path, inode in classes.items():
        assert (out / "train" / path.name).stat().st_ino == inode, "a finished class was done again"
    moments += 1
print(moments, halves)
"""


@pytest.mark.process
def test_a_kill_at_any_moment_costs_no_finished_class_and_leaves_no_cut_image(archives, tmp_path):
    environment = {**os.environ, "TESTS": str(Path(__file__).parent)}
    command = [sys.executable, "-c", KILL_EVERYWHERE, str(archives), str(tmp_path / "outs")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    moments, halves = map(int, result.stdout.split())
    assert moments > 70
    assert halves > 5  # the kills did leave halves of images


def special(name, kind, link="", **attributes):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info


SPECIAL = [
    special("n01440764_9.JPEG", tarfile.SYMTYPE, "../../../canary"),
    special("n01440764_9.JPEG", tarfile.LNKTYPE, "n01440764_3.JPEG"),
    special("n01440764_9.JPEG", tarfile.CHRTYPE),
    special("n01440764_9.JPEG", tarfile.FIFOTYPE),
    special("n01440764_9.JPEG", tarfile.DIRTYPE),
    special("n01440764_9.JPEG", tarfile.REGTYPE, pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "1"}),
    "/tmp/n01440764_9.JPEG",
    "../../../canary",
    "../n01440764_9.JPEG",
    "./n01440764_9.JPEG",
    "folder/n01440764_9.JPEG",
    "n01440764_9.JPEG\n",
    "n01440764_٩.JPEG",
    "n02119789_9.JPEG",
    "n01440764_9.jpg.exe",
    "..",
]


@pytest.mark.parametrize("member", SPECIAL, ids=lambda member: repr(getattr(member, "type", member)))
@pytest.mark.parametrize("where", ["class", "train", "val"])
def test_what_does_not_belong_in_an_archive_is_named_and_not_written(where, member, archives, tmp_path):
    canary = tmp_path / "canary"
    canary.write_text("alive")
    if where == "class":
        tars = [
            (f"{synset}.tar", make_class_tar(synset, *[(member, b"")] * (synset == "n01440764"))) for synset in SYNSETS
        ]
        write_tar(archives / TRAIN, tars)
    else:
        write_tar(archives / (TRAIN if where == "train" else VAL), [(member, b"")])
    before = read_tree(tmp_path)
    with pytest.raises(DataError) as caught:
        prepare_images(archives, tmp_path / "out", verify=False, release=release_of(archives))
    assert repr(getattr(member, "name", member)) in str(caught.value)
    assert {path: data for path, data in read_tree(tmp_path).items() if not path.startswith("out/")} == before
    written = {path.name for path in (tmp_path / "out").rglob("*") if not path.is_dir()} - {"lock"}
    assert written <= {Path(name).name for name in EXPECTED}
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_a_synset_that_is_a_path_is_no_folder(archives, tmp_path):
    write_tar(archives / DEVKIT, list_devkit(make_meta(["../../up", *SYNSETS[1:]])))
    with pytest.raises(DataError, match="not the official devkit"):
        prepare_images(archives, tmp_path / "out", verify=False, release=release_of(archives))
    assert not (tmp_path / "up").exists()


@pytest.mark.parametrize("name", [DEVKIT, VAL, TRAIN])
def test_an_altered_archive_is_refused_by_its_md5(name, archives, tmp_path):
    release = release_of(archives)
    altered = bytearray((archives / name).read_bytes())
    altered[-1] ^= 1
    (archives / name).write_bytes(altered)
    with pytest.raises(DataError, match=rf"{name}: not the official archive \(its md5 is [0-9a-f]{{32}}, not "):
        prepare_images(archives, tmp_path / "out", verify=True, release=release)
    if name != DEVKIT:  # gzip has a sum of its own
        assert prepare_images(archives, tmp_path / "unverified", verify=False, release=release)


@pytest.mark.parametrize("name", [DEVKIT, VAL, TRAIN])
def test_a_missing_and_a_damaged_archive_are_one_line(name, archives, tmp_path):
    out, release, whole = tmp_path / "out", release_of(archives), (archives / name).read_bytes()
    for damaged in (whole[: len(whole) // 2 + (700 if name != DEVKIT else 0)], b"", b"<html>"):
        (archives / name).write_bytes(damaged)
        with pytest.raises(DataError, match=f"{name}.*: damaged"):
            prepare_images(archives, out, verify=False, release=release)
    (archives / name).unlink()
    with pytest.raises(DataError, match=f"{name}: no such archive"):
        prepare_images(archives, tmp_path / "new", verify=True, release=release)
    assert not list((tmp_path / "new").glob("prepare.tmp/*/*"))  # before any work
    (archives / name).write_bytes(whole)
    assert prepare_images(archives, out, verify=True, release=release)
    assert read_tree(out) == EXPECTED


def test_an_archive_that_ends_between_two_members_is_told_by_the_counts(archives, tmp_path):
    release, whole = release_of(archives), (archives / VAL).read_bytes()
    with tarfile.open(archives / VAL) as tar:
        fifth = tar.getmembers()[4]
    (archives / VAL).write_bytes(whole[: fifth.offset])
    with pytest.raises(DataError, match="val: 4 images in . classes, not 8 in 4"):
        prepare_images(archives, tmp_path / "out", verify=False, release=release)
    (archives / VAL).write_bytes(whole)
    assert prepare_images(archives, tmp_path / "out", verify=False, release=release)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": {"train": 13, "val": 8}}, "train: 12 images in 4 classes, not 13 in 4; remove it"),
        ({"num_images": {"train": 12, "val": 9}}, "val: 8 images in 4 classes, not 9 in 4; remove it"),
        ({"num_classes": 5}, "val: 8 images in 4 classes, not 8 in 5; remove it"),
    ],
)
def test_wrong_counts(changes, message, archives, tmp_path):
    release = release_of(archives)
    with pytest.raises(DataError, match=message):
        prepare_images(archives, tmp_path / "out", verify=True, release=replace(release, **changes))
    assert prepare_images(archives, tmp_path / "whole", verify=True, release=release)
    with pytest.raises(DataError, match=message):
        prepare_images(archives, tmp_path / "whole", verify=True, release=replace(release, **changes))


def test_train_and_val_of_other_classes(archives, tmp_path):
    write_tar(archives / DEVKIT, list_devkit(make_meta([*SYNSETS[:3], "n03018349"])))
    with pytest.raises(DataError, match="train: its classes are not those of .*val"):
        prepare_images(archives, tmp_path / "out", verify=True, release=release_of(archives))


@pytest.mark.parametrize(
    ("make_members", "message"),
    [
        (lambda: list_devkit()[:2], "lacks ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"),
        (lambda: list_devkit(b"not MATLAB's" * 99), "not the official devkit"),
        (lambda: list_devkit(truth=[1, 2000]), r"not the official devkit \(2000\)"),
        (lambda: list_devkit(truth=["x"]), "not the official devkit"),
        (lambda: list_devkit(truth=TRUTH[:7]), "'ILSVRC2012_val_00000008.JPEG' has no label"),
    ],
)
def test_a_devkit_that_is_none(make_members, message, archives, tmp_path):
    write_tar(archives / DEVKIT, make_members())
    with pytest.raises(DataError, match=message):
        prepare_images(archives, tmp_path / "out", verify=False, release=release_of(archives))


def test_without_scipy_one_line_says_so_at_once(archives, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ConfigError, match=r"need scipy: add the extra \[prepare\]"):
        prepare_images(archives, tmp_path / "out", verify=True, release=release_of(archives))


def test_a_full_disk_is_one_line_and_no_loss(archives, tmp_path, monkeypatch):
    def fill(source, file):
        if (tmp_path / "out/prepare.tmp/train/n02119789").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        file.write(source.read())

    out, release = tmp_path / "out", release_of(archives)
    with monkeypatch.context() as patch:
        patch.setattr(prepare.shutil, "copyfileobj", fill)
        with pytest.raises(DataError, match=f"^{archives} to {out}: No space left on device$"):
            prepare_images(archives, out, verify=True, release=release)
    assert prepare_images(archives, out, verify=True, release=release)
    assert read_tree(out) == EXPECTED


def test_a_second_process_is_refused(archives, tmp_path):
    (tmp_path / "out/prepare.tmp").mkdir(parents=True)
    with FileLock(tmp_path / "out/.prepare.lock"), pytest.raises(DataError, match="another resnest-data prepare"):
        prepare_images(archives, tmp_path / "out", verify=True, release=release_of(archives))


def test_out_that_is_a_file(archives, tmp_path):
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(DataError, match="out/?.*: (File exists|Not a directory)"):
        prepare_images(archives, tmp_path / "out", verify=True, release=release_of(archives))
