"""The proposals of a detector: anchors, and a region proposal network (Faster R-CNN, arXiv 1506.01497)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnest_imagenet.instances import Target
from resnest_imagenet.models.rcnn_options import RCNNOptions
from resnest_imagenet.torchvision_import import importing_torchvision

with importing_torchvision():
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead


class Anchors(nn.Module):
    """The boxes around each cell of the levels; proposals are differences from them.

    torchvision's AnchorGenerator differs in three ways. It rounds the corners (46 x 22 instead of 45.25 x 22.63 for
    size 32). It computes a stride from the sides of image and level (at 800 pixels the last level has 13 cells, which
    gives 61 instead of 64). It uses the precision of the features, and bfloat16 has no odd numbers above 256.

    Args:
        sizes: square roots of the anchors' area in pixels, one for each level.
        ratios: heights over widths.
        strides: of the levels, in pixels.
        is_rounded: whether the corners around (0, 0) are whole numbers.
    """

    def __init__(
        self, sizes: Sequence[float], ratios: Sequence[float], strides: Sequence[int], is_rounded: bool = False
    ) -> None:
        super().__init__()
        self.ratios, self.strides = tuple(ratios), tuple(strides)
        self.cells = [_list_corners(size, ratios, is_rounded) for size in sizes]

    def num_anchors_per_location(self) -> list[int]:
        """Return the number of anchors per cell, for each level; the name is torchvision's."""
        return [len(self.ratios)] * len(self.strides)

    def forward(self, images: ImageList, levels: list[Tensor]) -> list[Tensor]:
        """Return the anchors (n, 4) of each image, x1 y1 x2 y2 in pixels: by level, row, column and ratio."""
        return [torch.cat(self.list_levels(levels))] * len(images.image_sizes)

    def list_levels(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Return the anchors (n, 4) of each level (B, C, H, W), by row, column and ratio."""
        device = levels[0].device
        dtype = torch.promote_types(levels[0].dtype, torch.float32)
        anchors = []
        for level, stride, cell in zip(levels, self.strides, self.cells, strict=True):
            rows, columns = (torch.arange(side, dtype=dtype, device=device) * stride for side in level.shape[2:])
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            centres = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
            anchors.append((centres + torch.tensor(cell, dtype=dtype, device=device)).reshape(-1, 4))
        return anchors


def _list_corners(size: float, ratios: Sequence[float], is_rounded: bool) -> list[list[float]]:
    sides = [(size / math.sqrt(ratio), size * math.sqrt(ratio)) for ratio in ratios]
    corners = [[-width / 2, -height / 2, width / 2, height / 2] for width, height in sides]
    return [[float(round(value)) for value in box] for box in corners] if is_rounded else corners


class ProposalHead(RPNHead):
    """Torchvision's head with outputs in float32 or wider: bfloat16 is too coarse for boxes."""

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Map levels (B, C, H, W) to objectness (B, ratios, H, W) and differences (B, 4 ratios, H, W) of each."""
        objectness, differences = super().forward(levels)
        return [widen(values) for values in objectness], [widen(values) for values in differences]


class ProposalNetwork(RegionProposalNetwork):
    """Torchvision's region proposal network, with the losses of detectron2 (modeling/proposal_generator/rpn.py).

    Both losses are sums over the sampled anchors, divided by rpn_samples times the number of images. torchvision
    divides by the number of anchors that it sampled, which is the same if there are enough, and has rpn_beta=1/9.
    """

    def __init__(self, strides: Sequence[int], options: RCNNOptions) -> None:
        anchors = Anchors(options.anchor_sizes, options.anchor_ratios, strides, options.anchors_rounded)
        head = ProposalHead(options.channels, len(options.anchor_ratios), conv_depth=options.rpn_convs)
        negative, positive = options.rpn_ious
        super().__init__(
            anchors,
            head,
            fg_iou_thresh=positive,
            bg_iou_thresh=negative,
            batch_size_per_image=options.rpn_samples,
            positive_fraction=options.rpn_positive,
            pre_nms_top_n=dict(zip(("training", "testing"), options.candidates, strict=True)),
            post_nms_top_n=dict(zip(("training", "testing"), options.num_proposals, strict=True)),
            nms_thresh=options.rpn_nms,
        )
        self._beta, self._samples = options.rpn_beta, options.rpn_samples

    def propose(
        self,
        images: Tensor,
        levels: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        targets: Sequence[Target] | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the proposals of each image, and in training the losses.

        Args:
            images: (B, 3, H, W), padded.
            levels: (B, C, H / stride, W / stride) each.
            sizes: (height, width) of each image without its padding, in pixels.
            targets: of the images, in training.

        Returns:
            Boxes (n, 4) of each image, within its size, the best first; losses "objectness" and "rpn_boxes".
        """
        batch = ImageList(images, list(sizes))
        boxes = [{"boxes": target.boxes} for target in targets] if targets is not None else None
        proposals, losses = self(batch, dict(enumerate(levels)), boxes)
        names = {"objectness": "loss_objectness", "rpn_boxes": "loss_rpn_box_reg"}
        return proposals, {name: losses[of_torchvision] for name, of_torchvision in names.items()} if losses else {}

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of objectness and boxes; the arguments have torchvision's names."""
        positive, negative = (torch.cat(of_images).bool() for of_images in self.fg_bg_sampler(labels))
        sampled, divisor = positive | negative, self._samples * len(labels)
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness.flatten()[sampled], torch.cat(labels)[sampled].to(objectness.dtype), reduction="sum"
        )
        box_loss = F.smooth_l1_loss(
            pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], beta=self._beta, reduction="sum"
        )
        return objectness_loss / divisor, box_loss / divisor


def widen(values: Tensor) -> Tensor:
    """Return values in float32, or unchanged if their type is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
