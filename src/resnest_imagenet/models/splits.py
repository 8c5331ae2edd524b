"""The splits of one batch and all computations on them, with torch's operators on any device.

`TritonSplits` computes the same in kernels for CUDA; `fused_attention` chooses between them.
"""

import torch
from torch import Tensor

from resnest_imagenet.models.norms import Statistics, differentiate_norm, rectify_normalised


class Splits:
    """The splits relu(bn0(y)) of one batch, and all computations on them.

    Args:
        y: (B, R C, H, W), radix-major, of either memory format.
        weight, bias: bn0's, (R C,), or None.
        statistics: bn0's, or None if y is normalised already; then call `rectify` first.
        radix: R.
    """

    def __init__(
        self, y: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics | None, radix: int
    ) -> None:
        self._y, self._weight, self._statistics, self._radix = y, weight, statistics, radix
        if statistics is None:
            self._x = y
        else:
            self._x = rectify_normalised(y, weight, bias, statistics)

    def rectify(self) -> None:
        """Overwrite y with the splits if it is normalised already: the backward pass gets them as y."""
        if self._statistics is None:
            self._y.relu_()

    def pool(self) -> Tensor:
        """Return the mean over the pixels of the sum over the splits, float32 (B, C)."""
        return self._divide(_sum_pixels(self._x)).sum(1) / self._x[0, 0].numel()

    def sum_weighted(self, weights: Tensor) -> Tensor:
        """Return the sum over the splits of weight * split, (B, C, H, W); weights: (B, R, C), from an r-softmax."""
        splits, weights = self._divide(self._x), weights.to(self._x.dtype)[..., None, None]
        if self._radix == 2:  # a softmax over two sums to 1: u + a (v - u) reads each split once
            return torch.lerp(splits[:, 0], splits[:, 1], weights[:, 1])
        out = splits[:, 0] * weights[:, 0]
        for r in range(1, self._radix):
            out.addcmul_(splits[:, r], weights[:, r])
        return out

    def weight_gradient(self, gradient: Tensor) -> Tensor:
        """Return the sum over the pixels of gradient * split, float32 (B, R, C); gradient: (B, C, H, W)."""
        product = torch.empty_like(self._x)
        torch.mul(self._divide(self._x), gradient[:, None], out=self._divide(product))
        return self._divide(_sum_pixels(product))

    def input_gradient(
        self, gradient: Tensor, weights: Tensor, pooled: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of y and of bn0's weight and bias.

        Args:
            gradient: of the weighted sum, (B, C, H, W).
            weights: (B, R, C).
            pooled: gradient of what `pool` returned, (B, C).
        """
        dtype, pixels = self._x.dtype, self._x[0, 0].numel()
        weights, pooled = weights.to(dtype)[..., None, None], (pooled / pixels).to(dtype)[:, None, :, None, None]
        out = torch.empty_like(self._x)
        torch.addcmul(pooled, weights, gradient[:, None], out=self._divide(out))
        torch.ops.aten.threshold_backward.grad_input(out, self._x, 0, grad_input=out)
        if self._statistics is None:
            return out, None, None
        return differentiate_norm(out, self._y, self._weight, self._statistics)

    def _divide(self, x: Tensor) -> Tensor:
        """View (B, R C, ...) as (B, R, C, ...): splitting a dimension needs no copy in any memory format."""
        return x.unflatten(1, (self._radix, -1))


def _sum_pixels(x: Tensor) -> Tensor:
    """Sum over the pixels, accumulated in float32: (B, C, H, W) to float32 (B, C)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not x.is_contiguous(memory_format=torch.channels_last) or x.is_cuda:
        return x.sum((2, 3), dtype=dtype)
    # On a CPU in channels_last, a product with ones is faster than `sum`, and as exact.
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
    ones = pixels.new_ones(1, 1, pixels.shape[1]).expand(len(x), -1, -1)
    return torch.bmm(ones, pixels)[:, 0].to(dtype)
