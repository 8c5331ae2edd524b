"""An image at a web address, fetched into a temporary file."""

import atexit
import os
import shutil
import sys
import tempfile
from functools import cache
from http.client import HTTPException
from pathlib import PurePosixPath
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from resnest_imagenet.errors import DataError, printable

MAX_BYTES = 64 * 2**20  # of an image from the web: photographs of 100 megapixels have less
SECONDS = 30.0  # that a server may be silent
_PIECE = 2**16


def is_address(place: str) -> bool:
    """Return whether an image is at a web address."""
    return place.lower().startswith(("http://", "https://"))


@cache
def fetch_image(address: str) -> str:
    """Return the path of a file with what is at a web address; it is fetched once, and gone when the process ends.

    Raises:
        DataError: it cannot be fetched, or has more than MAX_BYTES.
    """
    folder = tempfile.mkdtemp(prefix="resnest-image-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    name = PurePosixPath(unquote(urlsplit(address).path)).name[-100:] or "image"
    path = os.path.join(folder, name.lstrip(".") or "image")
    try:
        _copy(address, path)
    # A ValueError: an address that is none; an HTTPException: an answer that is none.
    except (OSError, ValueError, HTTPException) as error:
        # An address without an answer is an error around the cause.
        cause = error.reason if isinstance(error, URLError) and not isinstance(error, HTTPError) else error
        raise DataError(f"images={address}: cannot be fetched ({cause}): save it, and give the file") from error
    print(printable(f"{address}: fetched into {path}"), file=sys.stderr, flush=True)
    return path


def _copy(address: str, path: str) -> None:
    """Write what is at an address into a file."""
    # Some servers refuse Python's own name.
    request = Request(address, headers={"User-Agent": "resnest-imagenet", "Accept": "image/*,*/*;q=0.5"})
    with urlopen(request, timeout=SECONDS) as answer, open(path, "wb") as file:
        size = 0
        while piece := answer.read(_PIECE):
            size += len(piece)
            if size > MAX_BYTES:
                raise OSError(f"more than {MAX_BYTES >> 20} MiB")
            file.write(piece)
        expected = answer.headers.get("Content-Length")
        if expected is not None and size < int(expected):
            raise OSError(f"only {size:,} of {int(expected):,} bytes came")
