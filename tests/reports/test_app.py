"""The page of resnest-app, in a real browser: what a dropped picture gets, and that nothing is asked of others."""

import socket

import pytest
import torch

from browser import needs_browser
from conftest import compose_config
from devtools import open_tab
from resnest_imagenet import build_model
from resnest_imagenet.checkpoint import save_checkpoint
from resnest_imagenet.commands.app import plan_page
from resnest_imagenet.config_reading import AppConfig
from resnest_imagenet.errors import ConfigError

CLASSES = ["cross", "disk", "ring", "square"]
DROP = "button:has(input[type=file])"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = build_model("resnest14_half", len(CLASSES), zero_gamma=False)
    path = tmp_path_factory.mktemp("run") / "step-1.pt"
    config = {"model": {"name": "resnest14_half"}, "train": {}}
    save_checkpoint({"model": model.state_dict(), "config": config, "classes": CLASSES, "epoch": 1}, path)
    return path


def plan(checkpoint, *overrides):
    return plan_page(compose_config("app", AppConfig, f"ckpt={checkpoint}", "device=cpu", *overrides))


@needs_browser
@pytest.mark.slow
@pytest.mark.process
def test_a_dropped_picture_is_predicted_and_explained_on_this_machine_alone(
    checkpoint, few_images, tmp_path, monkeypatch
):
    from resnest_imagenet.inference.classifier import open_classifier
    from resnest_imagenet.inference.predict import predict
    from resnest_imagenet.reports.app import serving

    picture = min(few_images.glob("val/ring/*"))
    broken = tmp_path / "broken.jpg"
    broken.write_text("no picture")
    hosts = []
    connect = socket.socket.connect

    def record(own, address):
        if own.family in (socket.AF_INET, socket.AF_INET6):
            hosts.append(address[0])
        return connect(own, address)

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # of a network; no request for this machine may take it
    monkeypatch.setenv("no_proxy", "localhost")
    monkeypatch.setattr(socket.socket, "connect", record)
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, ask=socket.getaddrinfo: hosts.append(host) or ask(host, *rest)
    )
    with serving(plan(checkpoint, "crop=64"), "best.pt", 0) as address:
        with open_tab(address, tmp_path / "profile") as tab:
            tab.drop(picture, DROP)
            text = tab.wait_for(
                "[...document.images].filter((image) => image.complete && image.naturalWidth > 300).length == 2"
                " && document.body.innerText"
            )
            assert not tab.problems
            tab.call("Page.navigate", url=f"{address}?again")
            tab.wait_for("location.search")
            tab.drop(broken, DROP)
            toast = tab.wait_for("document.querySelector('[data-testid=toast-body]')?.innerText")
            requests = [request for request in tab.requests if not request.startswith(("data:", "blob:"))]
            assert requests and all(request.startswith(address) for request in requests)
        with pytest.raises(ConfigError, match="^port=.*: not free: choose another$"):
            port = int(address.rstrip("/").rpartition(":")[2])
            serving(plan(checkpoint, "crop=64"), "best.pt", port).__enter__()
    assert set(hosts) <= {"127.0.0.1", "localhost", "::1", None}
    expected, _ = predict(open_classifier(checkpoint, crop=64, device="cpu"), picture, top=3)
    lines = text.splitlines()
    shown = [line for line in lines if line in CLASSES][1:]  # the first is the headline
    assert shown == [prediction.label for prediction in expected] and shown[0] in lines
    percents = [line for line in lines if line.endswith("%")]
    assert percents == [f"{round(100 * prediction.probability)}%" for prediction in expected]
    assert "resnest14_half: best.pt" in lines and "weights of the splits" in lines
    assert "broken.jpg: " in toast and "/" not in toast, toast


@pytest.mark.slow
def test_other_tasks_show_their_pictures(segmentation_run, detection_run, demo_objects):
    from resnest_imagenet.inference.images import list_images

    scene = min(segmentation_run.parent.glob("scenes/images/val*/*"))
    with pytest.raises(ConfigError, match=r"^layer is of classification: .*best.pt is of segmentation$"):
        plan(segmentation_run / "checkpoints/best.pt", "layer=layer3")
    page = plan(segmentation_run / "checkpoints/best.pt", "top=2")
    answer = page.ask(list_images(scene))
    assert page.shares == "share of the pixels" and 0.1 < sum(answer.shares.values()) <= 1
    assert len(answer.shares) <= 2 and len(answer.pictures) == len(page.pictures) == 1
    photo = min((demo_objects / "val2017").glob("*"))
    page = plan(detection_run / "checkpoints/best.pt", "score=0", "top=4")
    answer = page.ask(list_images(photo))
    assert page.network.startswith("Mask R-CNN") and page.pictures == ("objects with a score above 0",)
    assert list(answer.shares.values()) == sorted(answer.shares.values(), reverse=True) and len(answer.shares) <= 4
    assert answer.pictures[0].size == list_sizes(photo)


def list_sizes(path):
    from PIL import Image

    return Image.open(path).size


def test_options_of_other_tasks_are_one_line(checkpoint):
    with pytest.raises(ConfigError, match=r"^score is of detection: .*step-1.pt is of classification$"):
        plan(checkpoint, "score=0.5")


def test_without_the_extra_it_is_one_line(monkeypatch):
    from resnest_imagenet.reports import app

    monkeypatch.setattr(app, "find_spec", lambda name: None if name == "gradio" else object())
    with pytest.raises(ConfigError, match=r"^resnest-app needs the extra \[app\] of resnest-imagenet: pip install "):
        plan("/nowhere.pt")
