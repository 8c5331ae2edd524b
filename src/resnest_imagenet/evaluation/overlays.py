"""Draws masks: in colours, over the image, and as PNG files of class indices with a palette."""

import io

import numpy as np
from PIL import Image

from resnest_imagenet.data.scenes import VOID

VOID_COLOUR = (224, 224, 192)  # PASCAL VOC's: no class has it, whereas black may be a class


def paint_mask(mask: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Return a mask in colours, uint8 (H, W, 3).

    Args:
        mask: uint8 (H, W), class indices and VOID.
        palette: uint8 (K, 3), a colour for each class.
    """
    return _extend(palette)[mask]


def overlay_mask(image: np.ndarray, mask: np.ndarray, palette: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """Return an image under the colours of its mask, uint8 (H, W, 3); VOID pixels do not change.

    Args:
        image: uint8 (H, W, 3).
        mask: uint8 (H, W), class indices and VOID.
        palette: uint8 (K, 3), a colour for each class.
        opacity: of the colours, 0 to 1.
    """
    blended = Image.blend(Image.fromarray(image), Image.fromarray(paint_mask(mask, palette)), opacity)
    return np.where((mask == VOID)[..., None], image, np.asarray(blended))


def encode_index_png(mask: np.ndarray, palette: np.ndarray) -> bytes:
    """Return a PNG file of 8 bits with the values of a mask and the colours of the palette.

    Programs read the values, and viewers show the colours. The file is a mask of the layout "masks".

    Args:
        mask: uint8 (H, W), class indices and VOID.
        palette: uint8 (K, 3), a colour for each class.
    """
    picture = Image.fromarray(mask)
    picture.putpalette(_extend(palette).tobytes())
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def _extend(palette: np.ndarray) -> np.ndarray:
    """Return the colours of all values of a mask, uint8 (256, 3)."""
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    colours[VOID] = VOID_COLOUR
    return colours
