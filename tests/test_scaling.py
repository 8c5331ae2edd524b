"""The model of a step on many ranks: cases that are computed by hand, and the page that is made of it."""

import json
import sys
from pathlib import Path

import pytest

from conftest import compose_config
from resnest_imagenet.config import TrainConfig

ROOT = Path(__file__).parents[1]
MB = 2**20


@pytest.fixture(scope="module")
def scaling():
    """The tools' modules, by name."""
    sys.path.insert(0, str(ROOT / "tools/benchmarks"))
    import scaling_model
    import scaling_page
    import scaling_published

    yield {"model": scaling_model, "page": scaling_page, "published": scaling_published}
    sys.path.remove(str(ROOT / "tools/benchmarks"))
    for name in ("scaling_model", "scaling_page", "scaling_published"):
        del sys.modules[name]


def make_cluster(model):
    """Nodes of 4 ranks: 1 ms and 1 GB/s inside, 3 ms and 0.5 GB/s between."""
    return model.Cluster(4, model.Link(1e-3, 1e9), model.Link(3e-3, 0.5e9))


def test_an_all_reduce_takes_latency_and_volume(scaling):
    cluster = make_cluster(scaling["model"])
    assert cluster.all_reduce(1e8, 1) == 0
    # 2 x 3/4 x 100 MB at 1 GB/s
    assert cluster.all_reduce(1e8, 4) == pytest.approx(0.001 + 0.150)
    # 2 x 1/2 x 100 MB: two ranks of a node
    assert cluster.all_reduce(1e8, 2) == pytest.approx(0.001 + 0.100)
    # 4 nodes: 2 doublings of 3 ms; 2 x 15/16 x 100 MB at 0.5 GB/s
    assert cluster.all_reduce(1e8, 16) == pytest.approx(0.001 + 0.006 + 0.375)


def test_buckets_are_filled_from_the_last_gradient_on(scaling):
    model = scaling["model"]
    # The last stage's 40 MB are ready in the first quarter of the backward pass, the first one's 10 MB in the rest.
    stages = [model.Stage([4 * MB, 6 * MB], 3.0), model.Stage([10 * MB, 20 * MB, 8 * MB, MB // 2, MB // 2], 1.0)]
    assert model.fill_buckets(stages) == [
        model.Bucket(1 * MB, 0.25 * 1 / 39),  # two small ones
        model.Bucket(28 * MB, 0.25 * 29 / 39),  # 8 MB do not reach 25
        model.Bucket(20 * MB, 1.0),
    ]
    assert model.fill_buckets([model.Stage([], 1.0), model.Stage([100], 1.0)]) == [model.Bucket(100, 0.5)]


def test_the_buckets_are_those_of_torch(scaling):
    import torch

    from resnest_imagenet import build_model

    recipes = json.loads((ROOT / "docs/scaling.json").read_text())["recipes"]
    ours = next(recipe for recipe in recipes if recipe["network"] == "resnest50")["buckets"]
    with torch.device("meta"):
        gradients = [torch.empty(p.shape) for p in reversed(list(build_model("resnest50").parameters()))]
    capacities = [torch.distributed._DEFAULT_FIRST_BUCKET_BYTES, 25 * MB]
    theirs, _ = torch.distributed._compute_bucket_assignment_by_size(gradients, capacities)
    sizes = [sum(gradients[index].nbytes for index in bucket) for bucket in theirs]
    assert [bucket["size"] for bucket in ours] == sizes
    assert ours[-1]["ready"] == 1 and [b["ready"] for b in ours] == sorted(b["ready"] for b in ours)


def test_only_what_outlasts_the_backward_pass_is_waited_for(scaling):
    model = scaling["model"]
    buckets = [model.Bucket(10, 0.1), model.Bucket(20, 0.5), model.Bucket(5, 1.0)]
    # A second for each 100 bytes, in 1 s of backward pass: .1 to .2, .5 to .7, 1.0 to 1.05
    assert model.find_exposed(buckets, 1.0, lambda size: size / 100) == pytest.approx(0.05)
    # A second for each 10 bytes: .1 to 1.1, to 3.1, to 3.6
    assert model.find_exposed(buckets, 1.0, lambda size: size / 10) == pytest.approx(2.6)
    assert model.find_exposed(buckets[:1], 1.0, lambda size: size / 100) == 0
    # The cores do all of it: .1 + .2 + .05. Half of it: the first two stand in the way for .15, the last adds .05.
    assert model.find_exposed(buckets, 1.0, lambda size: size / 100, share=1) == pytest.approx(0.35)
    assert model.find_exposed(buckets, 1.0, lambda size: size / 100, share=0.5) == pytest.approx(0.20)
    # A slow network: what the cores do hides in what they wait for.
    assert model.find_exposed(buckets, 1.0, lambda size: size / 10, share=0.1) == pytest.approx(2.6)


def test_a_step_ends_at_its_longest_part(scaling):
    model = scaling["model"]
    cluster, buckets = make_cluster(model), [model.Bucket(100_000, 1.0)]  # ready at the end: 1 ms + .15 ms
    all_reduce = 0.001 + 1.5 * 1e5 / 1e9

    def predict(**changes):
        work = model.Work(**{"forward": 0.1, "backward": 0.2, "optimiser": 0.03, "load": 0.05, **changes})
        return model.predict_step(work, buckets, cluster, 4)

    step = predict()
    assert step.seconds == pytest.approx(0.33 + all_reduce) and step.bound == "compute"
    step = predict(passes=3)  # gradients are sent once
    assert step.seconds == pytest.approx(0.93 + all_reduce) and step.load == pytest.approx(0.15)
    step = predict(load=0.7)
    assert step.seconds == 0.7 and step.bound == "loader"
    step = predict(forward=1e-4, backward=1e-4, optimiser=0, load=0)
    assert step.seconds == pytest.approx(2e-4 + all_reduce) and step.bound == "network"
    shared = model.predict_step(model.Work(0.1, 0.2, 0.03, 0.05), buckets, cluster, 4, cpu_share=1.0)
    assert shared.seconds == pytest.approx(0.38 + all_reduce)


def test_the_needed_bandwidth_is_that_of_its_wait(scaling):
    model = scaling["model"]
    # One bucket, ready at the end, so all of it is waited for: 2 x 7/8 x 1e5 bytes in 5 % of 0.4 s, less 1 and 3 ms.
    work, buckets = model.Work(0.1, 0.3, 0, 0), [model.Bucket(100_000, 1.0)]
    needed = model.find_needed_bandwidth(work, buckets, make_cluster(model), 8)
    assert needed == pytest.approx(1.75e5 / (0.05 * 0.4 - 0.004), rel=0.01)
    assert model.find_needed_bandwidth(model.Work(0.01, 0.01, 0, 0), buckets, make_cluster(model), 8) == float("inf")


def test_a_batch_is_dealt_evenly_or_not_at_all(scaling):
    split = scaling["model"].split_batch
    assert split(8192, 8, 128) == (128, 8)
    assert split(8192, 64, 128) == (128, 1)
    assert split(2048, 512, 32) == (4, 1)
    assert split(2048, 8, 100) == (64, 4)  # 256 images in 4 passes: 3 would not be even
    assert split(16, 64, 2) == (0, 0)


def test_a_plan_has_the_cores_and_hours_of_its_step(scaling):
    page, published = scaling["page"], scaling["published"]
    gpu = published.GPUS[0]
    recipe = {"network": "resnet50", "crop": 224, "global_batch": 256, "batch_size": 32, "epochs": 90}
    plan = page.plan_recipe({**recipe, "buckets": [{"size": 1, "ready": 1.0}]}, gpu, 8, rate=1e6)
    seconds = 32 / 1200  # and the all-reduce of a byte
    assert plan.step.compute == pytest.approx(seconds) and plan.ends == "compute"
    assert plan.step.seconds == pytest.approx(seconds + 12.5e-6)
    assert plan.hours == pytest.approx(1_281_167 // 256 * 90 * plan.step.seconds / 3600)
    assert plan.cores == pytest.approx(256 / plan.step.seconds / 1e6)
    slow = page.plan_recipe({**recipe, "buckets": [{"size": 1, "ready": 1.0}]}, gpu, 8, rate=10)
    assert slow.ends == "loader" and slow.per_node == pytest.approx(400)  # 40 cores of 10 images/s
    assert page.plan_recipe({**recipe, "buckets": []}, gpu, 512, rate=10).step is None


def test_every_source_is_cited_once_and_every_speed_scales(scaling):
    published = scaling["published"]
    cited = {name for gpu in published.GPUS for name in gpu.sources}
    assert cited | {"timm", "detectron2", "mmseg", "imagenet", "coco", "ade20k"} == set(published.SOURCES)
    # ResNeSt-269 of timm, at 416 pixels, has (416 / 320)^2 times as many images/s at 320.
    expected = 1200 * 35.75 / 1218.01 * 1.69
    assert published.scale_speed(published.GPUS[0], "resnest269", 320) == pytest.approx(expected)


def test_the_measured_steps_are_predicted_within_15_percent(scaling):
    result = json.loads((ROOT / "docs/scaling.json").read_text())
    assert len(result["trials"]) >= 3
    ratios = [float(row.split("|")[-2].split()[0]) for row in scaling["page"].compare_trials(result)[2:]]
    assert len(ratios) == len(result["trials"]) and ratios == pytest.approx([1] * len(ratios), abs=0.15)


def test_the_page_is_that_of_the_figures_and_of_the_recipes(scaling):
    result = json.loads((ROOT / "docs/scaling.json").read_text())
    assert scaling["page"].write_page(result) == (ROOT / "docs/scaling.md").read_text()
    recipe = next(recipe for recipe in result["recipes"] if recipe["network"] == "resnest269")
    train = compose_config("train", TrainConfig, "+experiment=resnest269", "data.root=x").train
    for key in ("recipe", "epochs", "global_batch", "batch_size", "crop"):
        assert recipe[key] == getattr(train, key)
