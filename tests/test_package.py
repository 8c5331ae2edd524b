"""The package as it is handed out: a source archive, the wheel made of it, and what these say about themselves."""

import os
import re
import subprocess
import sys
import tarfile
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path

import pytest
import yaml

import resnest_imagenet

ROOT = Path(resnest_imagenet.__file__).resolve().parents[2]
# Prints where the package and its configurations are.
WHERE = (
    "import resnest_imagenet as package, resnest_imagenet.commands.launch as launch;"
    "print(package.__version__, package.__file__, launch.find_conf())"
)


def test_documents_tell_the_package_s_version():
    version = resnest_imagenet.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version


@pytest.mark.process
def test_what_is_handed_out_works_outside_of_the_checkout(tmp_path, monkeypatch):
    """One test: to build both and to install the wheel takes seconds."""
    from hatchling.build import build_sdist, build_wheel

    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / build_sdist(str(tmp_path))) as archive:
        archive.extractall(tmp_path, filter="data")
    source, site = tmp_path / f"resnest_imagenet-{resnest_imagenet.__version__}", tmp_path / "site"
    check_source(source)
    monkeypatch.chdir(source)
    wheel = tmp_path / build_wheel(str(tmp_path))
    options = ("--quiet", "--no-deps", "--no-index", "--target", site)
    subprocess.run([sys.executable, "-m", "pip", "install", *options, wheel], check=True)
    check_metadata(site)
    check_commands(site, tmp_path)


def check_source(folder):
    names = {path.name for path in folder.iterdir()}
    assert {"src", "conf", "tests", "docs", "tools", "docker", "Makefile", "constraints.txt", "hubconf.py"} <= names
    assert not names & {".git", ".venv", "data", "runs", "dist"}
    assert list_files(folder / "src") == list_files(ROOT / "src")


def check_metadata(site):
    (information,) = site.glob("resnest_imagenet-*.dist-info")
    metadata = message_from_string((information / "METADATA").read_text())
    assert metadata["Version"] == resnest_imagenet.__version__ and metadata["License-Expression"] == "Apache-2.0"
    assert (information / "licenses/LICENSE").is_file()
    pythons = [name.rpartition(" ")[2] for name in metadata.get_all("Classifier") if ":: Python :: 3." in name]
    assert metadata["Requires-Python"] == f">={pythons[0]}" and len(pythons) == 4
    # DALI has wheels for Linux only: elsewhere its extra brings nothing.
    requirements = metadata.get_all("Requires-Dist")
    assert all("sys_platform == 'linux'" in line for line in requirements if "dali" in line)
    entries = ConfigParser()
    entries.read(information / "entry_points.txt")
    assert sorted(path.name for path in (site / "bin").iterdir()) == sorted(entries["console_scripts"])


def check_commands(site, folder):
    environment = {**os.environ, "PYTHONPATH": str(site)}
    options = {"cwd": folder, "env": environment, "text": True}
    package = site / "resnest_imagenet"
    where = subprocess.check_output([sys.executable, "-c", WHERE], **options).split()
    assert where == [resnest_imagenet.__version__, str(package / "__init__.py"), str(package / "conf")]
    assert list_files(package / "conf") == list_files(ROOT / "conf") and (package / "py.typed").is_file()
    assert "resnest-train " in subprocess.check_output([site / "bin/resnest-train", "--help"], **options)
    command = [site / "bin/resnest-data", "demo", "out=images", "train_per_class=1", "val_per_class=1"]
    assert subprocess.check_output(command, **options) == "wrote the demo images in images\n"
    assert len(list((folder / "images").rglob("*.JPEG"))) == 20


def list_files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix not in ("", ".pyc"))
