"""Detection under the same run: killed in the middle of an epoch, and images and annotations that cannot be used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.harness import Claims, Command, Place, newest, require, require_equal_runs
from resnest_imagenet.checkpoint import load_checkpoint
from resnest_imagenet.data.demo_objects import write_demo_objects

# A cascade with masks, an average and precise norms: all that a run of detection keeps.
SMALL = ("+experiment=demo_detection", "device=cpu", "train.epochs=2", "train.batch_size=2", "train.global_batch=4")
SMALL += ("train.short_sides=[48,64]", "train.longest=96", "protocol.short_side=64", "protocol.longest=96")
SMALL += ("train.channels=16", "train.box_width=16", "train.box_convs=1", "train.mask_convs=1", "train.samples=16")
SMALL += ("train.cascade=true", "train.ema_decay=0.9", "train.precise_batches=3", "protocol.detections=20")
SMALL += ("loader.workers=1", "log.every_steps=1", "log.trackers=[]", "checkpoint.every_steps=1", "timeout_seconds=60")
SMALL += ("log.pictures=false",)
FILES = ("ap.csv", "precision_recall.csv", "errors.csv", "images.csv", "detections.json")


def resume_objects(place: Place) -> dict[str, Any]:
    """Detection killed in the middle of an epoch ends as without; bad images and annotations get one line."""
    objects = place.folder / "objects"
    write_demo_objects(objects, seed=0, train_images=13, val_images=3)
    options = (*SMALL, f"data.root={objects}")
    settings = ((1, "fp32"), (2, "fp32"), (1, "bf16"))
    for ranks, precision in settings:
        _resume_killed(place, (*options, f"train.precision={precision}"), ranks)
    claims = Claims()
    _spoil_image(place, options, objects, claims)
    _spoil_annotations(place, objects, claims)
    claims.require()
    return {"settings": len(settings), "claims": claims.number}


def _resume_killed(place: Place, options: tuple[str, ...], ranks: int) -> None:
    whole, killed = (place.new_run() for _ in range(2))
    complete = Command(place, "train", *options, f"run_dir={whole}", ranks=ranks)
    require(complete.wait(300) == [0] * ranks, f"{whole} ends well\n{complete.output}")
    # A step is two batches, and an epoch three steps: the last batch of the fifth step.
    trainer = Command(place, "train", *options, f"run_dir={killed}", ranks=ranks, faults=[("killed", [1, 3])])
    require(-9 in trainer.wait(300), f"{killed} is killed\n{trainer.output}")
    step = load_checkpoint(newest(killed))["step"]
    require(step == 4, f"the last checkpoint is of step 4, not of step {step}")
    again = Command(place, "train", *options, f"run_dir={killed}", ranks=ranks)
    require(again.wait(300) == [0] * ranks, f"{killed} ends well\n{again.output}")
    require_equal_runs(whole, killed)
    for name in FILES:
        require((whole / name).read_bytes() == (killed / name).read_bytes(), f"{name} differs")


def _spoil_image(place: Place, options: tuple[str, ...], objects: Path, claims: Claims) -> None:
    """An image that is cut off ends the run with a line, or another stands in for it."""
    bad = sorted((objects / "train2017").glob("*"))[3]
    content = bad.read_bytes()
    bad.write_bytes(content[:100])
    for on_error, code, words in (("raise", 3, ""), ("substitute", 0, "replaced by")):
        run = f"run_dir={place.new_run()}"
        trainer = Command(place, "train", *options, "train.precise_batches=0", run, f"data.on_error={on_error}")
        claims.add(trainer.wait(300) == [code], f"{on_error}: exit code {code}\n{trainer.output}")
        lines = [line for line in trainer.lines if bad.name in line and words in line]
        is_named = len(lines) == 1 and "Traceback" not in trainer.output
        claims.add(is_named, f"{bad.name} is named once\n{trainer.output}")
    bad.write_bytes(content)


def _change(**values: Any) -> Callable[[dict[str, Any]], str]:
    """Return what gives the first annotation of a file these values, None to drop one."""

    def change(content: dict[str, Any]) -> str:
        first = {**content["annotations"][0], **values}
        content["annotations"][0] = {name: value for name, value in first.items() if value is not None}
        return json.dumps(content)

    return change


# What happens to the file of the training images, with words of the line that it gets.
SPOILED: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "truncated": (lambda content: json.dumps(content)[:-200], "ends too early: is it cut off?"),
    "no_json": (lambda content: "images: []", "not JSON"),
    "empty": (lambda content: "", "is empty"),
    "results": (lambda content: json.dumps(content["annotations"]), "not in COCO's layout"),
    "no_images": (lambda content: json.dumps({**content, "images": 3}), "no list of images"),
    "file_name": (lambda content: json.dumps({**content, "images": [{"id": 1, "file_name": 7}]}), "file_name=7"),
    "category_missing": (lambda content: json.dumps({**content, "categories": content["categories"][1:]}), "category"),
    "no_category": (_change(category_id=None), "no category_id"),
    "id_as_text": (_change(image_id="one"), "image_id='one' is not a whole number"),
    "box_of_three": (_change(bbox=[1, 2, 3]), "bbox=[1, 2, 3] is not four numbers"),
    "box_of_nan": (_change(bbox=[0, 0, float("nan"), 4]), "is not in pixels"),
    "box_of_text": (_change(bbox="0 0 4 4"), "is not four numbers"),
    "no_mask": (_change(segmentation=None), "no segmentation"),
    "mask_of_text": (_change(segmentation="disk"), "annotation 1"),
    "mask_of_other_size": (_change(segmentation={"size": [3, 3], "counts": [9]}), "its mask is 3 x 3"),
}


def _spoil_annotations(place: Place, objects: Path, claims: Claims) -> None:
    """Annotations that cannot be used end the run with a line about the file, before it begins."""
    good = json.loads((objects / "annotations/instances_train2017.json").read_text())
    for name, (spoil, words) in SPOILED.items():
        file = place.folder / f"{name}.json"
        file.write_text(spoil(json.loads(json.dumps(good))))
        run = place.new_run()
        arguments = (*SMALL, f"data.root={objects}", f"data.train_json={file}", f"run_dir={run}")
        trainer = Command(place, "train", *arguments)
        codes, lines = trainer.wait(300), [line for line in trainer.lines if file.name in line]
        claims.add(codes == [3], f"{name}: exit code 3, not {codes}\n{trainer.output}")
        is_named = len(lines) == 1 and words in lines[0] and "Traceback" not in trainer.output
        claims.add(is_named, f"{name}: one line with {words!r}\n{trainer.output}")
        claims.add(not list(run.glob("checkpoints/*.pt")), f"{name}: nothing is saved")
        shutil.rmtree(run, ignore_errors=True)
