"""hubconf.py as torch.hub uses it: a clone of the repository, in processes where the package is not installed."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from resnest_imagenet import build_model, list_models
from resnest_imagenet.commands.launch import find_conf

REPOSITORY = find_conf().parent
# A branch is named, so that torch.hub does not ask GitHub for the main one.
PREAMBLE = """
import sys
import torch
try:
    from resnest_imagenet import build_model
    sys.exit("installed")
except ImportError:
    sys.modules.pop("resnest_imagenet", None)  # conf/, which an editable installation leaves in site-packages
clone = ("OWNER/resnest-imagenet:main",)
options = {"trust_repo": True, "skip_validation": True, "verbose": False}
"""


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory):
    """Make torch.hub's folder, with the repository as it unpacks it."""
    home = tmp_path_factory.mktemp("home")
    clone = home / "hub/OWNER_resnest-imagenet_main"
    shutil.copytree(REPOSITORY / "src", clone / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "hubconf.py", clone)
    return home


def run_isolated(script, torch_home):
    """Run a script with torch and the like at hand: without site's .pth files, by which we are installed."""
    environment = {**os.environ, "PYTHONPATH": str(Path(torch.__file__).parents[1]), "TORCH_HOME": str(torch_home)}
    environment |= {"OMP_NUM_THREADS": "1", "no_proxy": "*"}
    command = [sys.executable, "-S", "-c", PREAMBLE + script]
    result = subprocess.run(
        command, cwd=torch_home, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.process
def test_networks_from_a_clone_and_from_a_folder(torch_home):
    """Every network is an entry, and nothing else is."""
    script = f"""
print(*torch.hub.list(*clone, **options))
print(torch.hub.help(*clone, "resnest50", trust_repo=True, skip_validation=True))
for repository, source in ((*clone, "github"), ({str(REPOSITORY)!r}, "local")):
    model = torch.hub.load(repository, "resnest14_half", source=source, num_classes=3, dropout=0.2, **options)
    print(type(model).__name__, model.fc.out_features, model.dropout.p, model.training)
print(torch.hub.load(*clone, "resnet50d", **options).fc.out_features)
print(torch.hub.load(*clone, "deeplabv3", "resnest14_half", num_classes=4, channels=32, **options).head.classify)
print(sys.modules["resnest_imagenet"].__file__)
"""
    names, *text, clones, folders, peer, classifier, file = run_isolated(script, torch_home)
    assert names.split() == sorted(["deeplabv3", "rcnn", *list_models()])
    text = "\n".join(text)
    assert text.startswith("resnest50 in training mode, with random weights or published ones.\n")
    assert "the images on which these are evaluated: a" in text and "usually 224 pixels" in text
    assert 'pretrained: True for the authors\' weights; or "timm:NAME" or a file.' in text
    assert clones == folders == "ResNeSt 3 0.2 True"
    assert peer == "1000" and classifier.startswith("Conv2d(32, 4, ")
    assert Path(file) == torch_home / "hub/OWNER_resnest-imagenet_main/src/resnest_imagenet/__init__.py"


@pytest.fixture
def server(tmp_path):
    """Serve a folder on this machine, and yield it and its URL."""
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield tmp_path, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.process
def test_pretrained_and_missing_dependencies(torch_home, server):
    folder, url = server
    model = build_model("resnest14_half", 5)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    sha256 = hashlib.sha256(file.getvalue()).hexdigest()
    (folder / f"resnest14_half-{sha256[:8]}.pth").write_bytes(file.getvalue())
    torch.save(model.state_dict(), folder / "own.pth")
    protocol = {"order": "resize_crop", "ratio": 1.0, "interpolation": "auto", "antialias": True}
    config = {"model": {"name": "resnest14_half"}, "train": {}, "eval": {"crop": 48}, "protocol": protocol}
    torch.save({"model": model.state_dict(), "config": config, "classes": list("abcde"), "epoch": 1}, folder / "run.pt")
    script = f"""
missing = {{name: sys.modules.pop(name, None) for name in ("timm", "safetensors")}}
sys.modules.update(dict.fromkeys(missing))  # importing them now fails
try:
    torch.hub.load(*clone, "resnest14_half", **options)
except RuntimeError as error:
    print(error)
for name, module in missing.items():
    sys.modules.pop(name)
    if module:
        sys.modules[name] = module
torch.hub.list(*clone, **options)  # from now on the package is found
import pathlib
from resnest_imagenet.weights import published
published.MIRRORS = ({url!r},)
published.OFFICIAL["resnest14_half"] = {sha256!r}
load = lambda name, **more: torch.hub.load(*clone, name, **options, **more)
for more in ({{"pretrained": True}}, {{"pretrained": pathlib.Path({str(folder / "own.pth")!r})}}):
    for outputs in (5, 3):
        model = load("resnest14_half", num_classes=outputs, **more)
        print(model.layer1[0].conv1.weight.sum().item(), model.fc.weight.sum().item())
print(*(load("resnest14_half", num_classes=5, pretrained=f"{folder}/{{file}}").crop for file in ("own.pth", "run.pt")))
print(load("resnest14_half", pretrained=True, features_only=True).layer1[0].conv1.weight.sum().item())
for name, choice in (("resnest14", True), ("resnest14", "oficial:resnest14")):
    try:
        load(name, pretrained=choice)
    except ValueError as error:
        print(error)
"""
    dependencies, *sums, crops, backbone, unpublished, misspelt = run_isolated(script, torch_home)
    assert dependencies == "Missing dependencies: timm, safetensors"
    own = [str(weight.sum().item()) for weight in (model.layer1[0].conv1.weight, model.fc.weight)]
    for same, new in ((sums[0], sums[1]), (sums[2], sums[3])):
        assert same.split() == own
        assert new.split()[0] == own[0] and new.split()[1] != own[1]
    assert crops == "224 48"
    assert backbone == own[0]
    assert unpublished == "there are no official weights of resnest14: give pretrained='timm:NAME' or a file"
    assert misspelt.startswith("unknown weights 'oficial:resnest14'")
