"""What a network costs: counted, not timed."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from resnest_imagenet.models.deeplab import build_deeplab
from resnest_imagenet.models.features import STAGES
from resnest_imagenet.models.zoo import build_model, find_head


@dataclass(frozen=True)
class StageCost:
    """What one stage of a network costs, for one image.

    Attributes:
        stage: "stem" (to the max pool), "layer1" to "layer4", or "head". A network without these stages has one for
            each of its modules, and "other" for what is in no module.
        output: shape of its output, (channels, height, width) or (classes,); () for "other".
        parameters: number of parameters.
        multiply_adds: of convolutions and fc, plus one for each activation that a BN scales and shifts: the paper's
            "FLOPs".
        activations: elements of the outputs of all convolutions, counted as in pycls' model zoo (Radosavovic et al.
            2020, "Designing Network Design Spaces").
    """

    stage: str
    output: tuple[int, ...]
    parameters: int
    multiply_adds: int
    activations: int


def count_cost(name: str, crop: int, num_classes: int = 1000) -> tuple[int, int]:
    """Return the parameters of a network, and its multiply-adds for one image (the paper's "FLOPs").

    Args:
        name: one of `list_models()`.
        crop: side of the image in pixels.
        num_classes: width of the logits.
    """
    stages = count_stages(name, crop, num_classes)
    return sum(stage.parameters for stage in stages), sum(stage.multiply_adds for stage in stages)


def count_stages(name: str, crop: int, num_classes: int = 1000) -> list[StageCost]:
    """Return the cost of each stage, in order. Nothing is allocated.

    Args:
        name: one of `list_models()`.
        crop: side of the image in pixels.
        num_classes: width of the logits.
    """
    with torch.device("meta"):
        model = build_model(name, num_classes).eval()
    return _count_stages(model, find_head(name), torch.empty(1, 3, crop, crop, device="meta"))


def count_deeplab(name: str, num_classes: int, crop: int, **options: Any) -> list[StageCost]:
    """Return the cost of a DeepLabV3's backbone, head and auxiliary head (which runs in training only).

    Args:
        name: of the backbone, one of `list_models()`.
        num_classes: width of the logits.
        crop: side of the image in pixels.
        options: further options of `build_deeplab`.
    """
    with torch.device("meta"):
        model = build_deeplab(name, num_classes, **options).eval()
    images = torch.empty(1, 3, crop, crop, device="meta")
    return [cost for cost in _count_stages(model, "", images) if cost.stage != "other"]


def count_rcnn(
    name: str, num_classes: int, size: tuple[int, int], num_boxes: int = 1000, num_masks: int = 100, **options: Any
) -> list[StageCost]:
    """Return the cost of a detector's backbone, feature pyramid, proposals' head, box heads and mask head, per image.

    Args:
        name: of the backbone, one of `list_models()`.
        num_classes: of the data set.
        size: (height, width) of the image with its padding, in pixels.
        num_boxes: proposals, which each stage of boxes looks at.
        num_masks: detections, whose masks the mask head draws, if there is one.
        options: of `RCNNOptions`.
    """
    with torch.device("meta"):
        model = _FixedBoxes(name, num_classes, num_boxes, num_masks, options).eval()
    images = torch.empty(1, 3, *size, device="meta")
    return [cost for cost in _count_stages(model, "", images) if cost.stage != "other"]


class _FixedBoxes(nn.Module):
    """A detector's parts, on a given number of boxes: what lies in them changes no cost."""

    def __init__(self, name: str, num_classes: int, num_boxes: int, num_masks: int, options: dict[str, Any]) -> None:
        from resnest_imagenet.models.boxes import BOX_SIDE  # torchvision takes seconds to import
        from resnest_imagenet.models.masks import POOLED_SIDE
        from resnest_imagenet.models.rcnn import build_rcnn

        super().__init__()
        detector = build_rcnn(name, num_classes, **options)
        heads, channels = detector.roi_heads, detector.roi_heads.options.channels
        self.backbone, self.fpn, self.rpn = detector.backbone, detector.fpn, detector.rpn.head
        self.boxes, self.masks = _Stages(*heads.stages), heads.masks
        self._of_boxes = (num_boxes, channels, BOX_SIDE, BOX_SIDE)
        self._of_masks = (num_masks, channels, POOLED_SIDE, POOLED_SIDE)

    def forward(self, images: Tensor) -> list[Any]:
        levels = self.fpn(dict(zip(self.backbone.names, self.backbone(images), strict=True)))
        outputs = [self.rpn(list(levels.values())), self.boxes(images.new_empty(self._of_boxes))]
        return outputs if self.masks is None else [*outputs, self.masks(images.new_empty(self._of_masks))]


class _Stages(nn.Sequential):
    """Several modules on the same input."""

    def forward(self, x: Tensor) -> list[Any]:
        return [stage(x) for stage in self]


def _count_stages(model: nn.Module, head: str, images: Tensor) -> list[StageCost]:
    """Return the cost of each stage of a network on the meta device; `head` is not counted as a convolution."""
    normalised: Counter[str] = Counter()
    counting = _Counting()
    outputs: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        is_norm = isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)

        def see(
            module: nn.Module, inputs: tuple[Tensor], output: Tensor, path: str = path, is_norm: bool = is_norm
        ) -> None:
            outputs[path] = tuple(output.shape[1:]) if isinstance(output, Tensor) else ()
            if is_norm:
                normalised[path.partition(".")[0]] += inputs[0].numel()

        module.register_forward_hook(see)
        if is_norm:
            # A norm keeps the shape, and torch's rules for it on the meta device take half of all time. The network is
            # this function's caller's own, made to be counted.
            module.forward = nn.Identity().forward
    for name, child in model.named_children():
        child.register_forward_pre_hook(partial(counting.enter, name))
        child.register_forward_hook(counting.leave)
    with torch.no_grad(), counting:
        model(images)
    parameters: Counter[str] = Counter()
    for path, parameter in model.named_parameters():
        parameters[path.rpartition(".")[0].partition(".")[0]] += parameter.numel()
    return [
        StageCost(
            stage,
            outputs.get(parts[-1], ()),
            sum(parameters[part] for part in parts),
            sum(counting.multiplied[part] + normalised[part] for part in parts),
            sum(counting.convolved[part] for part in parts if part != head),
        )
        for stage, parts in _list_stages(model, head).items()
    ]


def _list_stages(model: nn.Module, head: str) -> dict[str, tuple[str, ...]]:
    """Return the modules of each stage; if the modules are not named as a ResNet's, each one is a stage."""
    stages = {**STAGES, "head": (head,)}
    parts = {part for of_stage in stages.values() for part in of_stage}
    children = [name for name, _ in model.named_children()]
    weighty = {name.partition(".")[0] for name, _ in model.named_parameters()}
    if weighty <= parts <= set(children):
        return stages
    return {**{name: (name,) for name in children}, "other": ("",)}


def count_kept(name: str, crop: int, batch_size: int) -> int:
    """Return the bytes that a training step's forward pass saves for the backward pass, on a CPU.

    A GPU keeps about a sixth more of a ResNeSt: there no activation is recomputed (models/rectified.py).

    Counts each storage that autograd saves once, without the network's own: activations, the images, and under
    autocast its copies of the weights. The pass runs on fake tensors (`FakeTensorMode`), so little is allocated.

    Args:
        name: one of `list_models()`, with 1000 classes.
        crop: side of the images in pixels.
        batch_size: at least `smallest_batch`.
    """
    return _count_kept(partial(build_model, name), (crop, crop), batch_size, lambda logits: None)


def count_kept_deeplab(name: str, num_classes: int, crop: int, batch_size: int, **options: Any) -> int:
    """Return the bytes that a DeepLabV3's forward pass and cross entropy save for the backward pass; see `count_kept`.

    Args:
        name: of the backbone, one of `list_models()`.
        num_classes: width of the logits.
        crop: side of the images in pixels.
        batch_size: at least `smallest_batch`.
        options: further options of `build_deeplab`.
    """

    def compare(logits: Tensor | tuple[Tensor, Tensor]) -> object:
        of_heads = logits if isinstance(logits, tuple) else (logits,)
        masks = torch.zeros(batch_size, crop, crop, dtype=torch.int64)
        return [F.cross_entropy(of_head, masks) for of_head in of_heads]

    return _count_kept(partial(build_deeplab, name, num_classes, **options), (crop, crop), batch_size, compare)


def count_kept_rcnn(name: str, num_classes: int, size: tuple[int, int], batch_size: int, **options: Any) -> int:
    """Return the bytes that a detector's forward pass leaves for the backward pass, as `count_kept` does.

    Every image has as many sampled boxes and positives as it may have. What the losses keep, some MB, is not counted.

    Args:
        name: of the backbone, one of `list_models()`.
        num_classes: of the data set.
        size: (height, width) of the images with their padding, in pixels.
        batch_size: of images.
        options: of `RCNNOptions`.
    """
    from resnest_imagenet.models.rcnn_options import RCNNOptions

    settings = RCNNOptions(**options)
    numbers = batch_size * settings.samples, batch_size * settings.max_positives
    build = partial(_FixedBoxes, name, num_classes, *numbers, options)
    return _count_kept(build, size, batch_size, lambda outputs: None)


def _count_kept(
    build: Callable[[], nn.Module], size: tuple[int, int], batch_size: int, compare: Callable[[Any], object]
) -> int:
    """Return the bytes that autograd saves while a network runs and `compare` turns its outputs into losses."""
    storages: set[torch.UntypedStorage] = set()

    def keep(tensor: Tensor) -> Tensor:
        storages.add(tensor.untyped_storage())
        return tensor

    with FakeTensorMode():
        model = build()
        images = torch.empty(batch_size, 3, *size).contiguous(memory_format=torch.channels_last)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            compare(model(images))
    storages -= {tensor.untyped_storage() for tensor in model.state_dict().values()}
    return sum(storage.nbytes() for storage in storages)


_CONVOLUTION = torch.ops.aten.convolution
# Products of matrices, by the place of the first factor among the arguments.
_PRODUCTS = {torch.ops.aten.mm: 0, torch.ops.aten.bmm: 0, torch.ops.aten.addmm: 1, torch.ops.aten.baddbmm: 1}
# The operators that compute convolutions: a 1x1 convolution of a single pixel is computed as a product of matrices.
_CONVOLVING = {_CONVOLUTION, torch.ops.aten.addmm, torch.ops.aten.bmm}


class _Counting(TorchDispatchMode):
    """Counts multiply-adds and convolutions' outputs of each child of a network; under "" what is in no child.

    torch's FlopCounterMode counts the same, but it imports torch's compiler, which takes as long as torch itself. For
    an attention's fused operator, which no network of the zoo has, its formula is used.
    """

    def __init__(self) -> None:
        super().__init__()
        self.multiplied: Counter[str] = Counter()
        self.convolved: Counter[str] = Counter()
        self._entered: list[str] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch wraps the method below, and the wrapper imports the compiler

    def enter(self, name: str, *_: Any) -> None:
        """Count for this child from now on, unless another child has called it."""
        self._entered.append(name)

    def leave(self, *_: Any) -> None:
        """Count for it no longer."""
        self._entered.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output, operator = _run(func, args, kwargs or {}), func.overloadpacket
        child = self._entered[0] if self._entered else ""
        if operator == _CONVOLUTION:
            images, kernel, is_transposed = args[0], args[1], args[6]
            pixels = (images if is_transposed else output).shape[2:]
            self.multiplied[child] += len(images) * prod(pixels) * kernel.numel()
        elif operator in _PRODUCTS:
            place = _PRODUCTS[operator]
            self.multiplied[child] += args[place].numel() * args[place + 1].shape[-1]
        elif "attention" in func.name():
            from torch.utils.flop_counter import flop_registry

            if operator in flop_registry:
                self.multiplied[child] += flop_registry[operator](*args, **(kwargs or {}), out_val=output) // 2
        if operator in _CONVOLVING:
            self.convolved[child] += output.numel()
        return output


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on the meta device.

    torch's own rules for some operators of a ResNeSt are written in Python, and import torch's compiler or SymPy.
    """
    tensors = [argument for argument in args if isinstance(argument, Tensor)]
    if kwargs or len({tensor.dtype for tensor in tensors}) != 1:
        return func(*args, **kwargs)
    is_pointwise = torch.Tag.pointwise in func.tags
    if is_pointwise and func.name().partition(".")[0].endswith("_"):  # in place
        return args[0]
    shape = np.broadcast_shapes(*(x.shape for x in tensors)) if is_pointwise else _find_shape(func, args)
    if shape is None:
        return func(*args)
    output = tensors[0].new_empty(shape)
    is_max_pool = func == torch.ops.aten.max_pool2d_with_indices.default
    return (output, output.new_empty(shape, dtype=torch.int64)) if is_max_pool else output


def _find_shape(func: Any, args: tuple[Any, ...]) -> Sequence[int] | None:
    """Return the shape of a convolution's output, or of a few other operators'; None for all others."""
    aten = torch.ops.aten
    if func == aten.convolution.default and not args[6]:  # not transposed
        return *args[0].shape[:1], *args[1].shape[:1], *_slide(args[0].shape[2:], args[1].shape[2:], *args[3:6])
    if func == aten.avg_pool2d.default and True not in args[4:5]:  # sides rounded down
        return *args[0].shape[:2], *_slide(args[0].shape[2:], *args[1:4])
    if func == aten.max_pool2d_with_indices.default and True not in args[5:6]:
        return *args[0].shape[:2], *_slide(args[0].shape[2:], *args[1:5])
    if func == aten.mean.dim and args[1]:
        summed = {axis % args[0].ndim for axis in args[1]}
        sides = [1 if axis in summed else side for axis, side in enumerate(args[0].shape)]
        return sides if True in args[2:] else [side for axis, side in enumerate(sides) if axis not in summed]
    return (len(args[1]), args[2].shape[1]) if func == aten.addmm.default else None


def _slide(
    sides: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
) -> list[int]:
    """Return how many places a window has in an image, by side; a single value is for all sides."""
    options = (kernel, stride or kernel, padding, dilation)
    by_side = zip(sides, *(values * len(sides) if len(values) == 1 else values for values in options), strict=True)
    return [(side + 2 * border - gap * (size - 1) - 1) // step + 1 for side, size, step, border, gap in by_side]
