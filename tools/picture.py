"""Draw docs/images/overview.png: what the commands show of the demos' networks, cut out and put side by side.

`make picture`, from runs/demo, runs/demo_segmentation and runs/demo_cascade; it needs Chromium for the report.
"""

import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import entry_points
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

OUT = Path(__file__).parents[1] / "docs/images/overview.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, TILE, GAP, CAPTION = 1200, 580, 20, 30  # pixels: of all, of a column, between and above tiles
FIGURES = ("checker/checker_0_00003", "ring/ring_0_00000")
SCENES = ("scene_0_00026", "scene_0_00052", "scene_0_00049")
OBJECTS = ("objects_0_00001", "objects_0_00010", "objects_0_00031", "objects_0_00002")


def run_command(*words: str) -> None:
    """Run a console command of the project in this process."""
    (script,) = entry_points(group="console_scripts", name=words[0])
    sys.argv = list(words)
    script.load()()


def run_commands(folder: Path) -> None:
    """Write the preview, the class maps, masks, boxes and the report's page into a folder."""
    run_command("resnest-data", "preview", "+experiment=demo", "data.root=data/demo", f"out={folder}/preview.png")
    figures = ",".join(f"data/demo/val/{name}.JPEG" for name in FIGURES)
    words = (f"images=[{figures}]", f"out={folder}/explained")
    run_command("resnest-explain", "ckpt=runs/demo/checkpoints/best.pt", *words)
    for run, place, names in (
        ("demo_segmentation", "data/demo-scenes/images/val", SCENES),
        ("demo_cascade", "data/demo-objects/val2017", OBJECTS),
    ):
        images = ",".join(str(next(Path(place).glob(f"{name}.*"))) for name in names)
        run_command(
            "resnest-predict", f"ckpt=runs/{run}/checkpoints/best.pt", f"images=[{images}]", f"out={folder}/{run}"
        )
    run_command("resnest-report", "runs/demo", f"out={folder}/report.html", "latency=false")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is here, and the report is a page")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1080,760")
    light = ("--blink-settings=preferredColorScheme=1", f"--screenshot={folder}/report.png")
    subprocess.run(
        [browser, *options, *light, (folder / "report.html").as_uri()], check=True, stderr=subprocess.DEVNULL
    )


def open_pictures(folder: Path) -> list[tuple[str, list[Image.Image]]]:
    """Return the tiles: a caption, and pictures that stand beside each other."""
    preview = Image.open(folder / "preview.png")
    maps = [Image.open(folder / f"explained/maps/{name}.JPEG.png").crop((0, 24, 596, 362)) for name in FIGURES]
    masks = [
        Image.open(path)
        for name in SCENES
        for path in (
            next(Path("data/demo-scenes/images/val").glob(f"{name}.*")),
            folder / f"demo_segmentation/{name}_colours.png",
        )
    ]
    report = Image.open(folder / "report.png")
    page = Image.new("RGB", (report.width, 560), "white")
    page.paste(report.crop((0, 20, report.width, 190)), (0, 0))
    page.paste(report.crop((0, 370, report.width, 760)), (0, 170))
    boxes = [Image.open(folder / f"demo_cascade/{name}.png") for name in OBJECTS]
    return [
        ("resnest-data preview: what training sees", [preview.crop((0, 0, preview.width, 296))]),
        ("resnest-report: what a run did", [page]),
        ("resnest-predict: objects with boxes and masks", boxes),
        ("resnest-explain: the evidence for a class", maps),
        ("resnest-predict: a class for each pixel", masks),
    ]


def make_tile(caption: str, pictures: list[Image.Image]) -> Image.Image:
    """Return pictures of equal height beside each other, `TILE` pixels wide, under a caption."""
    ratios = [picture.width / picture.height for picture in pictures]
    height = round((TILE - 8 * (len(pictures) - 1)) / sum(ratios))
    tile = Image.new("RGB", (TILE, height + CAPTION), "white")
    ImageDraw.Draw(tile).text((0, 4), caption, "#333333", ImageFont.load_default(17))
    left = 0
    for picture, ratio in zip(pictures, ratios, strict=True):
        size = (round(height * ratio), height)
        tile.paste(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS), (left, CAPTION))
        left += size[0] + 8
    return tile


def join_tiles(tiles: list[Image.Image]) -> Image.Image:
    """Return the tiles in two columns, each tile in the shorter one."""
    places, heights = [], [0, 0]
    for tile in tiles:
        column = heights.index(min(heights))
        places.append((column * (TILE + GAP) + GAP // 2, heights[column]))
        heights[column] += tile.height + GAP
    sheet = Image.new("RGB", (WIDTH, max(heights) - GAP), "white")
    for tile, place in zip(tiles, places, strict=True):
        sheet.paste(tile, place)
    return sheet


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run_commands(Path(folder))
        tiles = [make_tile(*tile) for tile in open_pictures(Path(folder))]
    OUT.parent.mkdir(exist_ok=True)
    join_tiles(tiles).quantize(255, dither=Image.Dither.NONE).save(
        OUT, optimize=True
    )  # a palette: a third of the bytes
    print(f"wrote {OUT}: {OUT.stat().st_size // 1000} kB")
