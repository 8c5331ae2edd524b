"""Which images can be used: the data check and both loaders give the same answer, and no image ends the process."""

import io
import pickle
import random
import struct
import subprocess
import sys
import zlib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from resnest_imagenet.data.decoding import (
    MAX_SIDE,
    BadImage,
    Fault,
    decode,
    decode_by_pillow,
    decode_upright,
    find_fault,
    is_ordinary,
)

MUTATIONS = 500
# It smooths what a damaged progressive JPEG lacks in another way (4 of 8,000 mutations).
HAS_OLD_LIBJPEG = tuple(map(int, version("torchvision").split(".")[:2])) < (0, 28)
RNG = np.random.default_rng(0)
COARSE = Image.fromarray(RNG.integers(0, 256, (6, 6, 3), dtype=np.uint8))
RGB = Image.fromarray(
    np.clip(np.array(COARSE.resize((48, 36)), int) + RNG.integers(-12, 13, (36, 48, 3)), 0, 255).astype(np.uint8)
)
DEEP = Image.fromarray(RNG.integers(0, 2**16, (36, 48), dtype=np.uint16))


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_alpha(image):
    image = image.copy()
    image.putalpha(image.convert("L"))
    return image


SOUND = {
    "JPEG": encode(RGB, "JPEG"),
    "JPEG with restarts": encode(RGB, "JPEG", subsampling=0, restart_marker_blocks=3),
    "progressive JPEG": encode(RGB, "JPEG", progressive=True),
    "grey JPEG": encode(RGB.convert("L"), "JPEG"),
    "CMYK JPEG": encode(RGB.convert("CMYK"), "JPEG"),
    "PNG": encode(RGB, "PNG"),
    "palette PNG": encode(RGB.quantize(30), "PNG"),
    "16-bit PNG": encode(DEEP, "PNG"),
    "WebP": encode(RGB, "WEBP"),
    "lossless WebP with transparency": encode(with_alpha(RGB), "WEBP", lossless=True),
    "BMP": encode(RGB, "BMP"),
    "TIFF": encode(RGB, "TIFF", compression="tiff_lzw"),
}


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(*chunks, width=8, height=8, colour=2, interlaced=0):
    header = struct.pack(">2I5B", width, height, 8, colour, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def insert(encoded, place, extra):
    return encoded[:place] + extra + encoded[place:]


def write_rle8_bmp():
    """A run of 5 pixels in a row of 8, of which DALI makes another picture, and a whole row."""
    palette = bytes((0, 0, 0, 0, 0, 0, 255, 0))
    data = b"\5\1\0\0\x08\1\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, 8, 2, 1, 8, 1, len(data), 0, 0, 2, 0)
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + header + palette + data


TURNED = Image.Exif()
TURNED[0x0112] = 6
JPEG, PNG = SOUND["JPEG"], SOUND["PNG"]
QUANTISATION, SCAN = JPEG.index(b"\xff\xdb"), JPEG.index(b"\xff\xda")
FRAME, PICTURE = JPEG.index(b"\xff\xc0"), PNG.index(b"IDAT")
# Files on which the decoders differ, or one of which some of them died: decoded by Pillow for all, or faults for all.
ODD = {
    "a byte between the segments of a JPEG": insert(JPEG, QUANTISATION, b"\0"),
    "a JPEG copied as text": JPEG.replace(b"\n", b"\r\n"),
    "a JPEG with bytes after its end": JPEG + bytes(100),
    "a JPEG with an end in its middle": insert(JPEG, (SCAN + len(JPEG)) // 2, b"\xff\xd9"),
    "a JPEG with a short segment of Adobe's": insert(JPEG, QUANTISATION, b"\xff\xee\0\7Adobe"),
    "an animated PNG": encode(RGB, "PNG", save_all=True, append_images=[DEEP.convert("RGB")], default_image=True),
    "a turned TIFF": encode(RGB, "TIFF", exif=TURNED),
    "a turned TIFF as faxes are": encode(RGB.convert("1"), "TIFF", compression="group4", exif=TURNED),
    "a BMP of runs": write_rle8_bmp(),
    "a line of pixels": encode(Image.new("L", (1, 20000), 7), "PNG"),
    "one pixel": encode(Image.new("RGB", (1, 1), "red"), "JPEG"),
    "an interlaced PNG": write_png(chunk(b"IDAT", zlib.compress(bytes(1000))), interlaced=1),
    "a PNG with a comment that Pillow refuses": insert(PNG, PICTURE - 4, chunk(b"zTXt", b"x")),
    "a PNG with a transparent colour": encode(RGB, "PNG", transparency=(0, 0, 0)),
    "a black PNG": encode(Image.new("RGB", (8, 8)), "PNG"),
}
NOT_READABLE = "not a readable image ("
BAD = {
    "empty": (b"", "empty", NOT_READABLE + "it is empty"),
    "a web page": (b"<html>not found</html>", "not an image", NOT_READABLE + "of no known format"),
    "a GIF": (encode(RGB, "GIF"), "wrong format", "a GIF image"),
    "a JPEG 2000": (encode(RGB, "JPEG2000"), "wrong format", "a JPEG 2000 image"),
    "a PPM": (encode(RGB, "PPM"), "wrong format", "a PPM image"),
    "a DDS": (b"DDS " + bytes(200), "wrong format", "a DDS image"),
    "an AVIF": (b"\0\0\0\x1cftypavif" + bytes(50), "wrong format", "an AVIF image"),
    "a TIFF of floats": (encode(Image.new("F", (8, 8)), "TIFF"), "wrong mode", "a TIFF image of mode F"),
    "a JPEG cut before its data": (JPEG[: FRAME + 4], "damaged", NOT_READABLE),
    "a JPEG cut in its data": (JPEG[: (SCAN + len(JPEG)) // 2], "damaged", NOT_READABLE),
    "a JPEG cut, with another's end": (JPEG[:FRAME] + b"\xff\xd9", "not an image", NOT_READABLE),
    "a marker in a JPEG's data": (insert(JPEG, (SCAN + len(JPEG)) // 2, b"\xff\xc4\0\5"), "damaged", NOT_READABLE),
    "a JPEG without its tables": (JPEG[:QUANTISATION] + JPEG[FRAME:], "damaged", NOT_READABLE),
    "a PNG without its end": (PNG[:-12], "damaged", "a PNG image without its end"),
    "a PNG with a wrong checksum": (
        PNG[: PICTURE + 50] + bytes([PNG[PICTURE + 50] ^ 1]) + PNG[PICTURE + 51 :],
        "damaged",
        "a PNG image with a wrong checksum",
    ),
    "a PNG with a wrong checksum at its end": (PNG[:-1] + b"x", "damaged", "a PNG image with a wrong checksum"),
    "a PNG with half of its rows": (
        write_png(chunk(b"IDAT", zlib.compress(bytes((0, *[200] * 24) * 4)))),
        "damaged",
        "a PNG image without some of its rows",
    ),
    "an interlaced PNG with half of its rows": (
        write_png(chunk(b"IDAT", zlib.compress(bytes(157))), interlaced=1),  # of 207
        "damaged",
        "a PNG image without some of its rows",
    ),
    "a BMP with too long a run": (write_rle8_bmp()[:-8] + b"\xff\1\xff\1\0\1", "damaged", NOT_READABLE),
    "a WebP cut in half": (SOUND["WebP"][: len(SOUND["WebP"]) // 2], "damaged", NOT_READABLE),
    "a long line": (encode(Image.new("1", (MAX_SIDE + 1, 1)), "PNG"), "too large", "a PNG image of 65536 x 1 pixels"),
}


def mutate(encoded, rng):
    """Flip bits, cut, insert, delete, clear or swap bytes, or plant a JPEG's marker."""
    changed, place = bytearray(encoded), rng.randrange(len(encoded))
    length = rng.randrange(1, 40)
    match rng.randrange(8):
        case 0:
            for _ in range(rng.choice((1, 1, 3, 10))):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        case 1:
            del changed[max(1, place) :]
        case 2:
            changed[place:place] = rng.randbytes(rng.randrange(1, 6))
        case 3:
            del changed[place : place + rng.randrange(1, 9)]
        case 4:
            changed[place : place + length] = bytes(len(changed[place : place + length]))
        case 5:
            other = rng.randrange(len(changed) - length)
            place = rng.randrange(len(changed) - length)
            one, two = slice(place, place + length), slice(other, other + length)
            changed[one], changed[two] = changed[two], changed[one]
        case 6:
            changed[rng.randrange(min(200, len(changed)))] = rng.randrange(256)
        case 7:
            changed[place : place + 2] = bytes(
                (0xFF, rng.choice((0xC0, 0xC2, 0xC4, 0xD0, 0xD9, 0xDA, 0xDB, 0xE1, 0xFE)))
            )
    if encoded.startswith(b"\x89PNG") and rng.random() < 0.6:
        changed = fix_checksums(changed)
    return bytes(changed)


def fix_checksums(png):
    """Let damage of a PNG pass its checksums, and damage of its rows that of zlib too."""
    place = 8
    while place + 12 <= len(png):
        end = place + 8 + int.from_bytes(png[place : place + 4], "big")
        png[end : end + 4] = struct.pack(">I", zlib.crc32(png[place + 4 : end])) if end + 4 <= len(png) else b""
        place = end + 4
    return png


@pytest.fixture(scope="module")
def mutated():
    rng = random.Random(0)
    return [mutate(rng.choice(list(SOUND.values())), rng) for _ in range(MUTATIONS)]


def write_batches(root, batch, bad):
    """Write images for 3 batches, with some bad ones; return the root."""
    (root / "train/x").mkdir(parents=True)
    for index in range(3 * batch):
        (root / f"train/x/{index:03d}.jpg").write_bytes(bad.get(index, JPEG))
    return str(root)


@pytest.fixture(scope="module")
def passes(tmp_path_factory):
    """Return what is loaded, and which images of it are bad."""
    batch = 64
    kinds = [BAD[name][0] for name in ("a web page", "a GIF", "a JPEG cut before its data")]
    found = []
    for number, kind in enumerate(kinds):
        for indices in ([batch], [2 * batch - 1], [1, 70, 90, 3 * batch - 1]):
            root = write_batches(tmp_path_factory.mktemp(f"set{number}"), batch, dict.fromkeys(indices, kind))
            found.append(((root, "evaluation", batch, 0), indices))
            found.append(((root, "training", batch, 9), indices))
    return found


@pytest.fixture(scope="module")
def of_dali(mutated, passes, tmp_path_factory):
    """Return what a process with DALI says of single images and of batches; it must not die."""
    images = [*SOUND.values(), *ODD.values(), *(encoded for encoded, _, _ in BAD.values()), *mutated]
    asked, answer = (tmp_path_factory.mktemp("dali") / name for name in ("asked", "answer"))
    asked.write_bytes(pickle.dumps((images, [request for request, _ in passes])))
    script = Path(__file__).with_name("dali_process.py")
    process = subprocess.run([sys.executable, script, asked, answer], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    decoded, loaded = pickle.loads(answer.read_bytes())
    return dict(zip(images, decoded, strict=True)), loaded


def judge(encoded, of_dali):
    """Return the fault of an image, after both loaders were found to agree with it."""
    fault, dali = find_fault(encoded), of_dali[0][encoded]
    try:
        ours = decode(encoded).permute(1, 2, 0).numpy()
    except BadImage as error:
        assert error.fault == fault
        ours = None
    if fault:
        assert ours is None
        assert isinstance(dali, str)
    else:
        expected = decode_by_pillow(encoded)
        if not (HAS_OLD_LIBJPEG and b"\xff\xc2" in encoded):
            np.testing.assert_array_equal(ours, expected)
        np.testing.assert_array_equal(dali, expected)
    return fault


@pytest.mark.process
@pytest.mark.parametrize("kind", [*SOUND, *ODD])
def test_sound_and_odd_files_are_one_picture_for_all(kind, of_dali):
    assert judge({**SOUND, **ODD}[kind], of_dali) is None


@pytest.mark.process
@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_faults_for_all(kind, of_dali):
    encoded, kind_of_fault, detail = BAD[kind]
    fault = judge(encoded, of_dali)
    assert fault.kind == kind_of_fault
    assert fault.detail.startswith(detail)


def test_ordinary_are_plain_jpegs_and_pngs():
    ordinary = {name for name, encoded in {**SOUND, **ODD}.items() if is_ordinary(encoded)}
    assert ordinary == {
        "JPEG",
        "JPEG with restarts",
        "progressive JPEG",
        "grey JPEG",
        "PNG",
        "a PNG with a comment that Pillow refuses",
        "a black PNG",
        "a JPEG with bytes after its end",
        "a JPEG with an end in its middle",
        "a JPEG with a short segment of Adobe's",
        "a line of pixels",
        "one pixel",
    }


@pytest.mark.process
def test_mutated_files_are_the_same_for_all(mutated, of_dali):
    """No exception but a fault, no signal, and what the check passes is the same picture for both loaders."""
    faults = [judge(encoded, of_dali) for encoded in mutated]
    num_sound = faults.count(None)
    assert MUTATIONS * 0.3 < num_sound < MUTATIONS * 0.7
    damaged_but_ordinary = [is_ordinary(encoded) for encoded, fault in zip(mutated, faults, strict=True) if fault]
    assert any(damaged_but_ordinary)  # what only DALI's decoder can refuse


@pytest.mark.process
def test_one_bad_file_in_a_large_batch_is_named_or_replaced(passes, of_dali):
    for ((root, kind, _, max_errors), bad), answer in zip(passes, of_dali[1], strict=True):
        if max_errors:
            assert answer == bad, kind
        else:
            assert answer.startswith(f"{root}/train/x/{bad[0]:03d}.jpg: ")


def test_a_bad_image_keeps_its_fault_between_processes():
    error = pickle.loads(pickle.dumps(BadImage(Fault("damaged", "a line"))))
    assert (error.fault, str(error)) == (Fault("damaged", "a line"), "a line")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_upright_images_are_those_of_pillows_own_turn(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 11, 3), np.uint8)
    Image.fromarray(pixels).save(file, form, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    assert np.array_equal(decode_upright(file.getvalue()), expected)


def test_a_damaged_exif_turns_nothing():
    file = io.BytesIO()
    Image.new("RGB", (4, 3)).save(file, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode_upright(file.getvalue()).size == (4, 3)
    Image.new("RGB", (4, 3)).save(file := io.BytesIO(), "JPEG", comment=b"Exif")
    assert decode_upright(file.getvalue()).size == (4, 3)
