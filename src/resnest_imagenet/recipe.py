"""The options of recipes: those of every task, and those that a task adds; conf/ has the values."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, WrapValidator, model_validator

from resnest_imagenet.options import (
    IS_PATH,
    Crop,
    Fraction,
    Options,
    Positive,
    Precision,
    Share,
    as_list,
    keep_auto,
)


class EvalOptions(Options):
    """The evaluations during a run."""

    every_epochs: Positive = Field(
        description="Epochs from one evaluation to the next; the last epoch is always evaluated."
    )


class ClassificationEvalOptions(EvalOptions):
    """The evaluations during a run, of images with a class."""

    crop: Crop = Field(description="Side in pixels of the images that the evaluations see.")


class Protocol(Options):
    """How an evaluation shows images to a network; conf/protocol/ has the protocols of each task, with sources."""


class ProtocolOptions(Protocol):
    """How images are resized and cropped in an evaluation."""

    order: Literal["resize_crop", "crop_resize"] = Field(
        description="Resize the short side, then crop; or crop a square, then resize it."
    )
    ratio: Annotated[float, Field(gt=0, le=1)] | None = Field(
        description="Crop over the resized short side; null: crop / (crop + 32)."
    )
    interpolation: Literal["auto", "bilinear", "bicubic"] = Field(
        description="How pixels are resized; auto: bicubic above 256 pixels, else bilinear."
    )
    antialias: bool = Field(description="Average pixels where an image is made smaller.")


class RegionProtocolOptions(Protocol):
    """How scenes are shown to the network, and which of their pixels count.

    See evaluation/regions.py for the steps of each protocol.
    """

    name: Literal["whole", "slide", "centre", "published"] = Field(
        description="Whole scenes, sliding windows, the centre crop, or the published protocol."
    )
    crop: Annotated[int, Field(ge=2)] | None = Field(description="Side of a window in pixels; null: the recipe's crop.")
    base: Positive | None = Field(
        description="Long side in pixels at scale 1; null: the scene's own, with name=published the recipe's."
    )
    scales: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1), BeforeValidator(as_list)] = Field(
        description="Scales at which each scene is seen; the scores are added."
    )
    flip: bool = Field(description="Add the logits of the mirrored scene.")


class BoxProtocolOptions(Protocol):
    """How images are shown to a detector, and which of its detections count."""

    short_side: Positive = Field(description="Short side in pixels to which images are scaled.")
    longest: Positive = Field(description="Largest long side in pixels; an image that would be longer is scaled to it.")
    min_score: Share = Field(description="Detections have a higher score than this.")
    nms: Annotated[float, Field(gt=0, le=1)] = Field(
        description="IoU from which non-maximum suppression drops the weaker of two detections of a class."
    )
    detections: Positive = Field(description="Largest number of detections of an image.")

    @property
    def text(self) -> str:
        """The protocol in words."""
        return (
            f"short side {self.short_side}, long side at most {self.longest}, scores above {self.min_score:g}, "
            f"NMS {self.nms:g}, {self.detections} detections"
        )


class Recipe(Options):
    """How to train, for every task.

    conf/recipe/ has the published recipes and the source of each value.
    """

    # The schemas of `eval` and `protocol` in a run of this task.
    EVAL_OPTIONS: ClassVar[type[EvalOptions]] = EvalOptions
    PROTOCOL: ClassVar[type[Protocol]] = ProtocolOptions

    task: str = Field(description="What is trained: classification, segmentation or detection; the group task sets it.")
    recipe: str = Field(description="Name of the recipe; results are listed under it.")
    epochs: Positive | None = Field(description="Length of the run in epochs; null: train.steps is its length.")
    steps: Positive | None = Field(
        description="Length of the run in steps, in place of epochs; the last epoch may be shorter."
    )
    # At least those of models/batch.py; "auto" only until the task is open.
    batch_size: Annotated[Positive, WrapValidator(keep_auto), PlainSerializer(lambda size: size)] = Field(
        description="Images per rank and forward pass; auto: as many as fit. Then, without train.global_batch, a step "
        "has at most train.reference_batch images and a sixteenth of the training set."
    )
    global_batch: Positive | None = Field(
        description="Images per step, by accumulating gradients; null: train.batch_size times the number of ranks."
    )
    schedule: Literal["cosine", "step", "milestones", "poly"] = Field(
        description="How the learning rate falls after the warm-up."
    )
    step_epochs: Positive | None = Field(description="schedule=step: epochs from one fall of the rate to the next.")
    milestones: Annotated[list[Positive], Field(min_length=1), BeforeValidator(as_list)] | None = Field(
        description="schedule=milestones: the rate falls after these epochs; with train.steps, after these steps."
    )
    step_factor: Annotated[float, Field(gt=0, lt=1)] = Field(
        description="schedule=step or milestones: factor on the rate at each fall."
    )
    poly_power: Annotated[float, Field(gt=0)] = Field(
        description="schedule=poly: power of the share of the run that remains."
    )
    lr: Annotated[float, Field(gt=0)] = Field(
        description="Peak learning rate at train.reference_batch images per step; scaled linearly for others."
    )
    reference_batch: Positive = Field(description="Images per step for which train.lr is meant.")
    head_lr_factor: Annotated[float, Field(gt=0)] = Field(description="Factor on the learning rate of the head.")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        description="Factor on the learning rate from each stage to the one before it: head, layer4, ..., layer1, stem."
    )
    warmup_epochs: Annotated[float, Field(ge=0)] | None = Field(
        description="Length of the warm-up in epochs; null: train.warmup_steps is its length."
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        description="Length of the warm-up in steps, in place of train.warmup_epochs."
    )
    warmup_start: Share = Field(description="Share of the peak rate at which the warm-up begins.")
    optimizer: Literal["sgd", "adamw", "lamb"] = Field(description="What updates the weights.")
    momentum: Fraction = Field(description="optimizer=sgd: momentum.")
    nesterov: bool = Field(description="optimizer=sgd: Nesterov's momentum.")
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = Field(
        description="optimizer=adamw or lamb: decay of the two moments."
    )
    eps: Annotated[float, Field(gt=0)] = Field(description="optimizer=adamw or lamb: added to the denominator.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        description="Weight decay of the weights of convolutions and fc."
    )
    decay_biases: bool = Field(description="Weight decay of the biases of convolutions and fc too.")
    decay_all: bool = Field(description="Weight decay of every parameter.")
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        description="Largest norm of all gradients together; null: no limit."
    )
    clip_value: Annotated[float, Field(gt=0)] | None = Field(
        description="Largest absolute value in a gradient; null: no limit."
    )
    init_from: Annotated[str, Field(min_length=1), IS_PATH] | None = Field(
        description="Weights to start from: a file, official:NAME or timm:NAME; other classes get a new head."
    )
    ema_decay: Fraction | None = Field(
        description="Decay per step of the moving average of the weights; null: none is kept."
    )
    ema_warmup: bool = Field(
        description="Warm up the moving average: after n steps its decay is at most (1 + n) / (10 + n)."
    )
    patience: Positive | None = Field(
        description="End the run after this many evaluations in a row without a new best; null: at its full length."
    )
    precision: Precision
    compile: bool = Field(description="Compile the network with torch.compile.")
    deterministic: bool = Field(description="Add in a fixed order on CUDA too: the same bits each time, but slower.")
    max_skipped_steps: Annotated[int, Field(ge=0)] = Field(
        description="How many steps may be skipped for a loss or gradient that is not finite."
    )

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        _check_pair("epochs", self.epochs, "steps", self.steps)
        _check_pair("warmup_epochs", self.warmup_epochs, "warmup_steps", self.warmup_steps)
        if self.clip_norm is not None and self.clip_value is not None:
            raise ValueError(f"give either train.clip_norm={self.clip_norm} or train.clip_value={self.clip_value}")
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("train.nesterov=true needs train.momentum > 0")
        if self.ema_warmup and self.ema_decay is None:
            raise ValueError("train.ema_warmup=true needs a moving average: set train.ema_decay, 0.999 for example")
        self._check_schedule()
        return self

    def check_start(self) -> None:
        """Raise a ValueError for options that need a trained network, if training starts from scratch."""
        if self.layer_decay < 1 and self.init_from is None:
            raise ValueError(
                f"train.layer_decay={self.layer_decay} is for a network that is trained already: set train.init_from "
                "to official:NAME, timm:NAME, a file or a run folder, or train.layer_decay=1"
            )

    def _check_schedule(self) -> None:
        """Refuse lengths that do not fit, if both are in epochs or both in steps; `plan_steps` refuses the others."""
        for schedule, name, form in (("step", "step_epochs", "..."), ("milestones", "milestones", "[...]")):
            value = getattr(self, name)
            if schedule == self.schedule and value is None:
                raise ValueError(f"train.schedule={self.schedule} needs train.{name}={form}")
            if schedule != self.schedule and value is not None:
                raise ValueError(
                    f"train.{name}={value} is for train.schedule={schedule}, not {self.schedule}: set one or the other"
                )
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


# Options of several tasks.
ZeroGamma = Annotated[bool, Field(description="Start the last norm of each block with weight 0.")]
Norm = Annotated[
    Literal["bn", "sync", "frozen"],
    Field(description="Norms with each rank's statistics, all ranks' (on accelerators), or those of train.init_from."),
]


Colour = Annotated[list[Share], Field(min_length=3, max_length=3)]


class ClassificationRecipe(Recipe):
    """How to train a classification network, as in the paper's Table 3."""

    EVAL_OPTIONS: ClassVar[type[EvalOptions]] = ClassificationEvalOptions

    crop: Crop = Field(description="Side in pixels of the training images.")
    min_crop_area: Annotated[float, Field(gt=0, le=1)] = Field(
        description="Smallest random crop, as a share of the image's area."
    )
    cropping: Literal["random_resized", "erandom"] = Field(
        description="How the random crop is drawn: torchvision's RandomResizedCrop, or ERandomCrop."
    )
    antialias: bool = Field(description="Average pixels where the crop is made smaller.")
    interpolation: Literal["bilinear", "bicubic"] = Field(description="How the crop is resized.")
    policy: Literal["resnest", "resnest_torch", "autoaugment", "randaugment", "trivialaugment", "rotation"] | None = (
        Field(description="Operations on the whole image, before the crop; null: none.")
    )
    jitter: Share = Field(description="Largest change of brightness, contrast and saturation, as a share; 0: none.")
    lighting: Annotated[float, Field(ge=0)] = Field(
        description="Standard deviation of the noise along the principal colours (PCA); 0: none."
    )
    pixel_shift: Annotated[float, Field(ge=0, le=255)] = Field(
        description="Largest value, of 255, by which all pixels of an image are shifted; 0: none."
    )
    flips: Literal["none", "horizontal", "vertical", "both"] = Field(
        description="Directions in which images are mirrored, each with probability 1/2."
    )
    erasing: Share = Field(description="Probability that a random rectangle of an image gets the mean colour.")
    mean: Colour | None = Field(
        description="Mean of red, green and blue in 0..1, which is subtracted from each pixel; null: ImageNet's."
    )
    std: Colour | None = Field(
        description="Standard deviation of red, green and blue in 0..1, which divides each pixel; null: ImageNet's."
    )
    class_weights: Literal["balanced"] | None = Field(
        description="balanced: an image counts by the inverse of its class's number of images; null: all alike."
    )
    label_smoothing: Fraction = Field(description="Share of the target that is spread over all classes.")
    mixup_alpha: Annotated[float, Field(ge=0)] = Field(
        description="Parameter of mixup's Beta distribution; 0: no mixup."
    )
    cutmix_alpha: Annotated[float, Field(ge=0)] = Field(
        description="Parameter of CutMix's Beta distribution; 0: none. With mixup, half of the batches have either."
    )
    mixup_per_sample: bool = Field(description="Draw a mixup weight for each image, not for each batch.")
    mixup_partner: Literal["reversed", "permuted"] = Field(
        description="Image of the batch that an image is mixed with: the one at the mirrored place, or a random one."
    )
    dropout: Fraction = Field(description="Dropout before fc.")
    dropblock: Fraction = Field(description="Probability of DropBlock in the last epoch; it rises linearly from 0.")
    drop_path: Fraction = Field(
        description="Probability of skipping the last residual block for an image; from the first on it rises linearly."
    )
    freeze: Annotated[int, Field(ge=0, le=5)] = Field(
        description="Number of first stages that are not trained: 1: the stem, 2: layer1 too, ..., 5: all but fc."
    )
    init: Literal["fan_in", "fan_out"] = Field(
        description="Whether convolutions start with variance 2 / fan_in or 2 / fan_out."
    )
    zero_gamma: ZeroGamma

    @model_validator(mode="after")
    def _check_dropblock(self) -> "ClassificationRecipe":
        if self.dropblock > 0 and self.epochs is None:
            raise ValueError(f"train.dropblock={self.dropblock} rises by epoch: give train.epochs=..., not train.steps")
        return self

    def check_start(self) -> None:
        super().check_start()
        if self.freeze and self.init_from is None:
            raise ValueError(f"train.freeze={self.freeze} would keep random weights: set train.init_from")

    @model_validator(mode="after")
    def _check_std(self) -> "ClassificationRecipe":
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"train.std={self.std}: must be above 0")
        return self


class SegmentationRecipe(Recipe):
    """How to train a segmentation network, as in the paper's Table 7."""

    PROTOCOL: ClassVar[type[Protocol]] = RegionProtocolOptions

    crop: Crop = Field(description="Side in pixels of the training crops.")
    base: Positive = Field(description="Long side in pixels of a scene at scale 1.")
    scales: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2, max_length=2)] = Field(
        description="Smallest and largest random scale of a scene."
    )
    blur: Share = Field(description="Probability of a Gaussian blur with a radius of up to one pixel.")
    output_stride: Literal[8, 16, 32] = Field(
        description="Stride of the backbone's last layer; below 32 its convolutions are dilated."
    )
    rates: Annotated[list[Positive], Field(min_length=1)] = Field(
        description="Dilations of the head's 3x3 convolutions."
    )
    head_channels: Positive = Field(description="Channels of the head.")
    auxiliary_weight: Annotated[float, Field(ge=0)] = Field(
        description="Weight of the loss on layer3; 0: no auxiliary head."
    )
    norm: Norm
    zero_gamma: ZeroGamma

    @model_validator(mode="after")
    def _check_scales(self) -> "SegmentationRecipe":
        if self.scales[0] > self.scales[1]:
            raise ValueError(f"train.scales={self.scales} must be the smallest and the largest")
        return self


class DetectionRecipe(Recipe):
    """How to train a detector, as in the paper's Tables 5 and 6.

    The options of the network are those of `RCNNOptions`.
    """

    PROTOCOL: ClassVar[type[Protocol]] = BoxProtocolOptions

    short_sides: Annotated[list[Positive], Field(min_length=1), BeforeValidator(as_list)] = Field(
        description="Short sides in pixels to which training images are scaled."
    )
    side_sampling: Literal["range", "choice"] = Field(
        description="choice: one of train.short_sides; range: any number from the first to the last."
    )
    longest: Positive = Field(description="Largest long side in pixels; an image that would be longer is scaled to it.")
    cascade: bool = Field(description="Cascade R-CNN: three stages of boxes.")
    masks: bool = Field(description="Mask R-CNN: a mask for each box.")
    norm: Norm
    head_norm: Literal["bn", "sync", "frozen", "none"] | None = Field(
        description="Norms of the feature pyramid and the heads; null: as train.norm."
    )
    freeze_at: Annotated[int, Field(ge=0, le=5)] = Field(
        description="First stages of the backbone that are not trained; 2: stem and layer1."
    )
    checkpoint_activations: bool = Field(
        description="Recompute activations in the backward pass: slower, with a third to half less memory."
    )
    zero_gamma: ZeroGamma
    channels: Positive = Field(description="Channels of the feature pyramid and of the heads' convolutions.")
    anchor_sizes: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=5, max_length=5)] = Field(
        description="Sides of the anchors in pixels, at strides 4, 8, 16, 32 and 64."
    )
    anchors_rounded: bool = Field(description="Round the corners of anchors; torchvision: true.")
    aligned: bool = Field(description="Pooled pixels have their centres at half pixels; torchvision: false.")
    sampling: Annotated[int, Field(ge=0)] = Field(
        description="Samples along a side of a pooled cell; 0: as many as pixels; torchvision: 2."
    )
    rpn_convs: Positive = Field(
        description="3x3 convolutions of the proposals' head; torchvision's second versions: 2."
    )
    canonical_size: Positive = Field(description="Side in pixels of a box that is pooled from the level of stride 16.")
    candidates: Annotated[list[Positive], Field(min_length=2, max_length=2)] = Field(
        description="Boxes of a level before the suppression of proposals: in training, in evaluation."
    )
    proposals: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = Field(
        description="Boxes of an image after the suppression; null: [1000, 1000], of a cascade [2000, 1000]."
    )
    samples: Positive = Field(description="Boxes of an image that the heads are trained on.")
    class_agnostic: bool | None = Field(
        description="One box for all classes, not one for each; null: in a cascade alone, which needs it."
    )
    box_convs: Annotated[int, Field(ge=0)] = Field(description="3x3 convolutions of the box head.")
    box_fcs: Positive = Field(description="Fully connected layers of the box head.")
    box_width: Positive = Field(description="Width of the box head's fully connected layers.")
    mask_convs: Annotated[int, Field(ge=0)] = Field(description="3x3 convolutions of the mask head.")
    precise_batches: Annotated[int, Field(ge=0)] = Field(
        description="Training batches from which the norms' statistics are computed before an evaluation; 0: none."
    )

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
