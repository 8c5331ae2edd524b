"""Who may import whom: the rooms of docs/architecture.md."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import resnest_imagenet
from conftest import collected_with

PACKAGE = Path(resnest_imagenet.__file__).parent
FILES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}

# Leaves: every room may use them, and they use none of ours (distributed and randomness: only errors).
LEAVES = {"errors", "randomness", "files", "extensions", "instances", "torchvision_import"}
MEASURING = LEAVES | {
    "config",
    "schemas",
    "options",
    "recipe",
    "earlier",
    "checkpoint",
    "distributed",
    "supervision",
    "compute",
    "models",
    "weights",
    "data",
}
MAY_IMPORT = {
    "errors": set(),
    "randomness": set(),
    "instances": set(),
    "torchvision_import": {"errors"},
    "compute": {"errors"},
    "options": set(),
    "recipe": {"options"},
    "earlier": set(),
    "extensions": {"errors"},
    "config": {"options", "recipe"},
    "config_data": {"config", "options"},
    "config_reading": {"config", "options", "recipe"},
    "schemas": {"config", "config_reading", "errors", "extensions", "options", "recipe"},
    "distributed": {"errors"},
    "checkpoint": {"distributed", "errors", "files"},
    "files": {"errors"},
    "supervision": {"distributed", "errors"},
    "models": LEAVES,
    "weights": LEAVES | {"config", "options", "recipe", "checkpoint", "models"},
    "data": LEAVES,
    "evaluation": MEASURING,
    "inference": MEASURING | {"config_reading", "evaluation"},
    "reports": MEASURING | {"evaluation", "inference"},
    "tasks": MEASURING | {"config_data", "evaluation", "inference"},
    "training": MEASURING | {"evaluation", "inference", "tasks"},
    "commands": LEAVES
    | {
        "options",
        "recipe",
        "earlier",
        "config",
        "config_data",
        "config_reading",
        "schemas",
        "distributed",
        "weights",
        "data",
        "evaluation",
        "inference",
        "reports",
        "tasks",
        "training",
    },
    "__init__": {"errors", "extensions", "models", "weights", "inference", "tasks"},
}
# Packages that one place only may know.
ONLY_IN = {
    "hydra": {"commands"},
    "omegaconf": {"commands"},
    "nvidia": {"data/dali.py", "data/dali_decoding.py", "data/dali_ops.py"},
    "timm": {"models/zoo.py", "models/imagenet_classes.py", "weights/published.py", "training/optimizer.py"},
}
ONLY_IN["wandb"] = ONLY_IN["mlflow"] = {"training/trackers.py"}
ONLY_IN["triton"] = {"models/triton_splits.py"}
# The parts of its detectors: see models/rcnn.py.
DETECTORS = {
    f"models/{name}.py" for name in ("rcnn", "rcnn_graph", "proposals", "boxes", "masks", "roi_heads", "cascade")
}
ONLY_IN["torchvision"] = {"data/torchvision.py", "data/decoding.py", "models/coco_classes.py"} | DETECTORS
ONLY_IN["scipy"] = {"data/prepare.py"}
ONLY_IN["safetensors"] = {"checkpoint"}
PAINTING = {"reports/image_sections.py", "reports/table3_chart.py", "reports/explain_pictures.py"}
ONLY_IN["matplotlib"] = {"evaluation/charts.py"} | PAINTING
ONLY_IN["jinja2"] = {"reports/page.py"}
ONLY_IN["pycocotools"] = {"evaluation/boxes.py", "evaluation/masks.py", "data/masks.py", "models/masks.py"}
ONLY_IN["hotcoco"] = {"evaluation/boxes.py"}
ONLY_IN["gradio"] = {"reports/app.py"}
ONLY_IN["openvino"] = {"weights/openvino.py"}
ONLY_IN["captum"] = {"inference/explain.py"}
ONLY_IN["huggingface_hub"] = {"weights/published.py", "weights/hub_push.py"}


def imports():
    """Yield (file below the package, room, imported module) for every import, late ones too."""
    for file, tree in FILES.items():
        room = file.partition("/")[0].removesuffix(".py")
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                names = [node.module]
                if node.module == "resnest_imagenet":
                    names = [f"resnest_imagenet.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "import_extra":
                names = [argument.value for argument in node.args]
            else:
                continue
            for name in names:
                yield file, room, name


def test_rooms_import_only_what_they_may():
    seen = set()
    for file, room, name in imports():
        if name.startswith("resnest_imagenet."):
            target = name.split(".")[1]
            seen.add(room)
            assert target == room or target in MAY_IMPORT[room], f"{file} imports {name}"
    assert {"commands", "training", "evaluation", "data", "models"} <= seen


def test_each_library_has_its_place():
    found = set()
    for file, room, name in imports():
        package = name.partition(".")[0]
        if package in ONLY_IN:
            found.add(package)
            assert room in ONLY_IN[package] or file in ONLY_IN[package], f"{file} imports {name}"
    assert found == set(ONLY_IN)


def test_what_takes_seconds_to_import_is_imported_late():
    """By files that others import; the loaders, the detectors and the Triton kernels are imported late themselves."""
    slow = {"timm", "torchvision", "nvidia", "triton", "matplotlib", "tensorboard", "gradio", "scipy", "captum"}
    slow |= {"torch._dynamo", "torch.compiler", "torch.utils.flop_counter", "torch.utils.tensorboard", "onnxruntime"}
    late = {"data/dali.py", "data/dali_decoding.py", "data/dali_ops.py", "models/triton_splits.py"}
    late |= {"data/torchvision.py", "evaluation/charts.py", "models/coco_classes.py"} | DETECTORS | PAINTING
    for file in FILES.keys() - late:
        for node in FILES[file].body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not any(name in slow or name.partition(".")[0] in slow for name in names), f"{file} imports {names}"


def test_nothing_but_distributed_asks_who_it_is():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "distributed.py":
            text = path.read_text()
            assert "WORLD_SIZE" not in text and "LOCAL_RANK" not in text, path


def imports_of_files():
    """Return which of our files each file imports, late imports too."""
    graph = {file: set() for file in FILES}
    for file, tree in FILES.items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):  # a module of a room, or a name in a module
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            paths = {f"{name.removeprefix('resnest_imagenet.').replace('.', '/')}.py" for name in names}
            graph[file] |= paths & FILES.keys() - {file}
    return graph


@pytest.mark.slow
def test_no_files_import_each_other():
    try:
        TopologicalSorter(imports_of_files()).prepare()
    except CycleError as error:
        raise AssertionError("a circle of files: " + " imports ".join(reversed(error.args[1]))) from None


def test_the_run_imports_few_modules():
    imported = {name for file, _, name in imports() if file == "training/train.py"}
    assert len(imported) <= 22, sorted(imported)


def test_functions_fit_a_screen():
    long = {
        f"{file}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for file, tree in FILES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60
    }
    assert not long, long


def test_collecting_the_tests_imports_nothing_that_takes_seconds():
    assert not collected_with, f"a test imports {collected_with} before it runs"
