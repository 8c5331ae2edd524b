"""A page on this machine: drop a picture, and see what a network finds in it and where."""

import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.request import getproxies

import numpy as np
from PIL import Image

from resnest_imagenet.data.folder import ImageFolder
from resnest_imagenet.errors import ConfigError, UserError, explain_runtime, name_extra, printable
from resnest_imagenet.evaluation.box_pictures import make_box_palette
from resnest_imagenet.evaluation.overlays import overlay_mask
from resnest_imagenet.inference.classifier import Classifier
from resnest_imagenet.inference.explain import Explanations, choose_layer
from resnest_imagenet.inference.images import list_images
from resnest_imagenet.inference.segment import SegmentedImages
from resnest_imagenet.inference.segmenter import Segmenter
from resnest_imagenet.models.split_attention import SplitAttention
from resnest_imagenet.reports.explain_pictures import draw_attention, draw_maps, encode_png
from resnest_imagenet.weights.detection import name_rcnn

if TYPE_CHECKING:
    from resnest_imagenet.inference.detector import Detector  # it imports torchvision

HOST = "127.0.0.1"  # other machines cannot open the page
LARGEST = "64mb"  # of a dropped file


@dataclass(frozen=True)
class Answer:
    """What a network finds in a picture.

    Attributes:
        shares: of the classes or objects, between 0 and 1, the largest first.
        pictures: in the order of the page's.
    """

    shares: Mapping[str, float]
    pictures: tuple[Image.Image, ...]


@dataclass(frozen=True)
class Page:
    """What a page has for a network.

    Attributes:
        network: its name.
        shares: what the shares of an answer are, such as "probability".
        pictures: titles of those of an answer.
        ask: answers for one image.
    """

    network: str
    shares: str
    pictures: tuple[str, ...]
    ask: Callable[[ImageFolder], Answer]


def require_app() -> None:
    """Raise a ConfigError if gradio, which makes the page, or captum, which computes maps, is not installed."""
    if find_spec("gradio") is None or find_spec("captum") is None:
        raise ConfigError(f"resnest-app needs {name_extra('app')}")


def plan_classifier(classifier: Classifier, top: int, layer: str | None, precision: str) -> Page:
    """Return a page with the likeliest classes of an image, their maps, and the attention of the splits.

    Args:
        classifier: the network.
        top: number of classes.
        layer: of the maps, see `inference.explain.explain`.
        precision: fp32, bf16 or fp16.
    """
    chosen = choose_layer(classifier) if layer is None else layer

    def ask(images: ImageFolder) -> Answer:
        # Decoded in this process: one that is forked from a server's thread may hang.
        options: dict[str, Any] = {"batch_size": 1, "precision": precision, "loader": "torchvision", "workers": 0}
        (explanation,) = Explanations(classifier, images, (), top, None, chosen, **options)
        figures = [draw_maps(explanation, chosen)] + [draw_attention(explanation)] * bool(explanation.attention)
        pictures = tuple(Image.open(io.BytesIO(encode_png(figure))) for figure in figures)
        return Answer({class_map.name: class_map.probability for class_map in explanation.maps}, pictures)

    has_splits = any(isinstance(module, SplitAttention) for module in classifier.module.modules())
    titles = ("where the classes were found", *(["weights of the splits"] if has_splits else []))
    return Page(classifier.name, "probability", titles, ask)


def plan_segmenter(segmenter: Segmenter, top: int, precision: str) -> Page:
    """Return a page with the largest classes of an image by their share of the pixels, and the mask."""

    def ask(images: ImageFolder) -> Answer:
        (image,) = SegmentedImages(segmenter, images, (), precision)
        shares = image.share_classes(len(segmenter.classes))
        largest = [label for label in np.argsort(-shares, kind="stable")[:top].tolist() if shares[label]]
        overlay = Image.fromarray(overlay_mask(image.pixels, image.mask, segmenter.palette))
        named = {printable(segmenter.classes[label]): float(shares[label]) for label in largest}
        return Answer(named, (overlay,))

    return Page(f"DeepLabV3 on {segmenter.weights.model}", "share of the pixels", ("the classes of the pixels",), ask)


def plan_detector(detector: "Detector", top: int, score: float, precision: str) -> Page:
    """Return a page with the most certain objects in an image, and with all above a score drawn."""
    from resnest_imagenet.inference.detect import DetectedImages
    from resnest_imagenet.reports.object_files import draw_objects

    palette = make_box_palette(len(detector.classes))

    def ask(images: ImageFolder) -> Answer:
        (image,) = DetectedImages(detector, images, (), score, precision)
        names = [printable(detector.classes[label]) for label in image.labels[:top].tolist()]
        scores = {
            f"{number}. {name}": value
            for number, (name, value) in enumerate(zip(names, image.scores.tolist(), strict=False), 1)
        }
        picture = Image.fromarray(draw_objects(image, detector.classes, palette))
        return Answer(scores, (picture,))

    return Page(name_rcnn(detector.weights), "score", (f"objects with a score above {score:g}",), ask)


@contextmanager
def serving(page: Page, source: str, port: int) -> Iterator[str]:
    """Serve the page for the time of the context; yield its address. Pictures that are dropped are deleted at the end.

    Nothing is asked of other machines: no statistics, fonts or scripts, and no public address.

    Args:
        page: for a network.
        source: of its weights.
        port: of this machine; 0: a free one.

    Raises:
        ConfigError: gradio is not installed, or the port is not free.
    """
    require_app()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import
    # gradio asks itself whether it answers: a proxy cannot reach this machine's own address.
    os.environ["no_proxy"] = ",".join(filter(None, (getproxies().get("no"), HOST)))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        app = _build_blocks(page, f"{page.network}: {printable(source)}")
        try:
            _, address, _ = app.launch(
                server_name=HOST,
                server_port=port or None,
                share=False,
                quiet=True,
                show_error=True,
                prevent_thread_lock=True,
                ssr_mode=False,
                footer_links=[],
                max_file_size=LARGEST,
            )
        except OSError as error:
            raise ConfigError(f"port={port}: not free: choose another") from error
        try:
            yield address
        finally:
            app.close(verbose=False)


def _build_blocks(page: Page, title: str) -> Any:
    """Return gradio's page: a place for the picture, the shares, and the pictures of the answer."""
    import gradio

    def answer(path: str | None) -> list[Any]:
        if path is None:
            return [None] * (1 + len(page.pictures))
        try:
            found = page.ask(list_images(path))
        except Exception as error:  # the page shows what a command would print
            explained = error if isinstance(error, UserError) else explain_runtime(error)
            if explained is None:
                raise
            line = str(explained).replace(os.path.join(os.path.dirname(path), ""), "")
            raise gradio.Error(line, print_exception=False) from error
        return [dict(found.shares), *found.pictures]

    with gradio.Blocks(title=title, analytics_enabled=False) as app:
        gradio.Markdown(f"## {title}")
        with gradio.Row():
            picture = gradio.Image(
                type="filepath", image_mode=None, sources=["upload", "clipboard"], label="picture", height=320
            )
            # Not gradio's own, which opens the picture, and prints a traceback for one that is damaged.
            picture.preprocess = lambda payload: payload and payload.path
            outputs = [gradio.Label(label=page.shares)]
        buttons = ["download", "fullscreen"]  # not "share", which would send the picture elsewhere
        outputs += [
            gradio.Image(label=name, format="png", interactive=False, buttons=buttons) for name in page.pictures
        ]
        picture.change(answer, picture, outputs, api_visibility="private", show_progress="full")
    return app
