"""What a run shows elsewhere, asked of TensorBoard's server, W&B's files and MLflow's store."""

import importlib.util
import io
import json
import re
import struct
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import tiny_task
from conftest import ALONE, SMALL, compose_config
from faulty_task import Fault, open_with
from resnest_imagenet.config import TrainConfig
from resnest_imagenet.errors import ConfigError, Stopped
from resnest_imagenet.training import trackers as trackers_module
from resnest_imagenet.training import train as train_module
from resnest_imagenet.training.run_folder import RunFolder
from resnest_imagenet.training.trackers import open_trackers, require_trackers, show_event
from resnest_imagenet.training.train import train
from run_files import read_events, without_clock

TINY = (*SMALL, "train.task=tiny", "data.root=unused")


def points_of(events, event, name):
    return [(e["step"], e[name]) for e in events if e["event"] == event]


@pytest.fixture(autouse=True)
def forget_wandb():
    """Each test has an environment of its own, and wandb reads it once."""
    yield
    if wandb := sys.modules.get("wandb"):
        wandb.teardown()


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A run with all trackers that dies after step 10 of 12, resumes after step 6, and ends; and the same with none."""
    place = tmp_path_factory.mktemp("shown")
    tiny_task.register()

    def interrupt():
        raise KeyboardInterrupt

    def run(name, trackers, *more):
        options = (f"run_dir=runs/{name}", "log.every_steps=3", "train.cutmix_alpha=1.0", "train.dropout=0.2")
        return train(compose_config("train", TrainConfig, *TINY, *options, f"log.trackers={trackers}", *more))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_PROJECT", "a-project")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/store.db")
        patch.setenv("MLFLOW_EXPERIMENT_NAME", "an experiment")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        run("without", "[]")
        patch.setattr(train_module, "open_task", open_with(Fault(1, 4, interrupt)))
        with pytest.raises(KeyboardInterrupt):
            run("with", "[tensorboard,wandb,mlflow]")
        died = read_events(place / "runs/with")
        patch.setattr(train_module, "open_task", open_with())
        run("with", "[tensorboard,wandb,mlflow]", "timeout_seconds=500")
    events = read_events(place / "runs/with")
    task = tiny_task.TinyTask(compose_config("train", TrainConfig, *TINY))
    (first_batch, _) = next(task.build_loader(task.plan_batches(6, ALONE), ALONE).batches(0))
    return SimpleNamespace(place=place, run=place / "runs/with", events=events, died=died, first_batch=first_batch)


@pytest.mark.slow
def test_a_run_is_the_same_whatever_shows_it(shown):
    with_all, with_none = without_clock(shown.events), without_clock(read_events(shown.place / "runs/without"))
    assert with_all == with_none and len(with_all) == 6
    assert shown.died[-1]["step"] == 9  # a point that the trackers get twice
    # Nothing beside MLflow's own files is left where the command ran.
    assert sorted(path.name for path in shown.place.iterdir()) == ["mlruns", "runs", "store.db"]
    assert {path.name for path in shown.run.iterdir()} >= {"tensorboard", "wandb", "trackers.json"}
    assert not {path.name for path in (shown.place / "runs/without").iterdir()} & {"tensorboard", "trackers.json"}


@contextmanager
def tensorboard(folder):
    """Serve a folder with TensorBoard on a free port; yield a function that asks it."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as server:
        try:
            address = next(found[0] for line in server.stderr if (found := re.search(r"http://[\d.:]+", line)))

            def ask(what, **query):
                url = f"{address}/data/plugin/{what}?{urllib.parse.urlencode(query)}"
                with urllib.request.urlopen(url, timeout=20) as answer:
                    content = answer.read()
                return json.loads(content) if answer.headers.get_content_type() == "application/json" else content

            yield ask
        finally:
            server.terminate()


def wait_for(condition):
    """Return the first true answer within 20 seconds: the server reads its files in the background."""
    for _ in range(100):
        if answer := condition():
            return answer
        time.sleep(0.2)
    raise TimeoutError


@pytest.mark.process
def test_tensorboards_server_shows_numbers_pictures_and_configuration(shown):
    with tensorboard(shown.run / "tensorboard") as ask:
        tags = wait_for(lambda: ask("images/tags"))["."]
        assert tags.keys() == {"train/samples", "eval/answers"}
        for event, name in (("train", "loss"), ("train", "lr"), ("eval", "accuracy")):
            points = ask("scalars/scalars", run=".", tag=f"{event}/{name}")
            expected = [(step, pytest.approx(value)) for step, value in points_of(shown.events, event, name)]
            assert [(step, value) for _, step, value in points] == expected

        pictures = {}
        for tag in tags:
            for sample in ask("images/images", run=".", tag=tag, sample=0):
                content = ask("images/individualImage", **dict(urllib.parse.parse_qsl(sample["query"])))
                pictures[tag, sample["step"]] = np.array(Image.open(io.BytesIO(content)))
        # The picture of step 6 is the first process's; of each process there are samples.
        assert pictures.keys() == {("eval/answers", step) for step in (6, 12)} | {
            ("train/samples", step) for step in (0, 6)
        }
        np.testing.assert_array_equal(pictures["train/samples", 0], tiny_task.draw_numbers(shown.first_batch))

        (text,) = ask("text/text", run=".", tag="config/text_summary")
        assert "<pre><code>run_dir: runs/with\nseed: 0\n" in text["text"] and "dropout: 0.2" in text["text"]


def event_at(step, *, loss):
    return {"event": "train", "epoch": 1, "step": step, "loss": loss, "time": 1e9 + step}


def read_tensorboard(folder):
    """Return the values and the pictures' brightest pixels by step, as TensorBoard's reader of Python has them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    pictures = [(image.step, Image.open(io.BytesIO(image.encoded_image_string))) for image in read.Images("picture")]
    values = [(point.step, point.value) for point in read.Scalars("train/loss")]
    return values, [(step, np.array(picture).max()) for step, picture in pictures]


def test_tensorboard_keeps_what_a_run_resumes_from_and_drops_the_rest(tmp_path):
    """Its files are cut where they hold all events until there, and written from scratch where they do not."""
    tiny_task.register()
    (tmp_path / "config.yaml").touch()
    config = compose_config("train", TrainConfig, *TINY)
    folder, events, pictures = tmp_path / "tensorboard", [], []

    def run(process, resumes_from):
        """Return whether the files were written from scratch, after steps 5, 10 and 15 that follow."""
        nonlocal events, pictures
        events = [event for event in events if event["step"] <= resumes_from]
        pictures = [(step, brightest) for step, brightest in pictures if step <= resumes_from]
        (tracker,) = open_trackers(tmp_path, config, "accuracy", resumes_from, events)
        for step in range(resumes_from // 5 * 5 + 5, 20, 5):
            event = event_at(step, loss=float(process))
            show_event(tracker, event)
            tracker.image("picture", step, np.full((2, 3, 3), process, np.uint8))
            events.append(event)
            pictures.append((step, process))
        tracker.flush()
        assert read_tensorboard(folder) == ([(event["step"], event["loss"]) for event in events], pictures)
        tracker.close(None)
        newest = max(folder.iterdir())
        newest.write_bytes(newest.read_bytes()[:-10])  # as of a process that was killed while it wrote step 15
        return tracker.is_new

    assert run(1, 0) and len(list(folder.iterdir())) == 1
    assert not run(2, 10) and len(list(folder.iterdir())) == 2
    assert not run(3, 5) and len(list(folder.iterdir())) == 3
    events.insert(-1, event_at(12, loss=9.0))  # shown by a process without TensorBoard
    assert run(4, 12) and len(list(folder.iterdir())) == 1
    newest = max(folder.iterdir())
    newest.write_bytes(newest.read_bytes().replace(b"train/loss", b"train/los\xff", 1))  # no text: no event
    assert run(5, 10) and len(list(folder.iterdir())) == 1


def read_wandb(path):
    """Yield the records of a .wandb file: LevelDB's log format, in blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, record = path.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while place + 7 <= len(content):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(record)
            record = b""


@pytest.mark.process
def test_wandb_has_numbers_pictures_and_configuration_and_resumes_in_the_same_run(shown):
    files = sorted(shown.run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    name = json.loads((shown.run / "trackers.json").read_text())["wandb"]
    assert [path.name for path in files] == [f"run-{name}.wandb"] * 2
    history, metrics, exits = [], [], []
    for path in files:
        for record in read_wandb(path):
            if record.HasField("run"):
                run = record.run
                assert (run.run_id, run.display_name, run.project) == (name, "runs/with", "a-project")
                config = {each.key: json.loads(each.value_json) for each in run.config.update}
                assert config["train"]["cutmix_alpha"] == 1.0 and config["model"]["num_classes"] == 2
            if record.HasField("metric"):
                metrics.append((record.metric.glob_name, record.metric.step_metric))
            if record.HasField("history"):
                items = record.history.item
                history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
            if record.HasField("exit"):
                exits.append(record.exit.exit_code)
    sent = [(e["step"], e["train/loss"]) for e in history if "train/loss" in e]
    expected = points_of(shown.died, "train", "loss") + points_of(shown.events, "train", "loss")[2:]
    assert sent == expected and [step for step, _ in sent] == [3, 6, 9, 9, 12]
    assert [(e["step"], e["eval/accuracy"]) for e in history if "eval/accuracy" in e] == points_of(
        shown.events, "eval", "accuracy"
    )
    pictures = [(key, e["step"]) for e in history for key in e if key.endswith("/path")]
    assert pictures == [
        ("train/samples/path", 0), ("eval/answers/path", 6), ("train/samples/path", 6), ("eval/answers/path", 12)
    ]  # fmt: skip
    assert len(list(shown.run.glob("wandb/offline-run-*/files/media/images/*/*.png"))) == 4
    assert metrics == [("*", "step")] * 2 and exits == [1, 0]
    saved = {path.name for path in shown.run.glob("wandb/offline-run-*/files/*")}
    assert saved == {"media", "requirements.txt"}  # no code, no console


def test_mlflow_has_numbers_pictures_and_configuration_and_resumes_in_the_same_run(shown):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{shown.place}/store.db")
    experiment = client.get_experiment_by_name("an experiment")
    (run,) = client.search_runs([experiment.experiment_id])
    name = run.info.run_id
    assert json.loads((shown.run / "trackers.json").read_text())["mlflow"] == name
    assert (run.info.run_name, run.info.status) == ("runs/with", "FINISHED")
    assert run.data.params["train.cutmix_alpha"] == "1.0" and run.data.params["model.num_classes"] == "2"
    assert len(run.data.params) > 60 and run.data.params["timeout_seconds"] == "600.0"  # when it began
    history = [(m.step, m.value) for m in client.get_metric_history(name, "train/loss")]
    assert history == points_of(shown.died, "train", "loss") + points_of(shown.events, "train", "loss")[2:]
    first = client.get_metric_history(name, "eval/accuracy")[0]
    assert first.timestamp == int(1000 * shown.events[2]["time"])
    assert Path(client.download_artifacts(name, "config.yaml")).read_text() == (shown.run / "config.yaml").read_text()
    pictures = sorted(file.path for file in client.list_artifacts(name, "images") if file.path.endswith(".png"))
    assert [re.match(r"images/(.*?)\+timestamp", path)[1] for path in pictures] == [
        "eval~answers+step+12", "eval~answers+step+6", "train~samples+step+0", "train~samples+step+6"
    ]  # fmt: skip
    assert Image.open(client.download_artifacts(name, pictures[2])).size == (tiny_task.WIDTH, 16)


@pytest.mark.slow
def test_a_tracker_that_comes_later_gets_what_it_missed(shown, monkeypatch):
    """Into MLflow's default experiment, where no other is named."""
    import mlflow

    uri = f"sqlite:///{shown.place}/later.db"
    monkeypatch.chdir(shown.place)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    config = compose_config("train", TrainConfig, *TINY, "log.trackers=mlflow")
    (tracker,) = open_trackers(shown.place / "runs/without", config, "accuracy", 12, shown.events)
    tracker.close(Stopped("as asked"))
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs(["0"])
    assert run.info.status == "KILLED"
    history = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")]
    assert history == points_of(shown.events, "train", "loss")


def test_servers_that_cannot_be_reached_end_no_run(tiny_run, tmp_path, monkeypatch, capsys):
    for name, value in {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"BASE_URL": "http://127.0.0.1:9", "API_KEY": "0" * 40, "INIT_TIMEOUT": "2"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    train(tiny_run("train.epochs=1", "train.warmup_epochs=0", "log.trackers=[wandb,mlflow]"))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING: ")]
    assert [line[: line.index(":", 9)] for line in lines] == [
        "WARNING: wandb lacks what metrics.jsonl has",
        "WARNING: mlflow lacks what metrics.jsonl has",
    ]
    assert len(read_events(tmp_path / "run")) == 2 and not (tmp_path / "run/trackers.json").exists()


def test_no_step_waits_for_a_tracker_and_its_failure_is_said_once(monkeypatch, capsys):
    taken = []

    def fail(step, values, when):
        time.sleep(0.2)
        taken.append(step)
        raise OSError("gone")

    slow = SimpleNamespace(is_new=True, scalars=fail, close=lambda error: time.sleep(60))
    monkeypatch.setattr(trackers_module, "SECONDS_TO_STOP", 1)
    tracker = trackers_module._InBackground("mlflow", slow)
    started = time.monotonic()
    for step in range(3):
        tracker.scalars(step, {}, 0.0)
    assert time.monotonic() - started < 0.1
    tracker.close(KeyboardInterrupt())
    assert 0.9 < time.monotonic() - started < 3
    assert taken == [0, 1, 2]
    assert capsys.readouterr().err == "WARNING: mlflow lacks what metrics.jsonl has: OSError: gone\n"


@pytest.mark.process
def test_a_tracker_that_is_not_installed_is_one_line_before_any_data_is_read(small_run, tmp_path, monkeypatch):
    importlib.import_module("tensorboard")  # what is imported is there, wherever Python looks for others
    # W&B makes such a folder wherever it runs: to Python a package.
    (tmp_path / "elsewhere/wandb").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere")])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert importlib.util.find_spec("wandb") is not None
    extra = r"the extra \[wandb\] of resnest-imagenet: pip install '.*wandb.*'"  # of what is installed nothing is found
    line = rf"^log.trackers has wandb: it is not installed: add {extra}$"
    with pytest.raises(ConfigError, match=line):
        require_trackers(["tensorboard", "wandb"])
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match="log.trackers has mlflow: it is not installed"):
        train(small_run("log.trackers=[wandb,mlflow]", "data.root=/nowhere"))
    with pytest.raises(ConfigError, match=r"log.trackers=\[neptune\]: neptune should be 'tensorboard', 'wandb'"):
        small_run("log.trackers=[neptune]")


def test_a_run_that_is_set_aside_takes_its_names_along(tmp_path):
    """Otherwise the new run would continue in its W&B and MLflow runs."""
    for name in ("checkpoints", "wandb"):
        (tmp_path / name).mkdir()
    (tmp_path / "trackers.json").write_text("{}")
    aside = RunFolder(str(tmp_path), keep=2, is_main=True).set_aside()
    assert {path.name for path in aside.iterdir()} == {"checkpoints", "wandb", "trackers.json"}
