"""Random draws for the appearance of a training image: operations of a policy, colour jitter, lighting.

This file only draws numbers, from (seed, epoch, sample). A policy is a table of rows: a row is drawn at random, and its
steps are applied in order. `pillow_ops.py` and `dali_ops.py` apply them.
"""

import enum
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from resnest_imagenet.randomness import Purpose, streams


class Op(enum.IntEnum):
    """An operation on an image of uint8 RGB; v is its value, W and H the image's size in pixels."""

    IDENTITY = 0
    AUTO_CONTRAST = 1  # each channel stretched to 0..255
    EQUALIZE = 2  # the histogram of each channel
    INVERT = 3
    POSTERIZE = 4  # to v bits
    SOLARIZE = 5  # inverted from v on
    SOLARIZE_ADD = 6  # v added, then inverted from 128 on
    BRIGHTNESS = 7  # 0 gives black, v the weight of the image
    COLOR = 8  # 0 gives grey
    CONTRAST = 9  # 0 gives the mean of the grey image
    SHARPNESS = 10  # 0 gives the smoothed image
    ROTATE = 11  # by v degrees, counter-clockwise; this one and all below: nearest pixel, black outside
    SHEAR_X = 12  # a row is shifted by v times its distance from the top
    SHEAR_Y = 13  # a column is shifted by v times its distance from the left
    SHEAR_X_BICUBIC = 14
    SHEAR_Y_BICUBIC = 15
    TRANSLATE_X = 16  # by v pixels
    TRANSLATE_Y = 17
    TRANSLATE_X_REL = 18  # by v W pixels, rounded toward zero
    TRANSLATE_Y_REL = 19  # by v H pixels
    CUTOUT = 20  # a square of v pixels at (x W, y H), filled with CUTOUT_COLOUR


# A pixel depends on no other one: on a crop, the result is the crop of the result.
PIXELWISE = frozenset((Op.IDENTITY, Op.INVERT, Op.POSTERIZE, Op.SOLARIZE, Op.SOLARIZE_ADD, Op.BRIGHTNESS, Op.COLOR))

# What a value of each operation means; the others have none.
_VALUES = {
    Op.POSTERIZE: "{:.0f} bits",
    Op.SOLARIZE: "from {:.0f}",
    Op.SOLARIZE_ADD: "{:.0f}",
    **dict.fromkeys((Op.BRIGHTNESS, Op.COLOR, Op.CONTRAST, Op.SHARPNESS), "{:.2f}"),
    Op.ROTATE: "{:+.0f}°",
    **dict.fromkeys((Op.SHEAR_X, Op.SHEAR_Y, Op.SHEAR_X_BICUBIC, Op.SHEAR_Y_BICUBIC), "{:+.2f}"),
    **dict.fromkeys((Op.TRANSLATE_X, Op.TRANSLATE_Y, Op.CUTOUT), "{:.0f} pixels"),
    **dict.fromkeys((Op.TRANSLATE_X_REL, Op.TRANSLATE_Y_REL), "{:+.2f}"),
}


def describe_operations(operations: np.ndarray) -> list[str]:
    """Return operations of an `Appearance`, (S, 4), in words, such as "rotate +19°"; the identity is skipped."""
    words = []
    for number, value, *_ in operations.tolist():
        op = Op(int(number))
        if op != Op.IDENTITY:
            name = op.name.lower().removesuffix("_bicubic").removesuffix("_rel").replace("_", " ")
            words.append(f"{name} {_VALUES[op].format(value)}" if op in _VALUES else name)
    return words


# From the released PyTorch code; it is CIFAR-10's mean.
CUTOUT_COLOUR = (125, 123, 114)


@dataclass(frozen=True)
class Step:
    """One operation of a row.

    Attributes:
        op: the operation.
        probability: of applying it.
        values: its value is drawn from these.
    """

    op: Op
    probability: float = 1.0
    values: tuple[float, ...] = (0.0,)


Rows = tuple[tuple[Step, ...], ...]


def _signed(*values: float) -> tuple[float, ...]:
    return (*values, *(-value for value in values))


def _around_one(*distances: float) -> tuple[float, ...]:
    """Return factors for the four blending operations, at these distances from 1 (the image itself), on both sides."""
    return tuple(1 + distance for distance in _signed(*distances))


# AutoAugment's rows for ImageNet: operation, probability, level out of 10 (Cubuk et al. 2019, arXiv 1805.09501,
# Table 9).
_AUTOAUGMENT = (
    ((Op.POSTERIZE, 0.4, 8), (Op.ROTATE, 0.6, 9)),
    ((Op.SOLARIZE, 0.6, 5), (Op.AUTO_CONTRAST, 0.6, 5)),
    ((Op.EQUALIZE, 0.8, 8), (Op.EQUALIZE, 0.6, 3)),
    ((Op.POSTERIZE, 0.6, 7), (Op.POSTERIZE, 0.6, 6)),
    ((Op.EQUALIZE, 0.4, 7), (Op.SOLARIZE, 0.2, 4)),
    ((Op.EQUALIZE, 0.4, 4), (Op.ROTATE, 0.8, 8)),
    ((Op.SOLARIZE, 0.6, 3), (Op.EQUALIZE, 0.6, 7)),
    ((Op.POSTERIZE, 0.8, 5), (Op.EQUALIZE, 1.0, 2)),
    ((Op.ROTATE, 0.2, 3), (Op.SOLARIZE, 0.6, 8)),
    ((Op.EQUALIZE, 0.6, 8), (Op.POSTERIZE, 0.4, 6)),
    ((Op.ROTATE, 0.8, 8), (Op.COLOR, 0.4, 0)),
    ((Op.ROTATE, 0.4, 9), (Op.EQUALIZE, 0.6, 2)),
    ((Op.EQUALIZE, 0.0, 7), (Op.EQUALIZE, 0.8, 8)),
    ((Op.INVERT, 0.6, 4), (Op.EQUALIZE, 1.0, 8)),
    ((Op.COLOR, 0.6, 4), (Op.CONTRAST, 1.0, 8)),
    ((Op.ROTATE, 0.8, 8), (Op.COLOR, 1.0, 2)),
    ((Op.COLOR, 0.8, 8), (Op.SOLARIZE, 0.8, 7)),
    ((Op.SHARPNESS, 0.4, 7), (Op.INVERT, 0.6, 8)),
    ((Op.SHEAR_X, 0.6, 5), (Op.EQUALIZE, 1.0, 9)),
    ((Op.COLOR, 0.4, 0), (Op.EQUALIZE, 0.6, 3)),
    ((Op.EQUALIZE, 0.4, 7), (Op.SOLARIZE, 0.2, 4)),
    ((Op.SOLARIZE, 0.6, 5), (Op.AUTO_CONTRAST, 0.6, 5)),
    ((Op.INVERT, 0.6, 4), (Op.EQUALIZE, 1.0, 8)),
    ((Op.COLOR, 0.6, 4), (Op.CONTRAST, 1.0, 8)),
    ((Op.EQUALIZE, 0.8, 8), (Op.EQUALIZE, 0.6, 3)),
)


def _resnest() -> Rows:
    """AutoAugment with the values that the published ResNeSt weights were trained with (resnest/gluon)."""

    def step(op: Op, probability: float, level: int) -> Step:
        if op == Op.ROTATE:
            return Step(op, probability, _signed(3 * level))
        if op == Op.SHEAR_X:
            return Step(Op.SHEAR_X_BICUBIC, probability, _signed(0.03 * level))
        if op == Op.POSTERIZE:
            return Step(op, probability, (4 - int(0.4 * level),))
        if op == Op.SOLARIZE:
            return Step(op, probability, (256 - int(25.6 * level),))
        if (op, level) == (Op.COLOR, 2):
            level = 0  # as in the original code
        if op in (Op.COLOR, Op.CONTRAST, Op.SHARPNESS):
            return Step(op, probability, (0.1 + 0.18 * level,))
        return Step(op, probability)

    return tuple(tuple(step(*arguments) for arguments in row) for row in _AUTOAUGMENT)


def _resnest_torch() -> Rows:
    """RandAugment(2, 12) of the released PyTorch code: two of 16 operations, at 12/30 of their ranges.

    That code skips an operation if a uniform number exceeds another one between .2 and .8, so half the time.
    """
    share = 12 / 30
    enhance = (0.1 + share * 1.8,)
    steps = (
        Step(Op.AUTO_CONTRAST, 0.5),
        Step(Op.EQUALIZE, 0.5),
        Step(Op.INVERT, 0.5),
        Step(Op.ROTATE, 0.5, _signed(share * 30)),
        Step(Op.POSTERIZE, 0.5, (int(share * 4),)),
        Step(Op.SOLARIZE, 0.5, (share * 256,)),
        Step(Op.SOLARIZE_ADD, 0.5, (share * 110,)),
        Step(Op.COLOR, 0.5, enhance),
        Step(Op.CONTRAST, 0.5, enhance),
        Step(Op.BRIGHTNESS, 0.5, enhance),
        Step(Op.SHARPNESS, 0.5, enhance),
        Step(Op.SHEAR_X_BICUBIC, 0.5, _signed(share * 0.3)),
        Step(Op.SHEAR_Y_BICUBIC, 0.5, _signed(share * 0.3)),
        Step(Op.CUTOUT, 0.5, (share * 40,)),
        Step(Op.TRANSLATE_X, 0.5, _signed(share * 100)),
        Step(Op.TRANSLATE_Y, 0.5, _signed(share * 100)),
    )
    return tuple(itertools.product(steps, steps))


def _stock_steps(level: slice, bins: int, shear: float, rotate: float, enhance: float, bits: int) -> dict[Op, Step]:
    """Return the operations that torchvision's stock policies share, at some of their levels.

    Args:
        level: the levels to take.
        bins: number of levels.
        shear: the value at the highest level.
        rotate: degrees at the highest level.
        enhance: distance of the blending factors from 1 at the highest level.
        bits: how many bits posterize removes at the highest level.
    """

    def at_levels(highest: float) -> list[float]:
        return np.linspace(0.0, highest, bins)[level].tolist()

    kept_bits = (8 - np.round(np.arange(bins) / ((bins - 1) / bits)))[level].tolist()
    thresholds = np.linspace(255.0, 0.0, bins)[level].tolist()
    steps = [
        Step(Op.SHEAR_X, 1.0, _signed(*at_levels(shear))),
        Step(Op.SHEAR_Y, 1.0, _signed(*at_levels(shear))),
        Step(Op.ROTATE, 1.0, _signed(*at_levels(rotate))),
        *(
            Step(op, 1.0, _around_one(*at_levels(enhance)))
            for op in (Op.BRIGHTNESS, Op.COLOR, Op.CONTRAST, Op.SHARPNESS)
        ),
        Step(Op.POSTERIZE, 1.0, tuple(kept_bits)),
        Step(Op.SOLARIZE, 1.0, tuple(thresholds)),
        Step(Op.AUTO_CONTRAST),
        Step(Op.EQUALIZE),
        Step(Op.INVERT),
        Step(Op.IDENTITY),
    ]
    return {step.op: step for step in steps}


def _autoaugment() -> Rows:
    """AutoAugment with torchvision's values: each operation has one of 10 levels."""

    def step(op: Op, probability: float, level: int) -> Step:
        steps = _stock_steps(slice(level, level + 1), 10, shear=0.3, rotate=30.0, enhance=0.9, bits=4)
        return Step(op, probability, steps[op].values)

    return tuple(tuple(step(*arguments) for arguments in row) for row in _AUTOAUGMENT)


def _randaugment() -> Rows:
    """RandAugment (Cubuk et al. 2020) with torchvision's defaults: two operations at level 9 of 31."""
    level = slice(9, 10)
    shift = _signed(150 / 331 * 9 / 30)
    stock = _stock_steps(level, 31, shear=0.3, rotate=30.0, enhance=0.9, bits=4)
    del stock[Op.INVERT]
    steps = [*stock.values(), Step(Op.TRANSLATE_X_REL, 1.0, shift), Step(Op.TRANSLATE_Y_REL, 1.0, shift)]
    return tuple(itertools.product(steps, steps))


def _trivialaugment() -> Rows:
    """TrivialAugment (Müller and Hutter 2021), wide: one operation at any of 31 levels."""
    shift = _signed(*np.trunc(np.linspace(0, 32, 31)).tolist())
    stock = _stock_steps(slice(None), 31, shear=0.99, rotate=135.0, enhance=0.99, bits=6)
    del stock[Op.INVERT]
    steps = [*stock.values(), Step(Op.TRANSLATE_X, 1.0, shift), Step(Op.TRANSLATE_Y, 1.0, shift)]
    return tuple((step,) for step in steps)


def _rotation() -> Rows:
    """A rotation by up to 10 degrees, in tenths (SENet's training, Hu et al. 2018)."""
    return ((Step(Op.ROTATE, 1.0, tuple((np.arange(-100, 101) / 10).tolist())),),)


POLICIES: dict[str, Callable[[], Rows]] = {
    "resnest": _resnest,
    "resnest_torch": _resnest_torch,
    "autoaugment": _autoaugment,
    "randaugment": _randaugment,
    "trivialaugment": _trivialaugment,
    "rotation": _rotation,
}

JITTER_OPS = (Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR)
JITTER_ORDERS = tuple(itertools.permutations(range(3)))

# Principal components of ImageNet's colours, in 0..1 and RGB order (Krizhevsky et al. 2012, section 4.1).
PCA_VALUES = np.array([0.2175, 0.0188, 0.0045])
PCA_VECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


@dataclass(frozen=True)
class Appearance:
    """The draws for N images. An operation is (Op, value, x, y); x and y are uniform in 0..1.

    Attributes:
        before: float32 (N, S, 4), operations on the whole image; S is the length of the policy's rows.
        after: float32 (N, 3, 4) or (N, 0, 4), operations on the crop.
        offset: float32 (N, 3), added to the channels, in 1/255.
    """

    before: np.ndarray
    after: np.ndarray
    offset: np.ndarray


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied besides crop and flip.

    Attributes:
        policy: one of POLICIES, or None.
        jitter: brightness, contrast and saturation are each scaled by 1 - jitter to 1 + jitter, in random order.
        lighting: standard deviation of the weights with which the principal components are added.
        shift: largest absolute value that is added to all pixels, in 1/255.
    """

    policy: str | None = None
    jitter: float = 0.0
    lighting: float = 0.0
    shift: float = 0.0

    @cached_property
    def rows(self) -> Rows:
        """The policy's table."""
        return POLICIES[self.policy]() if self.policy else ((),)

    @cached_property
    def slots_before(self) -> list[set[Op]]:
        """The operations that occur at each place of a row, without the identity."""
        return [{step.op for step in steps} - {Op.IDENTITY} for steps in zip(*self.rows, strict=True)]

    @cached_property
    def slots_after(self) -> list[set[Op]]:
        """The operations that occur at each place of the jitter."""
        return [set(JITTER_OPS)] * len(JITTER_OPS) if self.jitter > 0 else []

    def draw(self, seed: int, epoch: int, indices: Sequence[int]) -> Appearance:
        """Draw the appearance of samples of an epoch."""
        before = np.zeros((len(indices), len(self.slots_before), 4), np.float32)
        after = np.zeros((len(indices), len(self.slots_after), 4), np.float32)
        offset = np.zeros((len(indices), 3), np.float32)
        if self != NO_AUGMENTATION:
            for number, generator in enumerate(streams(seed, Purpose.APPEARANCE, epoch, indices)):
                self._draw_one(generator, before[number], after[number], offset[number])
        return Appearance(before, after, offset)

    def _draw_one(self, rng: np.random.Generator, before: np.ndarray, after: np.ndarray, offset: np.ndarray) -> None:
        u = rng.random(1 + 4 * len(before))
        row = self.rows[int(u[0] * len(self.rows))]
        for k, step in enumerate(row):
            applied, value, x, y = u[1 + 4 * k : 5 + 4 * k]
            if applied < step.probability:
                before[k] = step.op, step.values[int(value * len(step.values))], x, y
        if self.jitter > 0:
            u = rng.random(4)
            for k, number in enumerate(JITTER_ORDERS[int(u[3] * len(JITTER_ORDERS))]):
                after[k, :2] = JITTER_OPS[number], 1 + self.jitter * (2 * u[number] - 1)
        offset[:] = 255 * PCA_VECTORS @ (PCA_VALUES * self.lighting * rng.standard_normal(3))
        offset += self.shift * (2 * rng.random() - 1)


NO_AUGMENTATION = Augmentation()
