"""Recipes: what a run reads of one whatever it trains, and what each task adds; conf/ has the values."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from resnest_imagenet.options import IS_PATH, Crop, Fraction, Options, Positive, Precision, Share, as_list


class EvalOptions(Options):
    """The evaluations during a run."""

    every_epochs: Positive  # the last epoch is evaluated too


class ClassificationEvalOptions(EvalOptions):
    """The same of images with a class."""

    crop: Crop


class Protocol(Options):
    """How an evaluation shows images to a network; conf/protocol/ has those of each task, with their sources."""


class ProtocolOptions(Protocol):
    """How images are brought to the crop."""

    order: Literal["resize_crop", "crop_resize"]
    ratio: Annotated[float, Field(gt=0, le=1)] | None  # crop over the short side; null: crop / (crop + 32)
    interpolation: Literal["auto", "bilinear", "bicubic"]  # auto: bicubic above 256 pixels, else bilinear
    antialias: bool


class RegionProtocolOptions(Protocol):
    """How scenes are shown, and their pixels scored (evaluation/regions.py)."""

    name: Literal["whole", "slide", "centre", "published"]
    crop: Annotated[int, Field(ge=2)] | None  # side of a window; null: the recipe's crop
    base: Positive | None  # long side at scale 1; null: the recipe's for published, else the scene's own size
    scales: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1), BeforeValidator(as_list)]
    flip: bool  # the logits of the mirrored scene are added


class BoxProtocolOptions(Protocol):
    """How images are shown to a detector, and which of its detections count."""

    short_side: Positive  # in pixels
    longest: Positive  # bound of the long side in pixels; an image that would be longer is scaled to it
    min_score: Share  # detections have a higher score
    nms: Annotated[float, Field(gt=0, le=1)]  # IoU from which a detection is dropped for a better one of its class
    detections: Positive  # at most so many of an image

    @property
    def text(self) -> str:
        """How images are shown and detections chosen, in words."""
        return (
            f"short side {self.short_side}, long side at most {self.longest}, scores above {self.min_score:g}, "
            f"NMS {self.nms:g}, {self.detections} detections"
        )


class Recipe(Options):
    """How to train; conf/recipe/ has the published recipes and the source of each value."""

    # What `eval` and `protocol` have in a run of this task.
    EVAL_OPTIONS: ClassVar[type[EvalOptions]] = EvalOptions
    PROTOCOL: ClassVar[type[Protocol]] = ProtocolOptions

    task: str  # what is trained
    recipe: str  # its name: results stand under it
    epochs: Positive | None  # either: the length of the run, and the unit of `milestones`
    steps: Positive | None  # or; the last epoch may then be shorter
    batch_size: Positive  # images per rank and forward pass; a network may need more (models/batch.py)
    global_batch: Positive | None  # images per step; null: batch_size * ranks
    schedule: Literal["cosine", "step", "milestones", "poly"]
    step_epochs: Positive | None  # schedule=step: the rate is multiplied by step_factor every so many epochs
    # schedule=milestones: the rate is multiplied by step_factor after so many epochs, or steps where `steps` is given.
    milestones: Annotated[list[Positive], Field(min_length=1), BeforeValidator(as_list)] | None
    step_factor: Annotated[float, Field(gt=0, lt=1)]
    poly_power: Annotated[float, Field(gt=0)]  # schedule=poly
    lr: Annotated[float, Field(gt=0)]  # peak learning rate for reference_batch images per step, scaled linearly
    reference_batch: Positive
    head_lr_factor: Annotated[float, Field(gt=0)]  # of the rate, for a head that is new
    warmup_epochs: Annotated[float, Field(ge=0)] | None  # either
    warmup_steps: Annotated[int, Field(ge=0)] | None  # or
    warmup_start: Share  # the share of the rate that the warm-up begins with
    optimizer: Literal["sgd", "adamw", "lamb"]
    momentum: Fraction  # optimizer=sgd
    nesterov: bool  # optimizer=sgd
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)]  # optimizer=adamw and lamb
    eps: Annotated[float, Field(gt=0)]  # optimizer=adamw and lamb
    weight_decay: Annotated[float, Field(ge=0)]  # of convolution and fc weights
    decay_biases: bool  # of their biases too
    decay_all: bool  # of every parameter
    clip_norm: Annotated[float, Field(gt=0)] | None  # the largest norm of all gradients together
    clip_value: Annotated[float, Field(gt=0)] | None  # the largest absolute value in a gradient
    # Weights to start from, with a new head where the classes are others.
    init_from: Annotated[str, Field(min_length=1), IS_PATH] | None
    ema_decay: Fraction | None  # per step; null: no moving average
    precision: Precision
    compile: bool
    deterministic: bool  # on CUDA too: kernels that add in a fixed order
    # With a loss or gradient that is not finite; 0: the first ends the run.
    max_skipped_steps: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        _check_pair("epochs", self.epochs, "steps", self.steps)
        _check_pair("warmup_epochs", self.warmup_epochs, "warmup_steps", self.warmup_steps)
        if self.clip_norm is not None and self.clip_value is not None:
            raise ValueError(f"give either train.clip_norm={self.clip_norm} or train.clip_value={self.clip_value}")
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("train.nesterov=true needs train.momentum > 0")
        self._check_schedule()
        return self

    def _check_schedule(self) -> None:
        """Refuse what is too long, as far as both are counted in the same; `plan_steps` refuses the rest."""
        needed = {"step": ("step_epochs", "..."), "milestones": ("milestones", "[...]")}
        name, form = needed.get(self.schedule, ("schedule", ""))
        if getattr(self, name) is None:
            raise ValueError(f"train.schedule={self.schedule} needs train.{name}={form}")
        unit = "epochs" if self.steps is None else "steps"
        length, warmup = getattr(self, unit), getattr(self, f"warmup_{unit}")
        if warmup is not None and warmup >= length:
            raise ValueError(f"train.warmup_{unit}={warmup} must be less than train.{unit}={length}")
        if self.schedule == "step" and (self.warmup_epochs or 0) >= (self.step_epochs or 0):
            raise ValueError(f"train.warmup_epochs={self.warmup_epochs} outlasts train.step_epochs={self.step_epochs}")
        if self.schedule == "milestones" and self.milestones:
            if self.milestones != sorted(set(self.milestones)):
                raise ValueError(f"train.milestones={self.milestones} must rise")
            if self.milestones[-1] >= length:
                raise ValueError(f"train.milestones={self.milestones} must be less than train.{unit}={length}")
            if warmup is not None and warmup >= self.milestones[0]:
                raise ValueError(f"train.warmup_{unit}={warmup} outlasts train.milestones={self.milestones}")


def _check_pair(name: str, value: float | None, other: str, other_value: float | None) -> None:
    if value is None and other_value is None:
        raise ValueError(f"give train.{name}=... or train.{other}=...")
    if value is not None and other_value is not None:
        raise ValueError(f"train.{name}={value} and train.{other}={other_value}: set one of them to null")


class ClassificationRecipe(Recipe):
    """How to train images to classes, as in the paper's Table 3."""

    EVAL_OPTIONS: ClassVar[type[EvalOptions]] = ClassificationEvalOptions

    crop: Crop
    min_crop_area: Annotated[float, Field(gt=0, le=1)]  # smallest random crop, as a share; ERandomCrop's own is .1
    cropping: Literal["random_resized", "erandom"]
    antialias: bool  # of the crop's resize
    interpolation: Literal["bilinear", "bicubic"]  # of the same
    # Operations on the whole image, before the crop; null: none.
    policy: Literal["resnest", "resnest_torch", "autoaugment", "randaugment", "trivialaugment", "rotation"] | None
    jitter: Share  # brightness, contrast and saturation, each by up to this factor
    lighting: Annotated[float, Field(ge=0)]  # standard deviation of the weights of the principal colours
    pixel_shift: Annotated[float, Field(ge=0, le=255)]  # bound of what is added to all pixels of an image, of 255
    erasing: Share  # probability of a random rectangle of mean colour in an image
    label_smoothing: Fraction
    mixup_alpha: Annotated[float, Field(ge=0)]  # 0: no mixup
    cutmix_alpha: Annotated[float, Field(ge=0)]  # 0: no CutMix; with mixup, half of the batches have either
    mixup_per_sample: bool  # a weight for each image, otherwise one per batch, as CutMix always has
    mixup_partner: Literal["reversed", "permuted"]  # of the image, in its batch; CutMix's too
    dropout: Fraction  # before fc
    dropblock: Fraction  # probability in the last epoch, rising linearly; 0: no DropBlock
    init: Literal["fan_in", "fan_out"]
    zero_gamma: bool

    @model_validator(mode="after")
    def _check_dropblock(self) -> "ClassificationRecipe":
        if self.dropblock > 0 and self.epochs is None:
            raise ValueError(f"train.dropblock={self.dropblock} rises by epoch: give train.epochs=..., not train.steps")
        return self


class SegmentationRecipe(Recipe):
    """How to train scenes to a class for each pixel, as in the paper's Table 7."""

    PROTOCOL: ClassVar[type[Protocol]] = RegionProtocolOptions

    crop: Crop
    base: Positive  # the long side of a scene that is scaled by 1, in pixels
    scales: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2, max_length=2)]  # smallest and largest
    blur: Share  # probability of a Gaussian blur with a radius of up to one pixel
    output_stride: Literal[8, 16, 32]  # of the backbone
    rates: Annotated[list[Positive], Field(min_length=1)]  # dilations of the head's 3x3 convolutions
    head_channels: Positive
    auxiliary_weight: Annotated[float, Field(ge=0)]  # of the loss on layer3; 0: no auxiliary head
    # sync: statistics over all ranks; alone and on CPUs each rank's own. frozen: those of the weights to start from.
    norm: Literal["bn", "sync", "frozen"]
    zero_gamma: bool

    @model_validator(mode="after")
    def _check_scales(self) -> "SegmentationRecipe":
        if self.scales[0] > self.scales[1]:
            raise ValueError(f"train.scales={self.scales} must be the smallest and the largest")
        return self


class DetectionRecipe(Recipe):
    """How to train a detector, as in the paper's Tables 5 and 6; options of the network are `RCNNOptions`."""

    PROTOCOL: ClassVar[type[Protocol]] = BoxProtocolOptions

    short_sides: Annotated[list[Positive], Field(min_length=1), BeforeValidator(as_list)]  # of an image, in pixels
    side_sampling: Literal["range", "choice"]  # any whole number from the first to the last of them, or one of them
    longest: Positive  # bound of the long side in pixels; an image that would be longer is scaled to it
    cascade: bool
    masks: bool
    # sync: statistics over all ranks; alone and on CPUs each rank's own. frozen: those of the weights to start from.
    norm: Literal["bn", "sync", "frozen"]
    head_norm: Literal["bn", "sync", "frozen", "none"] | None  # null: as norm
    freeze_at: Annotated[int, Field(ge=0, le=5)]
    checkpoint_activations: bool  # of the backbone's blocks: computed again in the backward pass, in place of kept
    zero_gamma: bool
    channels: Positive
    anchor_sizes: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=5, max_length=5)]
    # torchvision's own values of the next three, and of rpn_convs in its second versions: true, false, 2 and 2.
    anchors_rounded: bool
    aligned: bool
    sampling: Annotated[int, Field(ge=0)]
    rpn_convs: Positive
    canonical_size: Positive
    # Boxes of a level before the non-maximum suppression of proposals, and of an image after it: training, evaluation.
    candidates: Annotated[list[Positive], Field(min_length=2, max_length=2)]
    proposals: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None  # null: as in the paper
    samples: Positive
    box_convs: Annotated[int, Field(ge=0)]
    box_fcs: Positive
    box_width: Positive
    mask_convs: Annotated[int, Field(ge=0)]
    # Before an evaluation the norms' statistics are replaced by their mean over so many batches of training; 0: not.
    precise_batches: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _check_sides(self) -> "DetectionRecipe":
        if self.short_sides != sorted(set(self.short_sides)):
            raise ValueError(f"train.short_sides={self.short_sides} must rise")
        if self.side_sampling == "range" and len(self.short_sides) != 2:
            raise ValueError(
                f"train.short_sides={self.short_sides}: side_sampling=range takes the least and the largest"
            )
        return self

    @model_validator(mode="after")
    def _check_compile(self) -> "DetectionRecipe":
        # Sizes change with each image and its objects; torch 2.13 also fails at the mask head's transposed convolution.
        if self.compile:
            raise ValueError("train.compile=true: torch does not compile a detector's step: set train.compile=false")
        return self


# The options whose names have changed, with their new names.
RENAMED = {"lr_per_256": "lr"}
# What a run had before there were options for it.
_BEFORE: dict[str, Any] = {
    "task": "classification",
    "steps": None,
    "milestones": None,
    "poly_power": 0.9,
    "reference_batch": 256,
    "head_lr_factor": 1.0,
    "warmup_steps": None,
    "warmup_start": 0.0,
    "optimizer": "sgd",
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "decay_biases": False,
    "clip_norm": None,
    "clip_value": None,
    "deterministic": False,
}


def upgrade_recipe(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's values under today's names, complete with those that an earlier version implied.

    Args:
        training: what a checkpoint, a results file or a config.yaml has as "train", of any version; may lack values.
    """
    return {**_BEFORE, **{RENAMED.get(name, name): value for name, value in training.items()}}


def upgrade_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Do the same for what a run's identity has of its recipe, by option name: "train.lr"."""
    training = {name.partition(".")[2]: value for name, value in identity.items() if name.startswith("train.")}
    others = {name: value for name, value in identity.items() if not name.startswith("train.")}
    return {**others, **{f"train.{name}": value for name, value in upgrade_recipe(training).items()}}
