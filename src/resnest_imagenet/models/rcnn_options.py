"""The options of a detector; the defaults are those of the paper's Tables 5 and 6."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from resnest_imagenet.errors import ConfigError
from resnest_imagenet.models.features import Norm

BoxWeights = tuple[float, float, float, float]

# By stage: the lowest IoU of a positive box, and the weights of its four differences (dx, dy, dw, dh).
PLAIN_STAGES: tuple[tuple[float, BoxWeights], ...] = ((0.5, (10.0, 10.0, 5.0, 5.0)),)
CASCADE_STAGES: tuple[tuple[float, BoxWeights], ...] = (
    *PLAIN_STAGES,
    (0.6, (20.0, 20.0, 10.0, 10.0)),
    (0.7, (30.0, 30.0, 15.0, 15.0)),
)


@dataclass(frozen=True)
class RCNNOptions:
    """What `build_rcnn` takes by keyword.

    The defaults are the effective values of the authors' configurations for Tables 5 and 6 (detectron2-ResNeSt,
    configs/COCO-Detection and configs/COCO-InstanceSegmentation, *_syncbn_range-scale_1x and *_syncbn_1x, on the
    defaults of its detectron2/config/defaults.py). Where torchvision's own detectors (torchvision.models.detection)
    differ, their value is given in brackets.

    Attributes:
        cascade: three box stages, as in Cascade R-CNN (arXiv 1712.00726), instead of one.
        masks: a mask for each box, as in Mask R-CNN (arXiv 1703.06870).
        norm: of backbone and heads: "sync" (statistics over all ranks; torch computes these on accelerators only),
            "bn" (each rank's own) or "frozen" (statistics, weights and biases do not change) [frozen].
        head_norm: of feature pyramid, box heads and mask head; None: as `norm`; "none": no norms, and convolutions with
            biases [none].
        freeze_at: number of the backbone's first stages that are not trained; 2: stem and layer1.
        checkpoint_activations: in training, recompute the activations of the backbone's blocks in the backward pass
            instead of keeping them.
        zero_gamma: see `build_model`.
        channels: of the feature pyramid and of the heads' convolutions.
        anchor_sizes: square root of the anchors' area in pixels, one for each level of the pyramid (stride 4 to 64).
        anchor_ratios: heights over widths of the anchors.
        anchors_rounded: whether the anchors' corners are rounded to whole pixels [True].
        rpn_convs: 3x3 convolutions of the proposals' head.
        rpn_ious: an anchor is a negative if its best IoU is below the first, a positive from the second on.
        rpn_samples: anchors of an image that the losses are computed on.
        rpn_positive: largest share of positives among them.
        rpn_beta: smooth L1 loss of proposals: it is quadratic below this difference; 0: an L1 loss [1 / 9].
        candidates: boxes of each level before non-maximum suppression, in training and in evaluation.
        proposals: boxes of an image after it, in training and in evaluation; None: (1000, 1000), of a cascade
            (2000, 1000).
        rpn_nms: IoU from which non-maximum suppression drops the weaker of two proposals of a level.
        aligned: whether pixels have their centres at half coordinates in pooling [False].
        sampling: samples along a side of each pooled cell; 0: as many as pixels [2].
        canonical_size: side in pixels of a box that is pooled from the level of stride 16.
        samples: boxes of an image that the losses are computed on, ground truth included.
        positive: largest share of positives among them.
        stages: IoU and weights of each box stage; None: those of Faster R-CNN or Cascade R-CNN.
        class_agnostic: one box for all classes; None: true in a cascade, which needs it, and false otherwise.
        box_convs, box_fcs, box_width: 3x3 convolutions of a box head, its fully connected layers and their width
            [0, 2, 1024].
        box_beta: as rpn_beta, for the box stages [1 / 9].
        mask_convs: 3x3 convolutions of the mask head.
        min_score: detections have a higher score than this.
        nms: IoU from which non-maximum suppression drops the weaker of two detections of a class.
        detections: largest number of detections of an image.

    Raises:
        ConfigError: for values that do not fit together.
    """

    cascade: bool = False
    masks: bool = False
    norm: Norm = "sync"
    head_norm: Norm | Literal["none"] | None = None
    freeze_at: int = 2
    checkpoint_activations: bool = False
    zero_gamma: bool = True
    channels: int = 256
    anchor_sizes: tuple[float, ...] = (32, 64, 128, 256, 512)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    anchors_rounded: bool = False
    rpn_convs: int = 1
    rpn_ious: tuple[float, float] = (0.3, 0.7)
    rpn_samples: int = 256
    rpn_positive: float = 0.5
    rpn_beta: float = 0.0
    candidates: tuple[int, int] = (2000, 1000)
    proposals: tuple[int, int] | None = None
    rpn_nms: float = 0.7
    aligned: bool = True
    sampling: int = 0
    canonical_size: int = 224
    samples: int = 512
    positive: float = 0.25
    stages: tuple[tuple[float, BoxWeights], ...] | None = None
    class_agnostic: bool | None = None
    box_convs: int = 4
    box_fcs: int = 1
    box_width: int = 1024
    box_beta: float = 0.0
    mask_convs: int = 4
    min_score: float = 0.05
    nms: float = 0.5
    detections: int = 100

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ConfigError(f"norm={self.norm}: {', '.join(get_args(Norm))} are valid")
        if self.head_norm not in (None, "none", *get_args(Norm)):
            raise ConfigError(f"head_norm={self.head_norm}: {', '.join(get_args(Norm))} and none are valid")
        if len(self.anchor_sizes) != 5 or not self.anchor_ratios:
            raise ConfigError("give anchor_sizes a size for each of the 5 levels, and anchor_ratios one ratio or more")
        if self.box_fcs < 1:
            raise ConfigError(f"box_fcs={self.box_fcs}: a box head needs 1 fully connected layer or more")
        if self.max_positives < 1:
            raise ConfigError(
                f"samples={self.samples} leaves no place for a positive: set {math.ceil(1 / self.positive)} or more"
            )
        if self.stages == ():
            raise ConfigError("stages is empty: give 1 or more")
        if self.stages and len(self.stages) > 1 and not self.cascade:
            raise ConfigError(f"{len(self.stages)} stages need cascade=True")
        if self.cascade and self.class_agnostic is False:
            raise ConfigError("a cascade refines one box for all classes: class_agnostic must not be false")

    @property
    def all_stages(self) -> tuple[tuple[float, BoxWeights], ...]:
        """IoU and weights of each box stage."""
        return self.stages or (CASCADE_STAGES if self.cascade else PLAIN_STAGES)

    @property
    def has_one_box(self) -> bool:
        """Whether a box head predicts one box for all classes."""
        return self.cascade if self.class_agnostic is None else self.class_agnostic

    @property
    def num_proposals(self) -> tuple[int, int]:
        """Number of proposals of an image, in training and in evaluation."""
        return self.proposals or ((2000, 1000) if self.cascade else (1000, 1000))

    @property
    def norm_of_heads(self) -> Norm | Literal["none"]:
        """The norm of feature pyramid, box heads and mask head."""
        return self.head_norm or self.norm

    @property
    def max_positives(self) -> int:
        """Largest number of positive boxes of an image; each of them trains a mask."""
        return math.floor(self.samples * self.positive)


def title_detector(cascade: bool, masks: bool) -> str:
    """Return what the papers call a detector: "Faster R-CNN", "Cascade R-CNN", "Mask R-CNN" or "Cascade Mask R-CNN"."""
    return f"{name_detector(cascade, masks).replace('_', ' ').title()} R-CNN"


def name_detector(cascade: bool, masks: bool) -> str:
    """Return the kind of a detector: "faster", "cascade", "mask" or "cascade_mask"."""
    if masks:
        return "cascade_mask" if cascade else "mask"
    return "cascade" if cascade else "faster"
