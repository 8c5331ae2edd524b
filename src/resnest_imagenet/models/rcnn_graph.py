"""A detector as a graph for exporters: it finds the objects of one image by operations on tensors only."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnest_imagenet.models.boxes import MIN_SIDE
from resnest_imagenet.models.masks import POOLED_SIDE
from resnest_imagenet.models.rcnn import RCNN
from resnest_imagenet.models.roi_heads import RoIHeads
from resnest_imagenet.torchvision_import import importing_torchvision

with importing_torchvision():
    from torchvision import ops


class RCNNGraph(nn.Module):
    """Computes what `RCNN` computes in evaluation, for one image whose size is a tensor too.

    An exporter traces operations on tensors. It cannot trace `RCNN`, which splits its batches by numbers of boxes in
    Python, nor torchvision's choice between two ways to compute the same suppression.

    Args:
        network: in evaluation mode; its parts are used as they are.
    """

    def __init__(self, network: RCNN) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        """Return the n detections of an image, the most certain first.

        Args:
            images: (1, 3, H, W), normalised, then padded with zeros at the right and at the bottom.
            size: int64 (2,), its height and width without the padding, in pixels.

        Returns:
            Boxes (n, 4), x1 y1 x2 y2 in pixels; scores (n,); labels int64 (n,); and, if the network finds masks, masks
            (n, 28, 28): the probability that a cell of the box belongs to the object.
        """
        heads = self.network.roi_heads
        assert isinstance(heads, RoIHeads)
        borders = size.flip(0).repeat(2).to(images.dtype)
        levels = self.network.pyramid(images)
        proposals = self._propose(levels, borders)
        pooled = levels[: len(heads.strides)]
        boxes, probabilities = self._refine(heads, pooled, proposals, borders)
        boxes, scores, labels = self._select(heads, boxes, probabilities, borders)
        if heads.masks is None:
            return boxes, scores, labels
        logits = heads.masks(heads.pool(pooled, [_append_one(boxes)], POOLED_SIDE))[:-1]
        numbers = torch.arange(labels.shape[0], device=labels.device)
        return boxes, scores, labels, logits[numbers, labels].sigmoid()

    def _propose(self, levels: list[Tensor], borders: Tensor) -> Tensor:
        """Return the proposals (n, 4), the best first; see torchvision's RegionProposalNetwork.filter_proposals."""
        rpn = self.network.rpn
        anchors = rpn.anchor_generator.list_levels(levels)
        boxes, scores = [], []
        for logits, differences, of_level in zip(*rpn.head(levels), anchors, strict=True):
            certainty = logits.permute(0, 2, 3, 1).flatten()
            shifts = differences.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).reshape(-1, 4)
            # Always as many as the limit; those beyond the end of the level have the score -inf.
            values, best = _rank(certainty, rpn.pre_nms_top_n())
            decoded = _clip(rpn.box_coder.decode_single(shifts[best], of_level[best]), borders)
            is_proposal = (values > -torch.inf) & _are_large(decoded, rpn.min_size)
            certainty = torch.where(is_proposal, values.sigmoid(), -torch.inf)
            kept = ops.nms(decoded, certainty, rpn.nms_thresh)
            boxes.append(decoded[kept])
            scores.append(certainty[kept])
        return torch.cat(boxes)[find_best(torch.cat(scores), rpn.post_nms_top_n())]

    @staticmethod
    def _refine(heads: RoIHeads, levels: list[Tensor], boxes: Tensor, borders: Tensor) -> tuple[Tensor, Tensor]:
        """Return the refined boxes (n, ., 4) of the proposals (n, 4), and the probabilities of their classes."""
        probabilities = []
        refined = boxes[:, None]
        for head in heads.box_heads:
            boxes = refined[:, 0]
            logits, differences = head(heads.pool(levels, [_append_one(boxes)]))
            probabilities.append(logits[:-1].softmax(1))
            refined = head.decode(differences[:-1], boxes)
            if heads.options.cascade:
                refined = _clip(refined.nan_to_num(), borders)
        return refined, torch.stack(probabilities).mean(0)

    @staticmethod
    def _select(
        heads: RoIHeads, boxes: Tensor, probabilities: Tensor, borders: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes, scores and labels of the detections; see `select_detections`."""
        options = heads.options
        scores = probabilities[:, 1:]
        rows, labels = (scores > options.min_score).nonzero().unbind(1)
        scores = scores[rows, labels]
        boxes = _clip(boxes[rows, torch.zeros_like(labels) if boxes.shape[1] == 1 else labels], borders)
        large = _are_large(boxes, MIN_SIDE).nonzero().flatten()
        boxes, scores, labels = boxes[large], scores[large], labels[large]
        # Shift each class to its own place, so that classes do not suppress each other.
        apart = boxes + (labels * (borders.max() + 1))[:, None]
        kept = ops.nms(apart, scores, options.nms)
        kept = kept[find_best(scores[kept], options.detections)]
        return boxes[kept], scores[kept], labels[kept]


def find_best(scores: Tensor, count: int) -> Tensor:
    """Return the places of the `count` highest scores (n,), the highest first; those of -inf are dropped."""
    values, places = _rank(scores, count)
    return places[(values > -torch.inf).nonzero().flatten()]


def _rank(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` highest of scores (n,), the highest first, and their places; beyond the last -inf and 0."""
    # An exporter cannot trace min(n, count).
    values, places = torch.cat((scores, scores.new_full((count,), -torch.inf))).topk(count)
    return values, torch.where(values > -torch.inf, places, 0)


def _append_one(boxes: Tensor) -> Tensor:
    """Return boxes (n, 4) with an empty one added: exporters and runtimes refuse a convolution without input."""
    return F.pad(boxes, (0, 0, 0, 1))


def _clip(boxes: Tensor, borders: Tensor) -> Tensor:
    return torch.minimum(boxes.clamp(min=0), borders)


def _are_large(boxes: Tensor, min_side: float) -> Tensor:
    """Return which boxes (n, 4) are at least this wide and high, bool (n,); boxes with NaN are not."""
    return (boxes[:, 2:] - boxes[:, :2] >= min_side).all(1)
