"""Who may import whom: the rooms of the README's picture."""

import ast
import subprocess
import sys
from pathlib import Path

import resnest_imagenet

PACKAGE = Path(resnest_imagenet.__file__).parent

# Leaves: every room may use them, and they use none of ours (distributed and randomness: only errors).
LEAVES = {"errors", "randomness", "files"}
MEASURING = LEAVES | {
    "config",
    "recipe",
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
    "compute": set(),
    "options": set(),
    "recipe": {"options"},
    "extensions": {"errors"},
    "config": {"errors", "extensions", "options", "recipe"},
    "distributed": {"errors"},
    "checkpoint": {"distributed", "errors", "files"},
    "files": {"errors"},
    "supervision": {"distributed", "errors"},
    "models": LEAVES,
    "weights": LEAVES | {"config", "checkpoint", "models"},
    "data": LEAVES,
    "evaluation": MEASURING,
    "inference": MEASURING | {"evaluation"},
    "reports": MEASURING | {"evaluation", "inference"},
    "tasks": MEASURING | {"evaluation", "inference"},
    "training": MEASURING | {"evaluation", "inference", "tasks"},
    "commands": LEAVES
    | {"config", "recipe", "distributed", "weights", "data", "evaluation", "inference", "reports", "tasks", "training"},
    "__init__": {"models"},
}
# Packages that one place only may know.
ONLY_IN = {
    "hydra": {"commands"},
    "omegaconf": {"commands"},
    "nvidia": {"data/dali.py", "data/dali_ops.py"},
    "timm": {"models/zoo.py", "training/optimizer.py"},
}
ONLY_IN["wandb"] = ONLY_IN["mlflow"] = {"training/trackers.py"}
ONLY_IN["triton"] = {"models/triton_splits.py"}
ONLY_IN["torchvision"] = {"data/torchvision.py", "data/decoding.py"}
ONLY_IN["scipy"] = {"data/prepare.py"}
ONLY_IN["safetensors"] = {"checkpoint"}
ONLY_IN["matplotlib"] = {"evaluation/charts.py", "reports/report.py", "reports/explain_pictures.py"}
ONLY_IN["captum"] = {"inference/explain.py"}
ONLY_IN["huggingface_hub"] = {"weights/published.py"}


def imports():
    """Yield (file below the package, room, imported module) for every import, late ones too."""
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE)
        room = file.parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                names = [node.module]
                if node.module == "resnest_imagenet":
                    names = [f"resnest_imagenet.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                yield file.as_posix(), room, name


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


def test_the_library_needs_neither_hydra_nor_dali():
    script = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['hydra', 'omegaconf', 'nvidia.dali']))  # importing them now fails\n"
        "from resnest_imagenet import build_model, list_models\n"
        "print(len(list_models()), build_model('resnest14_half', num_classes=3).fc.out_features)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.stdout == "25 3\n", result.stderr


def test_nothing_but_distributed_asks_who_it_is():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "distributed.py":
            text = path.read_text()
            assert "WORLD_SIZE" not in text and "LOCAL_RANK" not in text, path
