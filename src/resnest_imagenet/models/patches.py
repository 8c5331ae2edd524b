"""The gradient of a 3x3 convolution's weights as products of matrices.

On CPUs without AVX-512, oneDNN's kernel for it does half as many multiply-adds a second as its forward pass: it reads
channels_last with a stride. Here the nine pixels under the kernel are copied side by side, some megabytes at a time,
and multiplied. Rounding errors are smaller too: 2 to 30 times in the shapes of ResNeSt-50.
"""

import torch
from torch import Tensor, nn

_PATCHES = 2**20  # values copied at a time, at most: with the gradient they fit into a core's share of the cache


def differentiates_faster(x: Tensor, conv: nn.Conv2d) -> bool:
    """Return whether `differentiate_weight` computes a convolution's gradient, and faster than torch does here."""
    shape = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.cpu.get_cpu_capability() == "AVX2"
        and shape == ((3, 3), (1, 1), (1, 1), (1, 1))
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def differentiate_weight(x: Tensor, gradient: Tensor, groups: int) -> Tensor:
    """Return the gradient of the weights, (O, I / groups, 3, 3) in channels_last.

    Args:
        x: input of a 3x3 convolution of stride 1 with zeros around the map, (B, I, H, W).
        gradient: of its output, (B, O, H, W).
        groups: of the convolution.
    """
    batch, channels, height, width = x.shape
    inner, outer = channels // groups, gradient.shape[1] // groups
    padded = x.new_zeros(groups, batch, height + 2, width + 2, inner)
    padded[:, :, 1:-1, 1:-1] = x.permute(0, 2, 3, 1).unflatten(3, (groups, inner)).permute(3, 0, 1, 2, 4)
    patches = padded.unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 1, 2, 3, 5, 6, 4)  # (G, B, H, W, 3, 3, I / G)
    gradients = gradient.permute(0, 2, 3, 1).unflatten(3, (groups, outer))  # (B, H, W, G, O / G)
    out = x.new_zeros(groups, 9 * inner, outer)
    num_rows = max(_PATCHES // (width * 9 * inner), 1)
    num_images, num_rows = max(num_rows // height, 1), min(num_rows, height)
    for group in range(groups):
        for image in range(0, batch, num_images):
            for row in range(0, height, num_rows):
                part = slice(image, image + num_images), slice(row, row + num_rows)
                rows = patches[group][part].reshape(-1, 9 * inner)
                out[group].addmm_(rows.t(), gradients[part][..., group, :].reshape(-1, outer))
    # (G, 3, 3, I / G, O / G) to (O, 3, 3, I / G), the order of channels_last, which DistributedDataParallel expects
    by_output = out.view(groups, 3, 3, inner, outer).permute(0, 4, 1, 2, 3).contiguous()
    return by_output.flatten(0, 1).permute(0, 3, 1, 2)
