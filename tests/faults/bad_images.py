"""Images that cannot be used, met by a run."""

import itertools
import os
import re
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from faults.harness import LOADERS, Claims, Place, Trainer, encode
from resnest_imagenet.data.plan import BatchPlan

# What such an image is like nobody can say: a run must not replace it.
OF_STORAGE = ("a link to nothing", "a link to itself", "a file that cannot be read")
Bad = bytes | str | None  # what a file holds, what it is a link to; None: it is a folder


def name_bad_data(place: Place) -> dict[str, Any]:
    """Whatever is wrong with an image, the run ends with exit code 3 (not there or not readable: 6), and names it."""
    claims, kinds = Claims(), _list_bad_files()
    chosen = ["a JPEG cut in half", "a link to nothing"] if place.fast else list(kinds)
    in_val = [] if place.fast else ["empty", "a web page", "a JPEG cut in half", "a link to nothing"]
    planted = [("train", kind) for kind in chosen] + [("val", kind) for kind in in_val]
    data = _make_small_set(place, "alone")
    for part, kind in planted:
        with _plant(data / part, 1, kinds[kind]) as path:
            loaders = LOADERS[kind in OF_STORAGE :][:1] if place.fast else LOADERS
            trainers = [Trainer(place, place.new_run(), *_see_all_of(data), f"loader={each}") for each in loaders]
            for loader, trainer in zip(loaders, trainers, strict=True):
                code = 6 if kind in OF_STORAGE else 3
                _judge_naming(claims, f"{kind} in {part}, {loader}", trainer.wait(), trainer.output, path, code)
    seconds = _name_on_ranks(place, claims, {"train": kinds["a JPEG cut in half"], "val": kinds["empty"]})
    claims.require()
    return {
        "named_by_both_loaders": len(chosen),
        "in_val_too": len(in_val),
        "both_ranks_end_within_s": round(seconds, 1),
    }


def _see_all_of(data: Path) -> list[str]:
    """Return options for one epoch that sees every pixel: DALI does not decode what it crops away."""
    return [f"data.root={data}", "train.epochs=1", "train.warmup_epochs=0", "train.min_crop_area=1"]


def _judge_naming(claims: Claims, what: str, codes: list[int], output: str, path: Path, code: int = 3) -> None:
    lines = output.strip().splitlines() or [""]
    claims.add(set(codes) == {code}, f"{what}: exit code {codes}, not {code}: {lines[-1]}")
    is_named = lines[-1].startswith("resnest-train: ") and f"{path}: " in lines[-1]
    claims.add(is_named and output.count(str(path)) == 1, f"{what}: not named once, in the last line: {lines[-1]}")
    claims.add("Traceback" not in output, f"{what}: a traceback after {lines[0]!r}: {lines[-1]}")


def _name_on_ranks(place: Place, claims: Claims, bad: dict[str, tuple[str, Bad]]) -> float:
    """Let rank 1 of 2 meet a bad image in each part, in two runs; return the seconds from a line to the last's end."""
    slowest = 0.0
    with ExitStack() as stack:
        running = []
        for loader, (part, (_, content)) in zip(LOADERS, bad.items(), strict=True):
            data = _make_small_set(place, f"two-{part}")
            _, of_rank_1 = BatchPlan(16, 8, 2, shuffle=part == "train", seed=0).batches(epoch=0)
            path = stack.enter_context(_plant(data / part, of_rank_1[3], (None, content)))
            trainer = Trainer(place, place.new_run(), *_see_all_of(data), f"loader={loader}", ranks=2)
            running.append((f"rank 1 of 2 in {part}, {loader}", trainer, path))
        for _, trainer, path in running:
            trainer.wait_for(re.escape(str(path)))
        named = time.monotonic()
        for what, trainer, path in running:
            codes = trainer.wait()
            slowest = time.monotonic() - named
            claims.add(slowest < 15, f"{what}: both end after {slowest:.1f} s, not within 15")
            _judge_naming(claims, what, codes, trainer.output, path)
    return slowest


def _make_small_set(place: Place, name: str) -> Path:
    """Link 16 training and 16 val images of two classes: each part is two batches, of which each rank has one."""
    data = place.folder / name
    for part, label in itertools.product(("train", "val"), ("ring", "square")):
        (data / part / label).mkdir(parents=True)
        for number, path in enumerate(sorted((place.data / "train" / label).iterdir())[:8]):
            os.link(path, data / part / label / f"{number}.JPEG")
    return data


@contextmanager
def _plant(part: Path, number: int, bad: tuple[str | None, Bad]) -> Iterator[Path]:
    """Put a bad file in the place of an image, under its name where it has none of its own."""
    good, aside = sorted(part.glob("*/*"))[number], part.parent / "aside"
    good.rename(aside)
    name, content = bad
    path = good.with_name(name or good.name)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.symlink_to(content)
    else:
        path.mkdir()
    try:
        yield path
    finally:
        path.rmdir() if content is None else path.unlink()
        aside.rename(good)


def _list_bad_files() -> dict[str, tuple[str, Bad]]:
    """Return what the listing of a folder takes for an image, and no run can use.

    It skips other suffixes, such as .gif, hidden files and images beside the classes.
    """
    jpeg, png = encode("JPEG", (200, 200)), encode("PNG")
    flipped = bytearray(png)
    flipped[100] ^= 255
    strips = bytearray(encode("TIFF", compression="tiff_lzw"))
    strips[8:200] = bytes(192)
    return {
        "empty": ("bad.JPEG", b""),
        "a web page": ("bad.JPEG", b"<html><body>404 Not Found</body></html>"),
        "a pointer of git-lfs": ("bad.JPEG", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "zeros": ("bad.jpg", bytes(5000)),
        "a JPEG cut in half": ("bad.JPEG", jpeg[: len(jpeg) // 2]),
        "a JPEG without its last bytes": ("bad.jpeg", jpeg[:-300]),
        "a PNG with a wrong checksum": ("bad.png", bytes(flipped)),
        "a PNG without its end": ("bad.PNG", png[:-12]),
        "a WebP cut in half": ("bad.jpg", encode("WEBP", (200, 200))[:5000]),
        "a damaged TIFF": ("bad.JPEG", bytes(strips)),
        "a TIFF of floats": ("bad.JPEG", encode("TIFF", mode="F")),
        "a GIF": ("bad.JPEG", encode("GIF")),
        "a PNG that promises 400 million pixels": ("bad.png", _promise(20000, 20000)),
        "a PNG that promises 89.5 million pixels": ("bad.png", _promise(9460, 9459)),
        "a link to nothing": ("bad.JPEG", "nowhere.JPEG"),
        "a link to itself": ("bad.JPEG", "bad.JPEG"),
        "a device": ("bad.JPEG", "/dev/null"),
        "a file that cannot be read": ("bad.JPEG", "/proc/self/mem"),  # not even by root
        "a folder": ("bad.JPEG", None),
    }


def _promise(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes with the header of a large image."""
    png = encode("PNG", (8, 8), "1")
    header = b"IHDR" + struct.pack(">2I", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
