"""Folders sent to the Hugging Face hub: to a local server that has its protocol."""

import re

import pytest
import torch
from huggingface_hub import constants

from conftest import compose_config
from local_hub import READER, WRITER, open_hub
from resnest_imagenet import build_model
from resnest_imagenet.checkpoint import save_checkpoint
from resnest_imagenet.commands.early import refuse_early
from resnest_imagenet.commands.export import run
from resnest_imagenet.config_reading import ExportConfig
from resnest_imagenet.errors import ConfigError, StorageError
from resnest_imagenet.weights.hub_push import FILES, push_folder

NAME = "resnest14_half"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Be the hub, for a user with a token that may write."""
    with open_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol beside HTTP, of the hub's own storage
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield server


@pytest.fixture
def folder(tmp_path):
    """Write what a folder of an export holds, and a file that is not of it."""
    path = tmp_path / "net-hub"
    path.mkdir()
    for name in (*FILES, "notes.txt"):
        (path / name).write_text(f"{name} of the network\n")
    return path


@pytest.mark.slow
def test_timm_loads_what_was_pushed(hub, tmp_path, capsys):
    import timm

    torch.manual_seed(0)
    model = build_model(NAME, 3, zero_gamma=False).eval()
    config = {"model": {"name": NAME}, "train": {}}
    state = {"model": model.state_dict(), "config": config, "classes": ["a", "b", "c"], "epoch": 1}
    save_checkpoint(state, tmp_path / "step-1.pt")
    options = (f"ckpt={tmp_path}/step-1.pt", "format=hub", f"out={tmp_path}/net", "crop=64", "push=me/my.net")
    for kind in ("a new private repository", "its repository"):
        run(compose_config("export", ExportConfig, *options))
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"wrote {tmp_path}/net: ")
        expected = rf"sent {tmp_path}/net to {hub.address}/me/my.net, {kind}: commit {hub.commit[:12]}"
        assert re.fullmatch(expected, lines[1])
    assert hub.private == {"me/my.net"} and hub.messages[0] == "Upload net"
    assert b'timm.create_model("hf-hub:me/my.net", pretrained=True)' in hub.repositories["me/my.net"]["README.md"]
    loaded = timm.create_model("hf-hub:me/my.net", pretrained=True, cache_dir=tmp_path / "cache").eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-4)


def test_only_the_exports_files_are_sent(hub, folder):
    push_folder(folder, "me/net")
    assert hub.repositories == {"me/net": {name: (folder / name).read_bytes() for name in FILES}}


def test_what_the_hub_refuses_is_one_line(hub, folder, monkeypatch):
    written = f"^push=me/net: {folder} is written, but not sent"
    cases = (
        (
            READER,
            set(),
            ConfigError,
            f"{written}: the token may not write there \\(403\\): choose another OWNER or token$",
        ),
        (
            "hf_old",
            set(),
            ConfigError,
            f"{written}: the hub refuses the token \\(401\\): run `hf auth login`, or set HF_",
        ),
        (WRITER, {"/commit/"}, StorageError, f"{written} \\(.*500.*\\): run the command again$"),
    )
    for token, failing, kind, message in cases:
        monkeypatch.setenv("HF_TOKEN", token)
        hub.failing = failing
        with pytest.raises(kind, match=message) as error:
            push_folder(folder, "me/net")
        assert "\n" not in str(error.value)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers
    with pytest.raises(StorageError, match=rf"{written} \(.*[Cc]onnect.*\): run the command again$"):
        push_folder(folder, "me/net")


def test_what_cannot_be_sent_is_refused_before_the_work(hub, monkeypatch):
    config = compose_config("export", ExportConfig, "ckpt=/nowhere.pt", "format=hub", "push=me/net")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="^push=me/net: HF_HUB_OFFLINE is set: unset it$"):
        refuse_early(config)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        ConfigError, match="^push=me/net: no token of the hub: run `hf auth login`, or set HF_TOKEN to a"
    ):
        refuse_early(config)
    for overrides, message in (
        (("format=onnx", "push=me/net"), "push=me/net is for format=hub, not onnx"),
        (("format=hub", "push=net"), "push=net: write OWNER/NAME, as the hub names a repository"),
    ):
        with pytest.raises(ConfigError, match=message):
            compose_config("export", ExportConfig, "ckpt=x", *overrides)
