import os

# Before torch: idle OpenMP threads sleep, 20 times faster where processes share cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Inductor then compiles here: it would start processes that import torch.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes with tests
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import json
import multiprocessing.process
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import nn

# Before Triton: its kernels run in the interpreter where there is no GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import tiny_task
from faulty_task import Fault, open_with
from resnest_imagenet.commands.evaluate import evaluate_images, read_network
from resnest_imagenet.commands.launch import check_config, find_conf
from resnest_imagenet.commands.predict import predict_images, read_inputs
from resnest_imagenet.commands.table3 import load_recipes
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.config_reading import EvalConfig, PredictConfig
from resnest_imagenet.data.demo import write_demo_images
from resnest_imagenet.data.demo_objects import write_demo_objects
from resnest_imagenet.data.demo_scenes import write_demo_scenes
from resnest_imagenet.distributed import Ranks
from resnest_imagenet.evaluation.overlays import encode_index_png
from resnest_imagenet.evaluation.results import CropResult
from resnest_imagenet.inference.predict import Prediction
from resnest_imagenet.training import run_folder
from resnest_imagenet.training import train as train_module
from resnest_imagenet.training.stopping import SIGNALS

pytest_plugins = ["worker_ends"]

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, CPU)
# What torchrun tells the first of two ranks.
LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}

# Of the classes of drawn scenes; none of them is one that the project itself would choose.
SCENE_COLOURS = np.array([(9, 8, 7), (250, 1, 2), (3, 250, 4), (5, 6, 250), (251, 252, 5), (6, 253, 254)], np.uint8)

# Seconds each to import: a test imports them itself.
HEAVY = {"torchvision", "timm", "matplotlib", "scipy", "nvidia.dali", "torch._dynamo", "wandb", "mlflow"}
collected_with: set[str] = set()
# With tests of many seconds each: they come first, since at the end of all one process would run them alone.
LONG = {"test_faults.py", "test_docs.py", "test_distributed.py"}
LONG |= {"test_export_rcnn.py", "test_export_deeplab.py", "test_export_graphs.py", "test_published_rcnn.py"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="skip what starts a process or is marked slow")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take what starts a process, and what is slow, out of the quick tier; let the longest come first."""
    collected_with.update(HEAVY & sys.modules.keys())
    items.sort(key=lambda item: item.path.name not in LONG)
    if config.getoption("quick"):
        dropped = [item for item in items if item.get_closest_marker("process") or item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session):
    """Fail what starts a process in the quick tier."""
    # What is imported stays: Python need not look through its million objects for cycles, a twentieth of all time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    with pytest.MonkeyPatch.context() as patch:
        if session.config.getoption("quick"):
            patch.setattr(subprocess.Popen, "__init__", _refuse_process)
            patch.setattr(multiprocessing.process.BaseProcess, "start", _refuse_process)
            patch.setattr(os, "fork", _refuse_process)
            patch.setattr(run_folder, "_git_commit", lambda: None)  # it asks git
        return (yield)


_start_process = subprocess.Popen.__init__


def _refuse_process(*args: Any, **options: Any) -> None:
    # Imports may ask the system: matplotlib's, the first on a machine, for its fonts; mlflow's and NumPy 1.26's for the
    # processor.
    if args[1:] and (args[1] == "lscpu" or list(args[1])[:1] in (["fc-list"], ["uname"])):
        return _start_process(*args, **options)
    raise AssertionError("a test of the quick tier starts a process: mark it with @pytest.mark.process")


@pytest.fixture(scope="session")
def demo_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """103 training and 40 val images of ten classes."""
    folder = tmp_path_factory.mktemp("demo")
    write_demo_images(folder, seed=0, train_per_class=11, val_per_class=4)
    for path in sorted((folder / "train").glob("disk/*"))[:7]:
        path.unlink()
    return folder


@pytest.fixture(scope="session")
def few_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 training and 10 val images of ten classes, where their number is not what is tested."""
    folder = tmp_path_factory.mktemp("few")
    write_demo_images(folder, seed=0, train_per_class=2, val_per_class=1)
    return folder


def compose_config(name: str, schema: type, *overrides: str):
    """Return the shipped configuration as the command composes it.

    Hydra takes a sixth of a second. What it makes of the groups is kept, and values are merged into that: with the same
    result (test_composing.py). Values that are more than words, numbers, paths and lists of them are Hydra's.
    """
    choices = [override for override in overrides if not PLAIN_VALUE.fullmatch(override) or is_choice(override)]
    values = [override for override in overrides if override not in choices]
    composed = compose_once(name, *choices)
    if not all(has_value(composed, value.partition("=")[0]) for value in values):
        composed, values = compose_once.__wrapped__(name, *overrides), []  # an error, in Hydra's words
    return check_config(OmegaConf.merge(composed, OmegaConf.from_dotlist(values)), schema)


# Of Hydra's grammar and YAML's alike: words and paths but for YAML's old booleans, and numbers.
WORD = r"(?!(?:yes|no|on|off|y|n|nan|inf)\b)(?:[A-Za-z/][\w./-]*|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:e-?\d+)?)"
PLAIN_VALUE = re.compile(rf"[a-z][\w.]*=(?:{WORD}|\[{WORD}(?:,{WORD})*\])", re.ASCII)


def is_choice(override: str) -> bool:
    """Tell whether an override chooses of a group."""
    return (find_conf() / override.partition("=")[0]).is_dir()


@cache
def compose_once(name: str, *overrides: str) -> DictConfig:
    """Compose by Hydra, and keep the result."""
    with initialize_config_dir(str(find_conf()), version_base="1.3"):
        return compose(name, list(overrides))


def has_value(composed: DictConfig, option: str) -> bool:
    """Tell whether there is an option of this name that is no section."""
    section, _, name = option.rpartition(".")
    parent = OmegaConf.select(composed, section) if section else composed
    return OmegaConf.is_dict(parent) and name in list(parent) and not OmegaConf.is_dict(parent._get_node(name))


def change_config(values: DictConfig, *overrides: str) -> TrainConfig:
    """Return composed values with some changed; no groups among these."""
    return check_config(OmegaConf.merge(values, OmegaConf.from_dotlist(list(overrides))), TrainConfig)


# The demo's experiment, shrunk: 12 steps of 16 images in two epochs.
SMALL = ("+experiment=demo", "device=cpu", "train.epochs=2", "train.crop=32", "train.batch_size=16", "loader.workers=0")
SMALL += ("log.pictures=false",)  # a second at the end of each run


@pytest.fixture(scope="session")
def segmentation_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run on drawn scenes, beside them, ../scenes, whose masks have a palette of their own."""
    folder = tmp_path_factory.mktemp("segmentation")
    write_demo_scenes(folder / "scenes", seed=0, train_scenes=8, val_scenes=3)
    for file in (folder / "scenes/masks").rglob("*.png"):
        file.write_bytes(encode_index_png(np.array(Image.open(file)), SCENE_COLOURS))
    places = (f"data.root={folder / 'scenes'}", f"run_dir={folder / 'run'}")
    # So few steps at this rate end in masks of several classes.
    options = ("device=cpu", "train.epochs=2", "train.crop=64", "train.batch_size=2", "train.lr=2e-3")
    options += ("loader.workers=0", "log.trackers=[]", "log.every_steps=1", "+experiment=demo_segmentation")
    options += ("log.pictures=false",)
    train_module.train(compose_config("train", TrainConfig, *options, *places))
    return folder / "run"


# The demo's experiment, shrunk: 6 steps of 2 images in two epochs.
SMALL_OBJECTS = ("+experiment=demo_detection", "device=cpu", "train.epochs=2", "train.batch_size=2")
SMALL_OBJECTS += ("train.short_sides=64", "train.longest=96", "protocol.short_side=64", "protocol.longest=96")
SMALL_OBJECTS += ("train.channels=16", "train.box_width=16", "train.box_convs=1", "train.mask_convs=1")
SMALL_OBJECTS += ("train.samples=16", "protocol.detections=20", "loader.workers=0", "log.trackers=[]")
SMALL_OBJECTS += ("log.pictures=false",)
SMALL_OBJECTS += ("log.every_steps=1", "checkpoint.every_steps=5", "eval.every_epochs=1", "train.class_agnostic=null")


@pytest.fixture(scope="session")
def demo_objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 training and 3 val images of drawn shapes, with boxes and masks."""
    folder = tmp_path_factory.mktemp("objects")
    write_demo_objects(folder, seed=0, train_images=7, val_images=3)
    return folder


@pytest.fixture(scope="session")
def object_values(demo_objects: Path) -> DictConfig:
    """The values of a small run of Mask R-CNN on `demo_objects`, composed once."""
    with initialize_config_dir(str(find_conf()), version_base="1.3"):
        return compose("train", [*SMALL_OBJECTS, f"data.root={demo_objects}"])


@pytest.fixture(scope="session")
def detection_run(object_values: DictConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run of Mask R-CNN on `demo_objects`, which evaluates after both of its epochs."""
    run = tmp_path_factory.mktemp("detection") / "run"
    train_module.train(change_config(object_values, f"run_dir={run}"))
    return run


@pytest.fixture
def object_run(object_values: DictConfig, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Make the configuration of a small run on `demo_objects` in a folder of its own."""

    def make(*overrides: str, run: str = "run") -> TrainConfig:
        return change_config(object_values, f"run_dir={tmp_path / run}", *overrides)

    return make


@pytest.fixture
def small_run(demo_images: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Make the configuration of a small run in a folder of its own."""

    def make(*overrides: str, run: str = "run") -> TrainConfig:
        places = (f"data.root={demo_images}", f"run_dir={tmp_path / run}")
        return compose_config("train", TrainConfig, *SMALL, *places, *overrides)

    return make


@pytest.fixture(scope="session")
def recipes() -> dict[str, dict[str, Any]]:
    """The recipes of runs in the tests, as the commands compose them: a sixth of a second each."""
    with initialize_config_dir(str(find_conf()), version_base="1.3"):
        return {name: load_recipes()[name] for name in ("demo", "demo_segmentation", "resnest")}


def use_golden_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Table 3 and the report have the figures of golden.json: to count takes seconds, and test_zoo.py does it.

    At another crop than its two they have those of 224, and for any number of classes those of 1000.
    """
    from resnest_imagenet.reports import report, table3, table3_chart  # late: it imports torchvision

    golden = json.loads((Path(__file__).parent / "models/golden.json").read_text())
    places = {224: 1, 320: 2}

    def count_cost(name: str, crop: int, num_classes: int = 1000) -> tuple[int, int]:
        return golden[name][0], golden[name][places.get(crop, 1)]

    for module in (report, table3, table3_chart):
        monkeypatch.setattr(module, "count_cost", count_cost)


@pytest.fixture(scope="session")
def tiny_values() -> DictConfig:
    """The values of a run of TinyTask: 12 steps of 16 samples in two epochs; composed once, which takes longer."""
    tiny_task.register()
    with initialize_config_dir(str(find_conf()), version_base="1.3"):
        return compose("train", [*SMALL, "train.task=tiny", "data.root=unused", "log.trackers=[]"])


@pytest.fixture
def tiny_run(tiny_values: DictConfig, tmp_path: Path) -> Iterator[Callable[..., TrainConfig]]:
    """Make the configuration of a run of TinyTask in a folder of its own."""

    def make(*overrides: str, run: str = "run") -> TrainConfig:
        return change_config(tiny_values, f"run_dir={tmp_path / run}", *overrides)

    tiny_task.register()
    yield make
    tiny_task.register()  # without the options that a test has given it


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give all runs from here on these faults, and no others."""

    def give(*faults: Fault) -> None:
        monkeypatch.setattr(train_module, "open_task", open_with(*faults))

    return give


@pytest.fixture
def evaluation_of(demo_images: Path) -> Callable[..., EvalConfig]:
    """Make the configuration of an evaluation on the demo's val images."""

    def make(ckpt: Path, *overrides: str) -> EvalConfig:
        places = (f"data.root={demo_images}", f"ckpt={ckpt}")
        return compose_config("eval", EvalConfig, *places, "device=cpu", "crop=32", "loader.workers=0", *overrides)

    return make


@pytest.fixture
def signals() -> Iterator[None]:
    """Give back the signals that a stopped run leaves ignored: its process would have ended."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch):
    """Count what is compiled, and run it as it is: `frame_count` graphs."""
    from torch._dynamo.testing import CompileCounter  # late: it imports Triton

    torch.compiler.reset()
    counter = CompileCounter()
    compile_module = nn.Module.compile

    def compile_counted(module: nn.Module, dynamic: bool | None = None, **options: object) -> None:
        compile_module(module, backend=counter, dynamic=dynamic)

    monkeypatch.setattr(nn.Module, "compile", compile_counted)
    return counter


def evaluate_checkpoint(config: EvalConfig) -> list[CropResult]:
    """Return what resnest-eval measures of a network of classification."""
    return evaluate_images(config, *read_network(config))


def predict_classes(config: PredictConfig) -> tuple[list[Prediction], list[str]]:
    """Return what resnest-predict finds by a network of classification, and its lines about images that it skips."""
    return predict_images(config, *read_inputs(config))


def newest_checkpoint(run: Path) -> Path:
    """Return the checkpoint that a run would resume from."""
    return max((run / "checkpoints").glob("step-*.pt"))


def run_module(module: str, *arguments: str, ranks: int = 1, **options) -> subprocess.CompletedProcess[str]:
    """Run a module of ours as a process, or as several under torchrun, each with one thread."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-m", *launcher, module, *arguments],
        env=environment,
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
        **options,
    )
