"""Detectors under detectron2's names: which tensors a file has, by rule, and what they compute, written out.

Nothing here is of the library: names, shapes and arithmetic are those of detectron2's and detectron2-ResNeSt's modules.
"""

import torch
import torch.nn.functional as F

STATISTICS = ("running_mean", "running_var")


def list_tensors(
    layers, stem, *, resnest=True, planes=64, cascade=False, masks=False, norms=True, channels=256, width=1024, convs=4,
    fcs=1, classes=80,
):  # fmt: skip
    """Return the shape of each tensor of a file by its name.

    Args:
        layers: blocks of res2 to res5.
        stem: channels of a ResNeSt's first convolution.
        resnest: whether it is one, or a ResNet.
        planes: of res2.
        cascade, masks: which heads.
        norms: behind the convolutions of pyramid and heads, which have biases without them.
        channels, width: of pyramid and heads, of the fully connected layers.
        convs, fcs: layers of a box head.
        classes: without the background.
    """
    shapes = {}
    inputs = list_bottom_up(shapes, layers, stem, resnest, planes)
    for stage, of in enumerate(inputs, 2):
        add_conv(shapes, f"backbone.fpn_lateral{stage}", channels, of, 1, norms)
        add_conv(shapes, f"backbone.fpn_output{stage}", channels, channels, 3, norms)
    rpn = "proposal_generator.rpn_head"
    add_conv(shapes, f"{rpn}.conv", channels, channels, 3, normed=False)
    add_conv(shapes, f"{rpn}.objectness_logits", 3, channels, 1, normed=False)
    add_conv(shapes, f"{rpn}.anchor_deltas", 12, channels, 1, normed=False)
    for number in (".0", ".1", ".2") if cascade else ("",):
        for k in range(convs):
            add_conv(shapes, f"roi_heads.box_head{number}.conv{k + 1}", channels, channels, 3, norms)
        for k in range(fcs):
            add_linear(shapes, f"roi_heads.box_head{number}.fc{k + 1}", width, width if k else 49 * channels)
        add_linear(shapes, f"roi_heads.box_predictor{number}.cls_score", classes + 1, width)
        add_linear(shapes, f"roi_heads.box_predictor{number}.bbox_pred", 4 if cascade else 4 * classes, width)
    for k in range(4 if masks else 0):
        add_conv(shapes, f"roi_heads.mask_head.mask_fcn{k + 1}", channels, channels, 3, norms)
    if masks:
        shapes["roi_heads.mask_head.deconv.weight"] = (channels, channels, 2, 2)
        shapes["roi_heads.mask_head.deconv.bias"] = (channels,)
        add_conv(shapes, "roi_heads.mask_head.predictor", classes, channels, 1, normed=False)
    return shapes


def list_bottom_up(shapes, layers, stem, resnest, planes):
    """Add the backbone's tensors; return the channels of res2 to res5."""
    bottom = "backbone.bottom_up"
    for number, (outputs, inputs) in enumerate([(stem, 3), (stem, stem), (2 * stem, stem)] if resnest else [], 1):
        add_conv(shapes, f"{bottom}.stem.conv1_{number}", outputs, inputs, 3)
    if not resnest:
        add_conv(shapes, f"{bottom}.stem.conv1", 64, 3, 7)
    inputs = 2 * stem if resnest else 64
    for stage, blocks in enumerate(layers, 2):
        p = planes * 2 ** (stage - 2)
        for block in range(blocks):
            name = f"{bottom}.res{stage}.{block}"
            add_conv(shapes, f"{name}.conv1", p, inputs)
            if resnest:
                add_split_attention(shapes, f"{name}.conv2", p)
            else:
                add_conv(shapes, f"{name}.conv2", p, p, 3)
            add_conv(shapes, f"{name}.conv3", 4 * p, p)
            if not block:
                add_conv(shapes, f"{name}.shortcut", 4 * p, inputs)
            inputs = 4 * p
    return [4 * planes * 2**stage for stage in range(4)]


def add_conv(shapes, name, outputs, inputs, kernel=1, normed=True):
    shapes[f"{name}.weight"] = (outputs, inputs, kernel, kernel)
    names = [f"{name}.norm.{kind}" for kind in ("weight", "bias", *STATISTICS)] if normed else [f"{name}.bias"]
    shapes.update(dict.fromkeys(names, (outputs,)))


def add_linear(shapes, name, outputs, inputs):
    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)


def add_split_attention(shapes, name, p):
    """Radix 2: a convolution of two groups, and a small network of attention."""
    inner = max(p // 2, 32)
    shapes[f"{name}.conv.weight"] = (2 * p, p // 2, 3, 3)
    for layer, outputs, inputs in (("fc1", inner, p), ("fc2", 2 * p, inner)):
        shapes[f"{name}.{layer}.weight"], shapes[f"{name}.{layer}.bias"] = (outputs, inputs, 1, 1), (outputs,)
    for norm, size in (("bn0", 2 * p), ("bn1", inner)):
        shapes.update({f"{name}.{norm}.{kind}": (size,) for kind in ("weight", "bias", *STATISTICS)})


def draw_tensors(shapes, seed=0, dtype=torch.float64):
    """Return random tensors none of which could stand for another."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in shapes.items():
        values = torch.randn(shape, generator=generator, dtype=dtype)
        fan = values[0].numel() if values.dim() > 1 else 1
        tensors[key] = values * (2 / fan) ** 0.5 if values.dim() > 1 else 1 + 0.2 * values.clamp(-2, 2)
    return tensors


def normalise(x, s, name):
    """Apply a batch norm in evaluation."""
    shape = (1, -1, 1, 1)
    scale = s[f"{name}.weight"] / (s[f"{name}.running_var"] + 1e-5).sqrt()
    return (x - s[f"{name}.running_mean"].view(shape)) * scale.view(shape) + s[f"{name}.bias"].view(shape)


def convolve(x, s, name, stride=1, padding=0):
    """Apply a convolution and its norm, if it has one."""
    x = F.conv2d(x, s[f"{name}.weight"], s.get(f"{name}.bias"), stride, padding)
    return normalise(x, s, f"{name}.norm") if f"{name}.norm.weight" in s else x


def attend(x, s, name):
    """Apply split attention of radix 2."""
    x = normalise(F.conv2d(x, s[f"{name}.conv.weight"], None, 1, 1, 1, 2), s, f"{name}.bn0").relu()
    first, second = x.chunk(2, dim=1)
    gap = (first + second).mean((2, 3), keepdim=True)
    gap = normalise(F.conv2d(gap, s[f"{name}.fc1.weight"], s[f"{name}.fc1.bias"]), s, f"{name}.bn1").relu()
    shares = F.conv2d(gap, s[f"{name}.fc2.weight"], s[f"{name}.fc2.bias"]).unflatten(1, (2, -1)).softmax(1)
    return first * shares[:, 0] + second * shares[:, 1]


def run_block(x, s, name, stride, resnest):
    """Apply a bottleneck: ResNeSt's with its average pools, or MSRA's with the stride in the first convolution."""
    if resnest:
        out = attend(convolve(x, s, f"{name}.conv1").relu(), s, f"{name}.conv2")
        out = F.avg_pool2d(out, 3, 2, 1) if stride == 2 else out
    else:
        out = convolve(x, s, f"{name}.conv1", stride).relu()
        out = convolve(out, s, f"{name}.conv2", 1, 1).relu()
    out = convolve(out, s, f"{name}.conv3")
    if f"{name}.shortcut.weight" in s:
        if resnest and stride == 2:
            x = F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
        x = convolve(x, s, f"{name}.shortcut", 1 if resnest else stride)
    return (out + x).relu()


def run_bottom_up(x, s, layers, prefix="backbone.bottom_up."):
    """Return res2 to res5 of images."""
    resnest = f"{prefix}stem.conv1_1.weight" in s
    if resnest:
        for number, stride in ((1, 2), (2, 1), (3, 1)):
            x = convolve(x, s, f"{prefix}stem.conv1_{number}", stride, 1).relu()
    else:
        x = convolve(x, s, f"{prefix}stem.conv1", 2, 3).relu()
    x, features = F.max_pool2d(x, 3, 2, 1), []
    for stage, blocks in enumerate(layers, 2):
        for block in range(blocks):
            x = run_block(x, s, f"{prefix}res{stage}.{block}", 2 if stage > 2 and not block else 1, resnest)
        features.append(x)
    return features


def run_pyramid(features, s):
    """Return P2 to P6."""
    levels, above = [], None
    for stage in (5, 4, 3, 2):
        lateral = convolve(features[stage - 2], s, f"backbone.fpn_lateral{stage}")
        above = lateral if above is None else lateral + F.interpolate(above, scale_factor=2)
        levels.insert(0, convolve(above, s, f"backbone.fpn_output{stage}", 1, 1))
    return [*levels, levels[-1][:, :, ::2, ::2]]


def run_rpn(level, s):
    """Return objectness and differences of a level's anchors."""
    name = "proposal_generator.rpn_head"
    x = convolve(level, s, f"{name}.conv", 1, 1).relu()
    return convolve(x, s, f"{name}.objectness_logits"), convolve(x, s, f"{name}.anchor_deltas")


def run_box_head(pooled, s, number=""):
    """Return the logits of a stage, the background last, and the differences (n, classes or 1, 4)."""
    x, k = pooled, 1
    while f"roi_heads.box_head{number}.conv{k}.weight" in s:
        x, k = convolve(x, s, f"roi_heads.box_head{number}.conv{k}", 1, 1).relu(), k + 1
    x, k = x.flatten(1), 1
    while f"roi_heads.box_head{number}.fc{k}.weight" in s:
        name = f"roi_heads.box_head{number}.fc{k}"
        x, k = F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"]).relu(), k + 1
    name = f"roi_heads.box_predictor{number}"
    logits, differences = (
        F.linear(x, s[f"{name}.{part}.weight"], s[f"{name}.{part}.bias"]) for part in ("cls_score", "bbox_pred")
    )
    return logits, differences.unflatten(1, (-1, 4))


def run_mask_head(pooled, s):
    """Return the masks' logits of each class."""
    x = pooled
    for k in range(1, 5):
        x = convolve(x, s, f"roi_heads.mask_head.mask_fcn{k}", 1, 1).relu()
    name = "roi_heads.mask_head.deconv"
    x = F.conv_transpose2d(x, s[f"{name}.weight"], s[f"{name}.bias"], 2).relu()
    return convolve(x, s, "roi_heads.mask_head.predictor")
