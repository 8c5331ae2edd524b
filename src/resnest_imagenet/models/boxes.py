"""Boxes of a detector: their sampling for training, the pooling of their features, the head that refines them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnest_imagenet.instances import Detections, Target
from resnest_imagenet.models.proposals import widen
from resnest_imagenet.models.rcnn_options import BoxWeights, RCNNOptions
from resnest_imagenet.torchvision_import import importing_torchvision

with importing_torchvision():
    from torchvision import ops
    from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
    from torchvision.ops.poolers import LevelMapper

BOX_SIDE = 7  # of a box's pooled features
BACKGROUND = 0  # index of the classifier; class k of the data set is k + 1, as in torchvision
MIN_SIDE = 1e-2  # of a detection, in pixels, as in torchvision


@dataclass(frozen=True)
class Samples:
    """Boxes of one image that a stage is trained on.

    Attributes:
        boxes: (n, 4), x1 y1 x2 y2 in pixels.
        labels: int64 (n,), BACKGROUND or class + 1.
        matched: int64 (n,), the target's object that each box overlaps most; meaningless for the background.
    """

    boxes: Tensor
    labels: Tensor
    matched: Tensor


def label_boxes(boxes: Tensor, target: Target, min_iou: float) -> Samples:
    """Label each box with the class of the object that it overlaps most, or BACKGROUND below an IoU of `min_iou`."""
    if not len(boxes) or not len(target):
        nothing = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        return Samples(boxes, nothing, nothing)
    best, matched = ops.box_iou(target.boxes.to(boxes.dtype), boxes).max(dim=0)
    labels = torch.where(best >= min_iou, target.labels[matched] + 1, BACKGROUND)
    return Samples(boxes, labels, matched)


def sample_boxes(
    proposals: Sequence[Tensor], targets: Sequence[Target], min_iou: float, sampler: BalancedPositiveNegativeSampler
) -> list[Samples]:
    """Choose the boxes of each image to train on, from the proposals and the objects' own boxes.

    Args:
        proposals: (n, 4) of each image.
        targets: of the images.
        min_iou: lowest IoU of a positive box.
        sampler: torchvision's; it uses torch's global generator.
    """
    samples = []
    for boxes, target in zip(proposals, targets, strict=True):
        labelled = label_boxes(torch.cat((boxes, target.boxes.to(boxes.dtype))), target, min_iou)
        (positive,), (negative,) = sampler([labelled.labels])
        chosen = (positive.bool() | negative.bool()).nonzero().flatten()
        samples.append(Samples(labelled.boxes[chosen], labelled.labels[chosen], labelled.matched[chosen]))
    return samples


def pool_boxes(
    levels: Sequence[Tensor], boxes: Sequence[Tensor], strides: Sequence[int], side: int, options: RCNNOptions
) -> Tensor:
    """Pool the features within boxes (RoIAlign, arXiv 1703.06870), each from the level of its size (arXiv 1612.03144).

    torchvision's MultiScaleRoIAlign supports aligned=False only, and infers the strides from the first batch.

    Args:
        levels: (B, C, H / stride, W / stride) each.
        boxes: (n, 4) of each image, in pixels.
        strides: of the levels, in pixels: powers of 2.
        side: cells along a side of the result.
        options: aligned, sampling and canonical_size.

    Returns:
        (boxes of all images, C, side, side), channels_last if the levels are.
    """
    first, last = (int(stride).bit_length() - 1 for stride in (strides[0], strides[-1]))
    level_of = LevelMapper(first, last, options.canonical_size)(list(boxes))
    numbers = [torch.full_like(image_boxes[:, :1], number) for number, image_boxes in enumerate(boxes)]
    rois = torch.cat((torch.cat(numbers), torch.cat(list(boxes))), dim=1)
    is_last = levels[0].is_contiguous(memory_format=torch.channels_last)
    pooled = torch.empty(
        (rois.shape[0], levels[0].shape[1], side, side),
        dtype=torch.promote_types(levels[0].dtype, torch.float32),
        device=rois.device,
        memory_format=torch.channels_last if is_last else torch.contiguous_format,
    ).zero_()
    for number, (level, stride) in enumerate(zip(map(widen, levels), strides, strict=True)):
        place = (level_of == number).nonzero().flatten()
        # A level without boxes too, so that it gets a gradient. index_copy would keep a copy for the backward pass.
        pooled[place] = ops.roi_align(
            level, rois[place].to(level.dtype), side, 1 / stride, options.sampling, options.aligned
        )
    return pooled


class _ContiguousReLU(nn.ReLU):
    """Makes its output contiguous, so that flattening it is a view: a copy would be kept for the backward pass too."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.contiguous()
        if y.requires_grad and not x.is_contiguous():
            # The norm before this layer sums in its gradient's memory layout, which must be that of its output.
            y.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
        return super().forward(y)


class BoxHead(nn.Module):
    """One stage of boxes: classifies each box and refines it.

    pooled features (n, C, 7, 7)
      -> body: 3x3 convolutions (norm, ReLU), fully connected layers (ReLU)      (n, box_width)
      -> classify                                                               (n, 1 + num_classes)
      -> regress: differences dx, dy, dw, dh                                    (n, 4) or (n, 4 num_classes)

    The background has no differences. Initial weights are detectron2's (modeling/roi_heads/box_head.py, fast_rcnn.py):
    convolutions N(0, 2 / fan out), fully connected layers uniform (Xavier), classify N(0, .01), regress N(0, .001).

    Args:
        num_classes: of the data set.
        weights: of the differences.
        options: of the detector.
        norm_layer: of the convolutions.
    """

    def __init__(
        self, num_classes: int, weights: BoxWeights, options: RCNNOptions, norm_layer: type[nn.Module] | None
    ) -> None:
        super().__init__()
        channels, width = options.channels, options.box_width
        size, convs, fcs = (channels, BOX_SIDE, BOX_SIDE), [channels] * options.box_convs, [width] * options.box_fcs
        self.body = FastRCNNConvFCHead(size, convs, fcs, norm_layer)
        if convs:
            self.body[len(convs) - 1][-1] = _ContiguousReLU(inplace=True)
        self.classify = nn.Linear(width, 1 + num_classes)
        self.regress = nn.Linear(width, 4 if options.has_one_box else 4 * num_classes)
        self._coder, self._beta = BoxCoder(weights), options.box_beta
        for module in self.body.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer, std in ((self.classify, 0.01), (self.regress, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Map pooled features to logits (n, 1 + num_classes), the background first, and differences (n, ., 4)."""
        x = self.body(pooled)
        return widen(self.classify(x)), widen(self.regress(x)).unflatten(1, (-1, 4))

    def decode(self, differences: Tensor, boxes: Tensor) -> Tensor:
        """Apply differences to boxes (n, 4); return the refined boxes (n, ., 4)."""
        return self._coder.decode_single(differences.flatten(1), boxes).unflatten(1, (-1, 4))

    def compute_losses(
        self, logits: Tensor, differences: Tensor, samples: Sequence[Samples], targets: Sequence[Target]
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of classes and boxes.

        Cross entropy, the mean over all boxes, and L1 (or smooth L1), the positives' sum over the number of all boxes.
        Without boxes both are 0 with a gradient of 0, because other ranks wait for that gradient.
        """
        labels = torch.cat([image_samples.labels for image_samples in samples])
        divisor = max(len(labels), 1)
        class_loss = F.cross_entropy(logits, labels, reduction="sum") / divisor
        expected = torch.cat(
            [
                self._coder.encode_single(
                    target.boxes[image_samples.matched[image_samples.labels > 0]].to(image_samples.boxes.dtype),
                    image_samples.boxes[image_samples.labels > 0],
                )
                for image_samples, target in zip(samples, targets, strict=True)
            ]
        )
        positive = (labels > 0).nonzero().flatten()
        column = torch.zeros_like(positive) if differences.shape[1] == 1 else labels[positive] - 1
        box_loss = F.smooth_l1_loss(differences[positive, column], expected, beta=self._beta, reduction="sum")
        return class_loss, box_loss / divisor


def select_detections(boxes: Tensor, probabilities: Tensor, size: tuple[int, int], options: RCNNOptions) -> Detections:
    """Choose the detections of an image: by score, by non-maximum suppression within each class, then the best ones.

    Args:
        boxes: (n, num_classes, 4) or (n, 1, 4).
        probabilities: (n, 1 + num_classes), the background first.
        size: (height, width) of the image, in pixels.
        options: min_score, nms and detections.

    Returns:
        The detections, or `no_numbers` if a value is not finite: comparisons with NaN would silently drop it.
    """
    if not (probabilities.isfinite().all() and boxes.isfinite().all()):
        return no_numbers(boxes)
    scores = probabilities[:, 1:]
    rows, labels = (scores > options.min_score).nonzero(as_tuple=True)
    scores = scores[rows, labels]
    boxes = boxes[rows, torch.zeros_like(labels) if boxes.shape[1] == 1 else labels]
    boxes = ops.clip_boxes_to_image(boxes, size)
    large = ops.remove_small_boxes(boxes, MIN_SIDE)
    boxes, scores, labels = boxes[large], scores[large], labels[large]
    kept = ops.batched_nms(boxes, scores, labels, options.nms)[: options.detections]
    return Detections(boxes[kept], scores[kept], labels[kept])


def no_numbers(like: Tensor) -> Detections:
    """Return the mark of an image whose values are not finite: one detection with a score of NaN."""
    score, label = like.new_full((1,), torch.nan), torch.zeros(1, dtype=torch.int64, device=like.device)
    return Detections(like.new_zeros(1, 4), score, label)  # the box is finite: a mask is pooled in it
