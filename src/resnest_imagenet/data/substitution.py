"""Replacement of images that cannot be used in training."""

import itertools
import sys
from collections.abc import Callable, Iterator

from resnest_imagenet.data.source import ImageSource, name_unreadable
from resnest_imagenet.errors import DataError, printable


class Substitution:
    """Replaces an image that cannot be decoded by the next one in the set that can, with that image's label.

    So the images that training sees depend only on the plan and the files, not on ranks, workers or resuming. Each bad
    image is counted once, and reported on stderr once.

    Args:
        images: the set.
        max_errors: how many of them may be bad.
        name_fault: returns one line about why an image cannot be used, or None; by default `name_unreadable`.

    Attributes:
        bad: indices of the bad images so far: the only state of a loader.
    """

    def __init__(
        self, images: ImageSource, max_errors: int, name_fault: Callable[[int], str | None] | None = None
    ) -> None:
        self._images = images
        self._max_errors = max_errors
        self._name_fault = name_fault or (lambda index: name_unreadable(images, [index]))
        self.bad: set[int] = set()

    def candidates(self, index: int) -> Iterator[int]:
        """Yield the indices to try for an image: its own, then those of as many further images as may be bad."""
        return ((index + step) % len(self._images) for step in range(min(self._max_errors + 1, len(self._images))))

    def record(self, index: int, used: int | None) -> None:
        """Count the bad images from `index` up to the image that is used instead; None: all candidates are bad.

        Raises:
            DataError: there are more bad images than may be replaced; names one.
        """
        for bad in itertools.takewhile(lambda candidate: candidate != used, self.candidates(index)):
            if bad in self.bad:
                continue
            fault = self._name_fault(bad) or f"{self._images.name(bad)}: cannot be decoded"
            if self._max_errors == 0:
                raise DataError(fault)
            # At least one image must be good.
            if len(self.bad) == min(self._max_errors, len(self._images) - 1):
                number = len(self.bad) + 1
                raise DataError(f"{fault}: bad image number {number}, data.max_errors={self._max_errors}")
            self.bad.add(bad)
            if used is not None:
                line = f"{fault}; replaced by {self._images.name(used)}"
                print(printable(line), file=sys.stderr, flush=True)
