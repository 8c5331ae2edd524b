"""Processes that are killed: none of the workers that they started stays."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from test_folder import make_tree

from conftest import CPU
from resnest_imagenet.data import examine, webdataset
from resnest_imagenet.data.folder import ImageFolder, read_image_folder
from resnest_imagenet.data.loader import build_loader
from resnest_imagenet.data.plan import plan_evaluation
from resnest_imagenet.data.transforms import EvalTransform

pytestmark = pytest.mark.process  # files are read and examined in processes

FORK = multiprocessing.get_context("fork")


def wait_for_ever(*_):
    time.sleep(600)


def check(root):
    examine._find_fault, examine.BATCH = wait_for_ever, 1
    list(examine.examine_files(str(root), ["train/a/1.jpg", "train/a/2.jpg"], 2))


def scan(root):
    webdataset._scan_shard = wait_for_ever
    webdataset.scan_shards([root / "0.tar", root / "1.tar"])


def load(root):
    ImageFolder.fetch = wait_for_ever
    images = read_image_folder(str(root), "train", "x")
    list(build_loader("torchvision", images, plan_evaluation(2, 1, 0, 1), EvalTransform(32), CPU, 2).batches(0))


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


@pytest.mark.process
@pytest.mark.parametrize("work", [check, scan, load])
def test_no_worker_outlives_its_parent(work, tmp_path):
    make_tree(tmp_path, "train/a/1.jpg", "train/a/2.jpg")
    parent = FORK.Process(target=work, args=(tmp_path,))
    parent.start()
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    deadline = time.monotonic() + 60
    while len(workers := children.read_text().split()) < 2:
        assert time.monotonic() < deadline and parent.is_alive()
        time.sleep(0.05)
    time.sleep(0.5)  # they have begun
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "a worker stays"
        time.sleep(0.05)
