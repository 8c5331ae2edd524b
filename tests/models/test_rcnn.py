"""Detectors against their arithmetic in float64, against torchvision's, and the figures of Tables 5 and 6."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import naive_detector as naive
from resnest_imagenet.errors import ConfigError
from resnest_imagenet.instances import Target
from resnest_imagenet.models.cost import count_kept_rcnn, count_rcnn
from resnest_imagenet.models.folding import fold_batch_norms
from resnest_imagenet.models.rcnn_options import CASCADE_STAGES, PLAIN_STAGES, RCNNOptions

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
SIZES = [(60, 90), (64, 70)]  # in a batch of 64 x 96
SMALL = {
    "norm": "bn",
    "channels": 8,
    "anchor_sizes": (8, 14, 25, 40, 60),
    "canonical_size": 32,
    "box_convs": 1,
    "box_width": 16,
    "mask_convs": 1,
    "candidates": (30, 30),
    "proposals": (25, 25),
    # More than there are: none is drawn at random.
    "rpn_samples": 2048,
    "samples": 8192,
}


def build(dtype=torch.float64, **options):
    """Return a detector of 4 classes whose heads do not start at 0, and whose norms have statistics of their own."""
    from resnest_imagenet.models.rcnn import build_rcnn

    torch.manual_seed(0)
    model = build_rcnn("resnest14_half", 4, **{**SMALL, "zero_gamma": False, **options}).to(dtype)
    for module in model.modules():
        if isinstance(module, NORMS):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    for name, parameter in model.named_parameters():
        if name.startswith(("rpn.", "roi_heads.")) and parameter.dim() < 4:
            nn.init.normal_(parameter, std=0.3)
        elif name.startswith(("rpn.", "roi_heads.masks.")):
            nn.init.normal_(parameter, std=0.15)
    return model


def make_target(size, boxes, labels, dtype=torch.float64):
    """Return a target whose masks are octagons, the first one with a second part."""
    boxes = torch.tensor(boxes, dtype=dtype).reshape(-1, 4)
    masks = [[cut_corners(*box)] for box in boxes.tolist()]
    if masks:
        masks[0].append(np.array([2.0, 3, 20, 4, 9, 25]))
    return Target(0, size, size, boxes, torch.tensor(labels, dtype=torch.int64), masks)


def cut_corners(x1, y1, x2, y2):
    x, y = (x2 - x1) / 4, (y2 - y1) / 3
    return np.array([x1 + x, y1, x2 - x, y1, x2, y1 + y, x2, y2 - y, x2 - x, y2, x1 + x, y2, x1, y2 - y, x1, y1 + y])


def make_targets(dtype=torch.float64):
    first = [[5.2, 7.1, 41.3, 38.9], [50.4, 3.3, 83.7, 57.5], [20.6, 30.8, 33.1, 44.4]]
    second = [[10.9, 12.2, 61.8, 55.6], [40.3, 20.7, 52.2, 31.5]]
    return [make_target(SIZES[0], first, [0, 3, 1], dtype), make_target(SIZES[1], second, [2, 2], dtype)]


def make_images(dtype=torch.float64, height=64, width=96):
    images = torch.randn(2, 3, height, width, dtype=dtype, generator=torch.Generator().manual_seed(1))
    for image, (rows, columns) in zip(images, SIZES, strict=True):
        image[:, rows:], image[:, :, columns:] = 0, 0
    return images.contiguous(memory_format=torch.channels_last)


def make_levels(model, images):
    """Return the pyramid of images as leaves."""
    with torch.no_grad():
        levels = model.pyramid(images)
    return [level.clone().requires_grad_() for level in levels]


def copy_state(model):
    """Return the tensors of a detector as leaves that want gradients."""
    names = dict(model.named_parameters())
    return {key: value.detach().clone().requires_grad_(key in names) for key, value in model.state_dict().items()}


def differentiate(losses, tensors):
    """Return the gradients of a sum of losses in which none can stand for another."""
    total = sum((1 + 0.1 * k) * loss for k, loss in enumerate(losses))
    return torch.autograd.grad(total, tensors, allow_unused=True)


def assert_close(ours, expected, what=""):
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9 * expected.abs().max().item() + 1e-12, msg=what)


def propose_naively(model, levels, state, options, training):
    outputs = naive.run_rpn(levels, state)
    shapes = [level.shape[2:] for level in levels]
    anchors = naive.list_anchors(shapes, (4, 8, 16, 32, 64), options.anchor_sizes, options.anchor_ratios)
    counts = [pair[0 if training else 1] for pair in (options.candidates, options.num_proposals)]
    return outputs, anchors, naive.propose(outputs, anchors, SIZES, *counts, options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"masks": True}, {"cascade": True, "masks": True}, {"class_agnostic": True, "head_norm": "none"}],
    ids=["mask", "cascade mask", "one box, no norms"],
)
def test_losses_and_gradients_equal_a_naive_transcription(options):
    """Anchors, matching, proposals, RoIAlign, heads, relabelling, the cascade's gradients; in float64."""
    if options.get("masks"):
        pytest.importorskip("pycocotools")
    model, images, targets = build(**options).train(), make_images(), make_targets()
    levels, settings = make_levels(model, images), model.roi_heads.options
    state = copy_state(model)
    names = [name for name, _ in model.named_parameters() if not name.startswith(("backbone.", "fpn."))]

    proposals, losses = model.rpn.propose(images, levels, SIZES, targets)
    losses |= model.roi_heads.compute_losses(levels[:4], proposals, targets)
    assert tuple(losses) == model.loss_names
    gradients = differentiate(losses.values(), [*levels, *(model.get_parameter(name) for name in names)])

    outputs, anchors, boxes = propose_naively(model, levels, state, settings, training=True)
    for ours, expected in zip(proposals, boxes, strict=True):
        assert_close(ours, expected, "proposals")
    expected = naive.compute_rpn_losses(outputs, anchors, targets, settings)
    boxes = [torch.cat((of_image, target.boxes)) for of_image, target in zip(boxes, targets, strict=True)]
    stages = len(settings.all_stages)
    of_stages, labels = naive.run_stages(
        levels[:4], boxes, SIZES, state, settings, True, targets,
        lambda pooled: pooled / stages + (pooled * (stages - 1) / stages).detach(),
    )  # fmt: skip
    expected += of_stages
    if settings.masks:
        expected.append(naive.compute_mask_loss(levels[:4], state, boxes, labels[0], targets, settings))
    counts = [sum(label > 0 for of_image in of_stage for label, _ in of_image) for of_stage in labels]
    assert len(set(counts)) == stages and min(counts) > 0  # the stages have other positives, and all have some
    for (name, ours), value in zip(losses.items(), expected, strict=True):
        assert value > 1e-4
        assert_close(ours, value, name)
    wanted = differentiate(expected, [*levels, *(state[name] for name in names)])
    for name, ours, value in zip([*"23456", *names], gradients, wanted, strict=True):
        assert_close(ours, value, name)
        assert value.any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"masks": True}, {"cascade": True, "masks": True}, {"class_agnostic": True}],
    ids=["mask", "cascade", "1"],
)
def test_detections_equal_a_naive_transcription(options):
    model, images = build(**options, min_score=0.1, detections=20, nms=0.3).eval(), make_images()
    levels, settings, state = make_levels(model, images), model.roi_heads.options, copy_state(model)
    with torch.no_grad():
        detections = model(images, SIZES)
        _, _, proposals = propose_naively(model, levels, state, settings, training=False)
        boxes, probabilities = naive.run_stages(levels[:4], proposals, SIZES, state, settings, training=False)
        start, counts = 0, []
        for image, (ours, of_image, size) in enumerate(zip(detections, proposals, SIZES, strict=True)):
            rows = slice(start, start + len(of_image))
            start = rows.stop
            expected, scores, labels = naive.detect(boxes[rows], probabilities[rows], size, settings)
            counts.append((len(scores), len(set(labels))))
            assert ours.labels.tolist() == labels
            assert_close(ours.scores, torch.tensor(scores, dtype=torch.float64))
            assert_close(ours.boxes, torch.tensor(expected, dtype=torch.float64))
            if settings.masks:
                within = [[]] * image + [torch.tensor(expected, dtype=torch.float64)]
                pooled = naive.pool(levels[:4], [torch.as_tensor(part) for part in within], 14, settings)
                logits = naive.run_mask_head(pooled, state, settings, training=False)
                masks = logits[torch.arange(len(labels)), labels].sigmoid()
                assert_close(ours.masks, masks)
    assert all(count > 3 for count, _ in counts) and max(classes for _, classes in counts) > 1


def test_anchors_of_levels_that_strides_do_not_divide():
    """At 800 x 1056 pixels the last level has 13 x 17 cells: 64 pixels apart, not 61 or 62."""
    from torchvision.models.detection.image_list import ImageList

    from resnest_imagenet.models.proposals import Anchors

    options, strides = RCNNOptions(), (4, 8, 16, 32, 64)
    anchors = Anchors(options.anchor_sizes, options.anchor_ratios, strides)
    levels = [
        torch.empty(1, 1, -(-50 // stride), -(-66 // stride), dtype=torch.bfloat16) for stride in (2, 4, 8, 16, 32)
    ]
    shapes = [level.shape[2:] for level in levels]
    first, second = anchors(ImageList(torch.empty(0), [(50, 66), (30, 20)]), levels)
    expected = torch.cat(naive.list_anchors(shapes, strides, options.anchor_sizes, options.anchor_ratios))
    assert first.dtype == torch.float32 and torch.equal(first, second)
    torch.testing.assert_close(first.double(), expected, rtol=1e-6, atol=1e-5)
    assert first[0].tolist() == pytest.approx([-22.627417, -11.313708, 22.627417, 11.313708])
    rounded = Anchors(options.anchor_sizes, options.anchor_ratios, strides, is_rounded=True).cells
    assert rounded[0] == [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]]


@pytest.mark.parametrize(("aligned", "sampling"), [(True, 0), (False, 0), (True, 2), (False, 2)])
def test_pooling_equals_a_naive_transcription(aligned, sampling):
    """Boxes on all levels, at the rim, of less than a cell, of the whole image; values and gradients."""
    from resnest_imagenet.models.boxes import pool_boxes

    torch.manual_seed(0)
    options = RCNNOptions(aligned=aligned, sampling=sampling, canonical_size=24)
    levels = [torch.randn(2, 3, 64 // s, 96 // s, dtype=torch.float64, requires_grad=True) for s in (4, 8, 16, 32)]
    boxes = [
        torch.tensor([[0, 0, 96, 64], [90.1, 58.2, 96, 64], [3.3, 4.4, 4.0, 5.1], [5.2, 7.1, 41.3, 38.9]]).double(),
        torch.tensor([[11.5, 2.25, 20.1, 30.7], [0, 0, 12.5, 11.0], [30.1, 10.9, 64.4, 50.2]]).double(),
    ]
    results = pool_boxes(levels, boxes, (4, 8, 16, 32), 7, options), naive.pool(levels, boxes, 7, options)
    assert_close(*results)
    weights = torch.randn_like(results[0])
    gradients = [torch.autograd.grad((result * weights).sum(), levels) for result in results]
    for ours, expected in zip(*gradients, strict=True):
        assert_close(ours, expected)
        assert expected.any()


def test_the_pyramid_has_norms_and_neither_biases_nor_activations():
    """Lateral 1x1, nearest upsampling, 3x3; the last level every other cell of the one before."""
    model, images = build().train(), make_images()
    features = model.backbone(images)
    levels = model.pyramid(images)

    def convolve(x, block):
        (convolution, norm) = block
        assert convolution.bias is None
        x = nn.functional.conv2d(x, convolution.weight, padding=convolution.kernel_size[0] // 2)
        return (x - x.mean((0, 2, 3), True)) / (x.var((0, 2, 3), False, keepdim=True) + 1e-5).sqrt() * norm.weight.view(
            1, -1, 1, 1
        ) + norm.bias.view(1, -1, 1, 1)

    above, expected = None, []
    for feature, lateral, output in reversed(
        list(zip(features, model.fpn.inner_blocks, model.fpn.layer_blocks, strict=True))
    ):
        inner = convolve(feature, lateral)
        above = inner if above is None else inner + above.repeat_interleave(2, 2).repeat_interleave(2, 3)
        expected.insert(0, convolve(above, output))
    expected.append(expected[-1][:, :, ::2, ::2])
    for ours, level in zip(levels, expected, strict=True):
        assert_close(ours, level)
    assert [tuple(level.shape[2:]) for level in levels] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]


# torchvision's settings, those of its faster_rcnn.py where they matter.
TORCHVISIONS = {
    "norm": "frozen",
    "head_norm": "none",
    "anchors_rounded": True,
    "rpn_samples": 64,
    "rpn_beta": 1 / 9,
    "aligned": False,
    "sampling": 2,
    "canonical_size": 224,
    "samples": 16,
    "box_convs": 0,
    "box_fcs": 2,
    "box_beta": 1 / 9,
    "masks": True,
}


def build_torchvisions(model):
    """Return torchvision's MaskRCNN with the weights of ours."""
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fpn, self.out_channels = model.backbone, model.fpn, model.roi_heads.options.channels

        def forward(self, images):
            return self.fpn(dict(zip("0123", self.body(images), strict=True)))

    options = model.roi_heads.options
    channels = options.channels
    torchvisions = MaskRCNN(
        Pyramid(),
        rpn_anchor_generator=AnchorGenerator([(s,) for s in options.anchor_sizes], (options.anchor_ratios,) * 5),
        box_roi_pool=MultiScaleRoIAlign(list("0123"), 7, options.sampling),
        mask_roi_pool=MultiScaleRoIAlign(list("0123"), 14, options.sampling),
        box_head=TwoMLPHead(channels * 49, options.box_width),
        box_predictor=FastRCNNPredictor(options.box_width, 5),
        mask_head=MaskRCNNHeads(channels, [channels], 1),
        mask_predictor=MaskRCNNPredictor(channels, channels, 5),
        **{f"rpn_{kind}_nms_top_n_train": count[0] for kind, count in (("pre", options.candidates),)},
        rpn_pre_nms_top_n_test=options.candidates[1],
        rpn_post_nms_top_n_train=options.num_proposals[0],
        rpn_post_nms_top_n_test=options.num_proposals[1],
        rpn_batch_size_per_image=options.rpn_samples,
        box_batch_size_per_image=options.samples,
        box_score_thresh=options.min_score,
    ).double()
    state = model.state_dict()
    ours = {key.replace("backbone.", "backbone.body."): value for key, value in state.items()}
    ours |= {key.replace("fpn.", "backbone.fpn."): value for key, value in state.items()}
    mapped = {key: ours[key] for key in torchvisions.state_dict() if key in ours}
    heads = {"box_head.fc6": "stages.0.body.1", "box_head.fc7": "stages.0.body.3", "mask_head.0.0": "masks.body.0.0"}
    heads |= {"box_predictor.cls_score": "stages.0.classify", "mask_predictor.conv5_mask": "masks.predictor.conv5_mask"}
    for part in ("weight", "bias"):
        for name, our_name in heads.items():
            mapped[f"roi_heads.{name}.{part}"] = state[f"roi_heads.{our_name}.{part}"]
        # Boxes and masks of the background, which nobody looks at.
        for name, our_name, rows in (
            ("box_predictor.bbox_pred", "stages.0.regress", 4),
            ("mask_predictor.mask_fcn_logits", "masks.predictor.mask_fcn_logits", 1),
        ):
            value = state[f"roi_heads.{our_name}.{part}"]
            mapped[f"roi_heads.{name}.{part}"] = torch.cat((torch.full_like(value[:rows], 7), value))
    torchvisions.load_state_dict(mapped)
    return torchvisions


@pytest.mark.slow
def test_equals_torchvisions_mask_rcnn_with_its_settings():
    """Losses and gradients of what both draw at random, and detections; masks cover the images, so that both agree."""
    pytest.importorskip("pycocotools")
    from torchvision.models.detection.image_list import ImageList

    model = build(**TORCHVISIONS, anchor_sizes=(16, 32, 64, 128, 256))
    # It divides sides for strides: 128 is 2 x 64.
    images = torch.randn(2, 3, 128, 192, dtype=torch.float64)
    sizes = [(128, 192), (100, 150)]
    everywhere = np.array([-10.0, -10, 210, -10, 210, 140, -10, 140])
    targets = [
        Target(0, size, size, target.boxes, target.labels, [[everywhere]] * len(target))
        for size, target in zip(sizes, make_targets(), strict=True)
    ]
    bitmaps = [
        {"boxes": t.boxes, "labels": t.labels + 1, "masks": torch.ones(len(t), *t.size, dtype=torch.uint8)}
        for t in targets
    ]
    torchvisions = build_torchvisions(copy.deepcopy(model))
    model.train(), torchvisions.train()
    for seed in range(3):
        torch.manual_seed(seed)
        losses = model(images, targets)
        torch.manual_seed(seed)
        features = torchvisions.backbone(images)
        proposals, expected = torchvisions.rpn(ImageList(images, sizes), features, bitmaps)
        _, of_heads = torchvisions.roi_heads(features, proposals, sizes, bitmaps)
        expected |= of_heads
        names = dict(zip(model.loss_names, ("objectness", "rpn_box_reg", "classifier", "box_reg", "mask"), strict=True))
        for name, name_there in names.items():
            wanted = expected[f"loss_{name_there}"].double()  # of objectness it has float32
            assert losses[name].item() == pytest.approx(wanted.item(), rel=1e-7 if name == "objectness" else 1e-12)
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    gradients = {name: parameter.grad for name, parameter in torchvisions.named_parameters()}
    compared = 0
    for name, parameter in model.named_parameters():
        their_name = f"backbone.{name.replace('backbone.', 'body.')}" if name.startswith(("backbone", "fpn")) else name
        if parameter.requires_grad and their_name in gradients:
            close = 1e-6 * parameter.grad.abs().max().item()
            torch.testing.assert_close(parameter.grad, gradients[their_name], rtol=0, atol=close, msg=name)
            compared += parameter.grad.any().item()
    assert compared > 30
    model.eval(), torchvisions.eval()
    with torch.no_grad():
        features = torchvisions.backbone(images)
        proposals, _ = torchvisions.rpn(ImageList(images, sizes), features)
        expected, _ = torchvisions.roi_heads(features, proposals, sizes)
        for ours, wanted in zip(model(images, sizes), expected, strict=True):
            assert len(ours) > 5 and ours.labels.tolist() == (wanted["labels"] - 1).tolist()
            assert_close(ours.boxes, wanted["boxes"])
            assert_close(ours.scores, wanted["scores"])
            assert_close(ours.masks, wanted["masks"][:, 0])


@pytest.mark.slow
def test_a_cascade_of_one_stage_is_the_plain_head():
    pytest.importorskip("pycocotools")
    plain, cascade = (
        build(masks=True, class_agnostic=True, cascade=is_cascade, stages=PLAIN_STAGES, proposals=(25, 25), samples=16)
        for is_cascade in (False, True)
    )
    assert type(plain.roi_heads) is not type(cascade.roi_heads)
    cascade.load_state_dict(plain.state_dict())
    results = []
    for model in (plain, cascade):
        torch.manual_seed(3)
        losses = model.train()(make_images(), make_targets())
        sum(losses.values()).backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            detections = model.eval()(make_images(), SIZES)
        results.append([*losses.values(), *gradients])
        results[-1] += [getattr(d, name) for d in detections for name in ("boxes", "scores", "labels", "masks")]
    assert all(torch.equal(ours, expected) for ours, expected in zip(*results, strict=True))


def test_stages_of_a_cascade_have_the_papers_settings():
    options = RCNNOptions(cascade=True)
    assert options.all_stages == CASCADE_STAGES and options.has_one_box and options.num_proposals == (2000, 1000)
    assert [iou for iou, _ in CASCADE_STAGES] == [0.5, 0.6, 0.7]
    assert [weights[0] / weights[3] for _, weights in CASCADE_STAGES] == [2, 2, 2]
    plain = RCNNOptions()
    assert plain.all_stages == PLAIN_STAGES and not plain.has_one_box and plain.num_proposals == (1000, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("cascade", [False, True])
@pytest.mark.parametrize("objects", ["none", "one image", "no proposals"])
def test_every_parameter_has_a_gradient_where_there_is_nothing_to_learn(objects, cascade):
    """Other ranks wait for the gradients; running statistics stay finite."""
    pytest.importorskip("pycocotools")
    model = build(torch.float32, masks=True, cascade=cascade, samples=16).train()
    empty = [make_target(size, [], [], torch.float32) for size in SIZES]
    targets = [empty[0], make_targets(torch.float32)[1]] if objects == "one image" else empty
    if objects == "no proposals":
        images = make_images(torch.float32)
        levels = model.pyramid(images)
        _, losses = model.rpn.propose(images, levels, SIZES, targets)
        losses |= model.roi_heads.compute_losses(levels[:4], [torch.empty(0, 4)] * 2, targets)
        assert all(losses[name] == 0 for name in model.roi_heads.loss_names)
    else:
        losses = model(make_images(torch.float32), targets)
    assert tuple(losses) == model.loss_names and all(loss.isfinite() for loss in losses.values())
    assert (losses["masks"] == 0) == (losses["rpn_boxes"] == 0) == (objects != "one image")
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.isfinite().all(), name
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("part", ["all", "some"])
def test_boxes_that_a_stage_moves_out_of_the_image(part):
    """In training the next stage does not see them, all parameters have a gradient still; in evaluation they stay."""
    model, images, targets = build(torch.float32, cascade=True, samples=40), make_images(torch.float32), make_targets()
    first = model.roi_heads.stages[0]
    nn.init.zeros_(first.regress.weight)
    # In tenths of a box's width: boxes in the right part of an image leave it, or all do.
    first.regress.bias.data = torch.tensor([5000.0 if part == "all" else 15.0, 0, 0, 0])
    seen = []
    for stage in model.roi_heads.stages:
        stage.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    losses = model.train()(images, targets)
    sum(losses.values()).backward()
    assert seen[0] > seen[1] and (seen[1] == 0) == (part == "all") == (losses["classes2"] == 0)
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    seen.clear()
    with torch.no_grad():
        model.eval()(images, SIZES)
    assert len(set(seen)) == 1 and seen[0] > 0


def test_no_proposals_give_no_detections():
    model = build(torch.float32, masks=True, cascade=True).eval()
    with torch.no_grad():
        levels = model.pyramid(make_images(torch.float32))
        detections = model.roi_heads(levels[:4], [torch.empty(0, 4)] * 2, SIZES)
    assert [tuple(d.masks.shape) for d in detections] == [(0, 28, 28)] * 2 and not len(detections[0])


@pytest.mark.parametrize("place", ["backbone", "fpn", "rpn", "roi_heads", "roi_heads.masks"])
def test_not_a_number_is_a_loss_and_a_score_or_mask(place):
    """So evaluation and prediction name the image, which would look like one without objects."""
    model = build(torch.float32, masks=True, cascade=True, samples=16)
    for parameter in model.get_submodule(place).parameters():
        nn.init.constant_(parameter, torch.nan)
    losses = model.train()(make_images(torch.float32), make_targets(torch.float32))
    assert torch.stack(list(losses.values())).isnan().any()
    with torch.no_grad():
        for found in model.eval()(make_images(torch.float32), SIZES):
            assert not (found.scores.isfinite().all() and (found.masks is None or found.masks.isfinite().all()))


def test_what_is_sampled():
    """As many positives as may be, and the rest is background; the objects' own boxes are there; torch draws."""
    from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

    from resnest_imagenet.models.boxes import sample_boxes

    (target, _), sampler = make_targets(), BalancedPositiveNegativeSampler(16, 0.25)
    near = target.boxes.repeat(20, 1) + torch.rand(60, 4, dtype=torch.float64)
    proposals = torch.cat((near, torch.rand(50, 4, dtype=torch.float64) + torch.tensor([0.0, 0, 9, 9])))
    torch.manual_seed(0)
    (first,) = sample_boxes([proposals], [target], 0.5, sampler)
    (second,) = sample_boxes([proposals], [target], 0.5, sampler)
    torch.manual_seed(0)
    (again,) = sample_boxes([proposals], [target], 0.5, sampler)
    assert torch.equal(first.boxes, again.boxes) and not torch.equal(first.boxes, second.boxes)
    for samples in (first, second):
        assert len(samples.boxes) == 16 and (samples.labels > 0).sum() == 4
        for box, label, match in zip(samples.boxes.tolist(), samples.labels, samples.matched, strict=True):
            overlaps = [naive.iou(box, wanted) for wanted in target.boxes.tolist()]
            assert label == (target.labels[match] + 1 if max(overlaps) >= 0.5 else 0)
            assert match == np.argmax(overlaps)
    (own,) = sample_boxes([proposals[:0]], [target], 0.5, sampler)
    assert torch.equal(own.boxes, target.boxes) and torch.equal(own.labels, target.labels + 1)


@pytest.mark.slow
@pytest.mark.parametrize("head_norm", [None, "none"])
@pytest.mark.parametrize("norm", ["bn", "frozen", "sync"])
def test_norms_and_frozen_stages(norm, head_norm):
    """Stem and layer1 stay as they are, and all frozen norms; what is decayed and moved is the rest."""
    model = build(torch.float32, norm=norm, head_norm=head_norm, samples=16)
    model.eval().train()  # as frameworks do
    before = {key: value.clone() for key, value in model.state_dict().items()}
    losses = model(make_images(torch.float32), make_targets(torch.float32))
    sum(losses.values()).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01).step()
    norms = {path: module for path, module in model.named_modules() if isinstance(module, NORMS)}
    assert all(isinstance(module, nn.SyncBatchNorm) == (norm == "sync") for module in norms.values())
    assert any(path.startswith("fpn.") for path in norms) == (head_norm is None)
    assert any(path.startswith("roi_heads.stages.") for path in norms) == (head_norm is None)
    frozen = tuple(f"{path}." for path in norms) if norm == "frozen" else ()
    frozen += tuple(f"backbone.{part}" for part in ("conv1.", "bn1.", "layer1."))
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if not key.startswith(frozen)}
    if norm == "sync":
        plain = build(torch.float32, norm="bn", head_norm=head_norm, samples=16)
        plain.load_state_dict(before)
        model.load_state_dict(before)
        with torch.no_grad():
            for ours, expected in zip(model.eval()(make_images(torch.float32), SIZES),
                                      plain.eval()(make_images(torch.float32), SIZES), strict=True):  # fmt: skip
                assert torch.equal(ours.boxes, expected.boxes) and len(ours)


@pytest.mark.parametrize("norm", ["bn", "sync"])
def test_can_be_folded(norm):
    """All of its norms, and the detections stay."""
    model = build(norm=norm, masks=True, cascade=True, min_score=0.1).eval()
    folded = fold_batch_norms(model)
    assert not any(isinstance(module, NORMS) for module in folded.modules())
    with torch.no_grad():
        for ours, expected in zip(folded(make_images(), SIZES), model(make_images(), SIZES), strict=True):
            assert len(ours) > 3 and torch.equal(ours.labels, expected.labels)
            for name in ("boxes", "scores", "masks"):
                torch.testing.assert_close(getattr(ours, name), getattr(expected, name), rtol=0, atol=1e-7)


def test_boxes_have_float32_under_autocast():
    model = build(torch.float32, cascade=True, samples=16).train()
    with torch.autocast("cpu", torch.bfloat16):
        images = make_images(torch.float32)
        levels = model.pyramid(images)
        assert levels[0].dtype == torch.bfloat16
        proposals, losses = model.rpn.propose(images, levels, SIZES, make_targets(torch.float32))
        losses |= model.roi_heads.compute_losses(levels[:4], proposals, make_targets(torch.float32))
    assert {value.dtype for value in (*losses.values(), *proposals)} == {torch.float32}
    expected = model(images, make_targets(torch.float32))
    assert losses["objectness"].item() == pytest.approx(expected["objectness"].item(), rel=0.05)


def test_the_box_head_keeps_what_it_flattens_once():
    """Kept are its input, the norm's and the activation: a contiguous copy of the last would be the fourth."""
    (head,) = build(torch.float32).roi_heads.box_heads
    pooled = torch.randn(6, 8, 7, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    kept = {}

    def keep(values):
        kept[values.untyped_storage().data_ptr()] = values.untyped_storage().nbytes()
        return values

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda values: values):
        outputs = head(pooled)
    assert [size for size in kept.values() if size == pooled.nbytes] == 3 * [pooled.nbytes], outputs


def test_first_weights():
    """Those of detectron2: N(0, .01) and N(0, .001) for what predicts, uniform fully connected layers, biases of 0."""
    from resnest_imagenet.models.rcnn import build_rcnn

    torch.manual_seed(0)
    model = build_rcnn("resnest14_half", 40, channels=64, box_width=256, masks=True)
    head, masks = model.roi_heads.stages[0], model.roi_heads.masks
    for layer, std in (
        (model.rpn.head.conv[0][0], 0.01),
        (model.rpn.head.cls_logits, 0.01),
        (model.rpn.head.bbox_pred, 0.01),
        (head.classify, 0.01),
        (head.regress, 0.001),
        (masks.predictor.mask_fcn_logits, 0.001),
        (masks.predictor.conv5_mask, (2 / (64 * 4)) ** 0.5),
        (masks.body[0][0], (2 / (64 * 9)) ** 0.5),
        (head.body[0][0], (2 / (64 * 9)) ** 0.5),
    ):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.1)
        assert layer.weight.abs().max() > 2.5 * std
        assert layer.bias is None or not layer.bias.any()
    fc = head.body[5]
    limit = (6 / (64 * 49 + 256)) ** 0.5
    assert fc.weight.abs().max().item() == pytest.approx(limit, rel=0.01)
    lateral = model.fpn.inner_blocks[0][0].weight
    assert lateral.abs().max().item() == pytest.approx((3 / lateral.shape[1]) ** 0.5, rel=0.01)


# Parameters, all and trained, of Faster and Cascade R-CNN with 80 classes, and of a mask head.
GOLDEN = {
    "resnet50_msra": ((43066848, 42841504), (73332046, 73106702)),
    "resnet101_msra": ((62058976, 61833632), (92324174, 92098830)),
    "resnest50": ((44993056, 44728992), (75258254, 74994190)),
    "resnest101": ((65784832, 65416224), (96050030, 95681422)),
    "resnest200": ((87711360, 87342752), (117976558, 117607950)),
}
MASKS = 2644304
# The same and multiply-adds counted by others, from the authors' configurations, in millions and billions: at 800 x
# 1344 with 1000 proposals and 100 masks, without norms.
COUNTED = {
    "resnet50_msra": {
        "Faster": (43.067, 42.842, 325.5),
        "Mask": (45.711, 45.486, 378.5),
        "Cascade Faster": (73.332, 73.107, 582.3),
        "Cascade Mask": (75.976, 75.751, 635.3),
    },
    "resnet101_msra": {
        "Faster": (62.059, 61.834, 405.1),
        "Mask": (64.703, 64.478, 458.1),
        "Cascade Faster": (92.324, 92.099, 661.8),
        "Cascade Mask": (94.968, 94.743, 714.8),
    },
    "resnest50": {
        "Faster": (44.993, 44.729, 357.9),
        "Mask": (47.637, 47.373, 410.9),
        "Cascade Faster": (75.258, 74.994, 614.7),
        "Cascade Mask": (77.903, 77.638, 667.7),
    },
    "resnest101": {
        "Faster": (65.785, 65.416, 461.4),
        "Mask": (68.429, 68.061, 514.4),
        "Cascade Faster": (96.050, 95.681, 718.1),
        "Cascade Mask": (98.694, 98.326, 771.1),
    },
    "resnest200": {"Cascade Faster": (117.977, 117.608, 872.5)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_parameters_and_multiply_adds_of_the_17_rows(name):
    from resnest_imagenet.models.rcnn import build_rcnn

    costs = count_rcnn(name, 80, (800, 1344), cascade=True, masks=True)
    assert [cost.stage for cost in costs] == ["backbone", "fpn", "rpn", "boxes", "masks"]
    backbone, fpn, rpn, boxes, masks = (cost.multiply_adds / 1e9 for cost in costs)
    for cascade, (totals, trained) in enumerate(GOLDEN[name]):
        with torch.device("meta"):
            model = build_rcnn(name, 80, cascade=bool(cascade), masks=True)
        parameters = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in model.roi_heads.masks.parameters()) == costs[-1].parameters == MASKS
        assert sum(p.numel() for p in parameters) == trained + MASKS
        assert sum(p.numel() for p in model.parameters()) == totals + MASKS
        work = backbone + fpn + rpn + (boxes if cascade else boxes / 3)
        for row, count in (("Faster", 0), ("Mask", MASKS)):
            published = COUNTED[name].get(f"Cascade {row}" if cascade else row)
            if published:
                assert [(totals + count) / 1e6, (trained + count) / 1e6] == pytest.approx(published[:2], abs=0.001)
                billions = work + masks * (row == "Mask")
                assert published[2] < billions < 1.0015 * published[2] + 0.05  # norms count
    assert sum(cost.parameters for cost in costs) == totals + MASKS


@pytest.mark.slow
def test_the_parts_have_the_published_costs():
    costs = count_rcnn("resnest50", 80, (800, 1344), norm="frozen", head_norm="none", masks=True)
    assert [round(cost.multiply_adds / 1e9, 1) for cost in costs[1:]] == [60.9, 53.1, 128.9, 53.0]
    assert [round(cost.parameters / 1e6, 2) for cost in costs[1:]] == [
        3.34,
        0.59,
        15.62,
        2.64,
    ]  # biases in place of norms
    plain = RCNNOptions(norm="frozen", head_norm="none", box_convs=0, box_fcs=2)
    assert plain.norm_of_heads == "none"
    # detectron2's plain R-50 FPN has 41.753 M: two fully connected layers, no norms behind the backbone.
    costs = count_rcnn("resnet50_msra", 80, (64, 64), norm="frozen", head_norm="none", box_convs=0, box_fcs=2)
    assert sum(cost.parameters for cost in costs) / 1e6 == pytest.approx(41.753, abs=0.001)


@pytest.mark.slow
def test_kept_memory_is_near_what_a_step_keeps():
    options = {**SMALL, "masks": False, "samples": 40, "rpn_samples": 64, "channels": 32, "proposals": (60, 60)}
    counted = count_kept_rcnn("resnest14_half", 4, (64, 96), 2, **options)
    from resnest_imagenet.models.rcnn import build_rcnn

    model = build_rcnn("resnest14_half", 4, **options)
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(make_images(torch.float32), make_targets(torch.float32))
    really = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)
    assert 0.9 * really < counted < 1.1 * really


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "none"}, "norm=none: bn, frozen, sync are valid"),
        ({"head_norm": "gn"}, "head_norm=gn: bn, frozen, sync and none are valid"),
        ({"anchor_sizes": (32, 64)}, "give anchor_sizes a size for each of the 5 levels"),
        ({"box_fcs": 0}, "box_fcs=0: a box head needs 1 fully connected layer or more"),
        ({"stages": ()}, "stages is empty"),
        ({"stages": CASCADE_STAGES}, "3 stages need cascade=True"),
        ({"cascade": True, "class_agnostic": False}, "class_agnostic must not be false"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ConfigError, match=message):
        RCNNOptions(**options)


def test_unknown_backbone():
    from resnest_imagenet.models.rcnn import build_rcnn

    with pytest.raises(ConfigError, match="unknown model 'resnest51'; did you mean"):
        build_rcnn("resnest51", 80)
