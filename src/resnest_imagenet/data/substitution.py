"""Images that cannot be used, and those that stand in for them in training."""

import itertools
import sys
from collections.abc import Callable, Iterator

from resnest_imagenet.data.source import ImageSource, name_unreadable
from resnest_imagenet.errors import DataError, printable


class Substitution:
    """For an image that a loader cannot decode stands the next one of the set that it can, with that one's label.

    So what is seen is a function of the plan and of the files, and neither ranks, workers nor resuming change it. Each
    bad image is counted, and reported on stderr, once.

    Args:
        images: the set.
        max_errors: how many of them may be bad.
        name_fault: returns one line about why an image cannot be used, or None; by default `name_unreadable`.

    Attributes:
        bad: the images that were counted, by index: all that a loader has to remember.
    """

    def __init__(
        self, images: ImageSource, max_errors: int, name_fault: Callable[[int], str | None] | None = None
    ) -> None:
        self._images = images
        self._max_errors = max_errors
        self._name_fault = name_fault or (lambda index: name_unreadable(images, [index]))
        self.bad: set[int] = set()

    def candidates(self, index: int) -> Iterator[int]:
        """Yield what may be used for an image: itself, then as many more as may be bad."""
        return ((index + step) % len(self._images) for step in range(min(self._max_errors + 1, len(self._images))))

    def record(self, index: int, used: int | None) -> None:
        """Count the bad images from `index` to the one that is used instead; None: all candidates are bad.

        Raises:
            DataError: more bad images than may be replaced, with the name of one.
        """
        for bad in itertools.takewhile(lambda candidate: candidate != used, self.candidates(index)):
            if bad in self.bad:
                continue
            fault = self._name_fault(bad) or f"{self._images.name(bad)}: cannot be decoded"
            if self._max_errors == 0:
                raise DataError(fault)
            # One image must be left.
            if len(self.bad) == min(self._max_errors, len(self._images) - 1):
                number = len(self.bad) + 1
                raise DataError(f"{fault}: bad image number {number}, data.max_errors={self._max_errors}")
            self.bad.add(bad)
            if used is not None:
                line = f"{fault}; replaced by {self._images.name(used)}"
                print(printable(line), file=sys.stderr, flush=True)
