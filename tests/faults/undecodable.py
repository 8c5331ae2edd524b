"""Images that cannot be decoded, in batches so large that DALI has died of one."""

import itertools
import os
from pathlib import Path
from typing import Any

from faults.harness import Claims, Place, Trainer, encode
from resnest_imagenet.data.plan import BatchPlan

JPEG = encode("JPEG")
BAD = {
    "a web page": b"<html><body>404 Not Found</body></html>",
    "a GIF": encode("GIF"),
    "a JPEG cut in its header": JPEG[: JPEG.index(b"\xff\xc0") + 4],
    "a JPEG cut in its data": JPEG[:-200],
}
PLACES = {"first": (0,), "last": (-1,), "several": (1, 20, -2)}  # in the first batch


def survive_bad_images(place: Place) -> dict[str, Any]:
    """One bad file or several, in batches of 64 and 256 with DALI, are named or replaced: never a signal."""
    claims = Claims()
    batches, kinds, places = ((64,), ["a web page"], ["first"]) if place.fast else ((64, 256), list(BAD), list(PLACES))
    for batch, kind, where in itertools.product(batches, kinds, places):
        what = f"{kind}, {where} of {batch}"
        data, bad = _write_set(place, f"{batch}-{kind}-{where}".replace(" ", "-"), batch, BAD[kind], PLACES[where])
        options = [f"data.root={data}", f"train.batch_size={batch}", f"train.global_batch={batch}", "train.epochs=1"]
        options += ["train.warmup_epochs=0", "loader.workers=4", "loader=dali"]
        named = Trainer(place, place.new_run(), *options)
        replaced = Trainer(place, place.new_run(), *options, "data.on_error=substitute")
        claims.add(named.wait() == [3], f"{what}: exit code {named.wait()}, not 3: {named.output}")
        claims.add(any(str(path) in named.lines[-1] for path in bad), f"{what}: not named: {named.output}")
        claims.add(replaced.wait() == [0], f"{what}, substituted: exit code {replaced.wait()}: {replaced.output}")
        numbers = [replaced.output.count(f"{path}: ") for path in bad]
        claims.add(set(numbers) == {1}, f"{what}, substituted: reported {numbers} times: {replaced.output}")
    claims.require()
    return {"tries": claims.number // 2, "batches": list(batches), "signals": 0}


def _write_set(place: Place, name: str, batch: int, bad: bytes, places: tuple[int, ...]) -> tuple[Path, list[Path]]:
    """Link images for two batches of training and one of validation; return the set and what was made bad in it."""
    data = place.folder / name
    for part, number in (("train", 2 * batch), ("val", batch)):
        for label in ("ring", "square"):
            folder = data / part / label
            folder.mkdir(parents=True)
            images = sorted((place.data / "train" / label).iterdir())
            for index in range(number // 2):
                os.link(images[index % len(images)], folder / f"{index:03d}.JPEG")
    paths = sorted((data / "train").glob("*/*"))
    of_first_batch = next(BatchPlan(2 * batch, batch, 2, shuffle=True, seed=0).batches(epoch=0)).tolist()
    chosen = [paths[of_first_batch[each]] for each in places]
    for path in chosen:
        path.unlink()
        path.write_bytes(bad)
    return data, chosen
