# ruff: noqa: ANN001, ANN202, N803 - Triton compiles the kernels: their arguments are pointers, numbers and constants.
# mypy: disable-error-code="no-untyped-def"
"""The computations of `Splits` in Triton kernels for CUDA: the splits are never written to memory.

The forward pass reads y (B, R C, H, W) once for the pooled sum and once for the weighted sum, the backward pass once
for all sums over the pixels and once for y's gradient. Sums are float32, in a fixed order, without atomic additions.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnest_imagenet.models.splits import Splits, Statistics

CHANNELS = 64  # of a tile, at most
PIXELS = 32  # of a tile, at most: more would take registers from other programs
STEPS = 32  # tiles that one program sums, at most: fewer make more programs, and more partial sums


@triton.jit
def _place(b, c, pixel, stride_b, stride_c, stride_p):
    """Return the offsets of a tile (P, C) in a tensor (B, C, pixels)."""
    return b.to(tl.int64) * stride_b + c[None, :] * stride_c + pixel[:, None] * stride_p


@triton.jit
def _normalise(y, norm, c, channels, NORMALISES: tl.constexpr):
    """Return y before and after bn0's weight and bias; norm: mean, 1 / deviation, weight, bias, each (R C,)."""
    xhat = y
    z = y
    if NORMALISES:
        mean = tl.load(norm + c, mask=c < channels, other=0.0)
        inverse = tl.load(norm + channels + c, mask=c < channels, other=0.0)
        weight = tl.load(norm + 2 * channels + c, mask=c < channels, other=0.0)
        bias = tl.load(norm + 3 * channels + c, mask=c < channels, other=0.0)
        xhat = (y - mean[None, :]) * inverse[None, :]
        z = xhat * weight[None, :] + bias[None, :]
    return xhat, z


@triton.jit
def _pool(
    y, norm, partial, channels, pixels, y_b, y_c, y_p,
    NORMALISES: tl.constexpr, STEPS: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Sum the splits over some pixels: partial (programs, B, R C)."""
    b = tl.program_id(0)
    c = tl.program_id(1) * C + tl.arange(0, C)
    start = tl.program_id(2) * STEPS * P
    total = tl.zeros((C,), tl.float32)
    for step in range(STEPS):
        pixel = start + step * P + tl.arange(0, P)
        inside = (pixel < pixels)[:, None] & (c < channels)[None, :]
        value = tl.load(y + _place(b, c, pixel, y_b, y_c, y_p), mask=inside, other=0.0).to(tl.float32)
        _, z = _normalise(value, norm, c, channels, NORMALISES)
        total += tl.sum(tl.where(inside & ~(z < 0), z, 0.0), 0)  # NaN passes
    row = tl.program_id(2) * tl.num_programs(0) + b
    tl.store(partial + row * channels + c, total, mask=c < channels)


@triton.jit
def _sum_weighted(
    y, norm, weights, out, channels, width, pixels, y_b, y_c, y_p, out_b, out_c, out_p,
    NORMALISES: tl.constexpr, R: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Write the weighted sum of the splits for a tile of one image; width: C, channels: R C."""
    b = tl.program_id(0)
    column = tl.program_id(1) * C + tl.arange(0, C)
    pixel = tl.program_id(2) * P + tl.arange(0, P)
    inside = (pixel < pixels)[:, None] & (column < width)[None, :]
    total = tl.zeros((P, C), tl.float32)
    for r in tl.static_range(R):
        c = r * width + column
        value = tl.load(y + _place(b, c, pixel, y_b, y_c, y_p), mask=inside, other=0.0).to(tl.float32)
        _, z = _normalise(value, norm, c, channels, NORMALISES)
        weight = tl.load(weights + b * channels + c, mask=column < width, other=0.0)
        total += weight[None, :] * tl.where(z < 0, 0.0, z)
    tl.store(out + _place(b, column, pixel, out_b, out_c, out_p), total, mask=inside)


@triton.jit
def _sum_products(
    y, norm, gradient, partial, channels, width, pixels, y_b, y_c, y_p, g_b, g_c, g_p,
    NORMALISES: tl.constexpr, STEPS: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Sum over some pixels, where z > 0: gradient, gradient * xhat, 1, xhat; partial: (programs, 4, B, R C)."""
    b = tl.program_id(0)
    c = tl.program_id(1) * C + tl.arange(0, C)
    start = tl.program_id(2) * STEPS * P
    sum_g = tl.zeros((C,), tl.float32)
    sum_gx = tl.zeros((C,), tl.float32)
    sum_1 = tl.zeros((C,), tl.float32)
    sum_x = tl.zeros((C,), tl.float32)
    for step in range(STEPS):
        pixel = start + step * P + tl.arange(0, P)
        inside = (pixel < pixels)[:, None] & (c < channels)[None, :]
        value = tl.load(y + _place(b, c, pixel, y_b, y_c, y_p), mask=inside, other=0.0).to(tl.float32)
        g = tl.load(gradient + _place(b, c % width, pixel, g_b, g_c, g_p), mask=inside, other=0.0).to(tl.float32)
        xhat, z = _normalise(value, norm, c, channels, NORMALISES)
        passes = inside & ~(z <= 0)
        sum_g += tl.sum(tl.where(passes, g, 0.0), 0)
        sum_gx += tl.sum(tl.where(passes, g * xhat, 0.0), 0)
        sum_1 += tl.sum(tl.where(passes, 1.0, 0.0), 0)
        sum_x += tl.sum(tl.where(passes, xhat, 0.0), 0)
    images = tl.num_programs(0)
    target = partial + (tl.program_id(2) * 4 * images + b) * channels + c
    tl.store(target, sum_g, mask=c < channels)
    tl.store(target + images * channels, sum_gx, mask=c < channels)
    tl.store(target + 2 * images * channels, sum_1, mask=c < channels)
    tl.store(target + 3 * images * channels, sum_x, mask=c < channels)


@triton.jit
def _write_gradient(
    y, norm, gradient, weights, pooled, scales, out, channels, width, pixels, y_b, y_c, y_p, g_b, g_c, g_p,
    NORMALISES: tl.constexpr, R: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Write the gradient of y for a tile of one image; scales: factor, mean of dz, mean of dz * xhat, each (R C,)."""
    b = tl.program_id(0)
    column = tl.program_id(1) * C + tl.arange(0, C)
    pixel = tl.program_id(2) * P + tl.arange(0, P)
    has_column = column < width
    inside = (pixel < pixels)[:, None] & has_column[None, :]
    g = tl.load(gradient + _place(b, column, pixel, g_b, g_c, g_p), mask=inside, other=0.0).to(tl.float32)
    of_pooled = tl.load(pooled + b * width + column, mask=has_column, other=0.0)
    for r in tl.static_range(R):
        c = r * width + column
        place = _place(b, c, pixel, y_b, y_c, y_p)
        value = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
        xhat, z = _normalise(value, norm, c, channels, NORMALISES)
        weight = tl.load(weights + b * channels + c, mask=has_column, other=0.0)
        dz = tl.where(z <= 0, 0.0, weight[None, :] * g + of_pooled[None, :])
        if NORMALISES:
            factor = tl.load(scales + c, mask=has_column, other=0.0)
            mean = tl.load(scales + channels + c, mask=has_column, other=0.0)
            slope = tl.load(scales + 2 * channels + c, mask=has_column, other=0.0)
            dz = factor[None, :] * (dz - mean[None, :] - slope[None, :] * xhat)
        tl.store(out + place, dz, mask=inside)


class TritonSplits(Splits):
    """`Splits`, computed by the kernels: float32, bfloat16 or float16, on CUDA."""

    def __init__(
        self, y: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics | None, radix: int
    ) -> None:
        self._y, self._radix, self._statistics = _with_pixel_stride(y), radix, statistics
        self._images, self._channels = y.shape[:2]
        self._width, self._pixels = self._channels // radix, y[0, 0].numel()
        self._norm = y  # a placeholder: not read if y is normalised already
        if statistics is not None and weight is not None and bias is not None:
            inverse = (statistics.variance + statistics.eps).rsqrt()
            self._norm = torch.stack([statistics.mean, inverse, weight, bias]).float()
        self._tile = {
            "NORMALISES": statistics is not None,
            "P": min(PIXELS, triton.next_power_of_2(self._pixels)),
            "C": min(CHANNELS, triton.next_power_of_2(self._width)),
        }
        tiles = triton.cdiv(self._pixels, self._tile["P"])
        self._steps = min(STEPS, tiles)
        self._programs = triton.cdiv(tiles, self._steps)

    def rectify(self) -> None:
        """See `Splits`; here the kernels do it whenever they read y."""

    def pool(self) -> Tensor:
        """See `Splits`."""
        partial = self._norm.new_empty((self._programs, self._images, self._channels), dtype=torch.float32)
        grid = (self._images, triton.cdiv(self._channels, self._tile["C"]), self._programs)
        with torch.cuda.device_of(self._y):
            _pool[grid](
                *(self._y, self._norm, partial, self._channels, self._pixels, *_strides(self._y)),
                **self._tile,
                STEPS=self._steps,
            )
        return partial.sum(0).unflatten(1, (self._radix, -1)).sum(1) / self._pixels

    def sum_weighted(self, weights: Tensor) -> Tensor:
        """See `Splits`."""
        out = torch.empty_like(self._y[:, : self._width])
        with torch.cuda.device_of(self._y):
            _sum_weighted[self._tiles()](
                *(self._y, self._norm, weights.float().contiguous(), out, self._channels, self._width, self._pixels),
                *(*_strides(self._y), *_strides(out)),
                **self._tile,
                R=self._radix,
            )
        return out

    def weight_gradient(self, gradient: Tensor) -> Tensor:
        """See `Splits`."""
        gradient = _with_pixel_stride(gradient)
        shape = (self._programs, 4, self._images, self._channels)
        partial = torch.empty(shape, dtype=torch.float32, device=gradient.device)
        grid = (self._images, triton.cdiv(self._channels, self._tile["C"]), self._programs)
        with torch.cuda.device_of(self._y):
            _sum_products[grid](
                *(self._y, self._norm, gradient, partial, self._channels, self._width, self._pixels),
                *(*_strides(self._y), *_strides(gradient)),
                **self._tile,
                STEPS=self._steps,
            )
        self._sums = of_g, of_gx, _, _ = partial.sum(0)
        if self._statistics is not None:  # z = weight * xhat + bias
            of_gx = self._norm[2] * of_gx + self._norm[3] * of_g
        return of_gx.unflatten(1, (self._radix, -1))

    def input_gradient(
        self, gradient: Tensor, weights: Tensor, pooled: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See `Splits`; call `weight_gradient` first."""
        gradient, pooled = _with_pixel_stride(gradient), (pooled / self._pixels).float().contiguous()
        weights, scales = weights.float().contiguous(), self._norm
        of_weight = of_bias = None
        if self._statistics is not None:
            of_g, of_gx, of_1, of_x = self._sums
            a, p = weights.flatten(1), pooled.repeat(1, self._radix)
            of_bias, of_weight = (a * of_g + p * of_1).sum(0), (a * of_gx + p * of_x).sum(0)
            count = self._images * self._pixels if self._statistics.are_of_batch else math.inf
            scales = torch.stack([self._norm[2] * self._norm[1], of_bias / count, of_weight / count])
        out = torch.empty_like(self._y)
        with torch.cuda.device_of(self._y):
            _write_gradient[self._tiles()](
                *(self._y, self._norm, gradient, weights, pooled, scales, out),
                *(self._channels, self._width, self._pixels, *_strides(self._y), *_strides(gradient)),
                **self._tile,
                R=self._radix,
            )
        return out, of_weight, of_bias

    def _tiles(self) -> tuple[int, int, int]:
        return (
            self._images,
            triton.cdiv(self._width, self._tile["C"]),
            triton.cdiv(self._pixels, self._tile["P"]),
        )


def _with_pixel_stride(x: Tensor) -> Tensor:
    """Return x (B, C, H, W) with one stride between all pixels, as both memory formats have."""
    return x if x.stride(2) == x.shape[3] * x.stride(3) else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of image, channel and pixel."""
    return x.stride(0), x.stride(1), x.stride(3)
