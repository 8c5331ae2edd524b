"""A detector's arithmetic written out in float64, box by box, from the papers and from what detectron2 computes.

It takes the pyramid's levels and a detector's state dict, and nothing else of the network. Nothing is drawn at random:
the settings of a test let every anchor and every proposal be sampled.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

LIMIT = math.log(1000 / 16)  # of dw and dh


def list_anchors(shapes, strides, sizes, ratios):
    """Return the anchors of the levels, a list of float64 (n, 4)."""
    levels = []
    for (rows, columns), stride, size in zip(shapes, strides, sizes, strict=True):
        boxes = []
        for row in range(rows):
            for column in range(columns):
                for ratio in ratios:
                    width = math.sqrt(size * size / ratio)
                    height = ratio * width
                    x, y = column * stride, row * stride
                    boxes.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
        levels.append(torch.tensor(boxes, dtype=torch.float64))
    return levels


def iou(a, b):
    """Return the intersection over union of two boxes."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def match(boxes, target):
    """Return float64 (objects, boxes)."""
    return np.array([[iou(object_, box) for box in boxes.tolist()] for object_ in target.boxes.tolist()])


def encode(box, wanted, weights):
    """Return the four differences between a box and the one that is wanted."""
    width, height = box[2] - box[0], box[3] - box[1]
    wanted_width, wanted_height = wanted[2] - wanted[0], wanted[3] - wanted[1]
    dx = ((wanted[0] + wanted[2]) / 2 - (box[0] + box[2]) / 2) / width
    dy = ((wanted[1] + wanted[3]) / 2 - (box[1] + box[3]) / 2) / height
    differences = (dx, dy, math.log(wanted_width / width), math.log(wanted_height / height))
    return [weight * difference for weight, difference in zip(weights, differences, strict=True)]


def decode(box, differences, weights):
    """Return the box that the differences lead to."""
    width, height = box[2] - box[0], box[3] - box[1]
    dx, dy, dw, dh = (difference / weight for difference, weight in zip(differences, weights, strict=True))
    x, y = (box[0] + box[2]) / 2 + dx * width, (box[1] + box[3]) / 2 + dy * height
    width, height = width * math.exp(min(dw, LIMIT)), height * math.exp(min(dh, LIMIT))
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def clip(box, size):
    """Return a box cut at the rim of an image of (height, width)."""
    return [min(max(value, 0.0), float(size[1 - k % 2])) for k, value in enumerate(box)]


def has_area(box):
    return box[2] > box[0] and box[3] > box[1]


def suppress(boxes, scores, limit):
    """Return the indices of the boxes that stay, the best first."""
    kept = []
    for place in sorted(range(len(boxes)), key=lambda place: -scores[place]):
        if all(iou(boxes[place], boxes[other]) <= limit for other in kept):
            kept.append(place)
    return kept


def pool(levels, boxes, side, options, strides=(4, 8, 16, 32)):
    """Return the features of the boxes of all images, (n, C, side, side)."""
    pooled = []
    for image, of_image in enumerate(boxes):
        for box in of_image.tolist():
            size = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
            number = int(min(max(math.floor(4 + math.log2(size / options.canonical_size) + 1e-6), 2), 5)) - 2
            pooled.append(align(levels[number][image], [value / strides[number] for value in box], side, options))
    return torch.stack(pooled) if pooled else levels[0].new_zeros(0, levels[0].shape[1], side, side)


def align(level, box, side, options):
    """Return the features (C, side, side) of a box in cells of a level: the mean of bilinear samples."""
    shift = 0.5 if options.aligned else 0.0
    x1, y1, x2, y2 = (value - shift for value in box)
    width, height = x2 - x1, y2 - y1
    if not options.aligned:
        width, height = max(width, 1.0), max(height, 1.0)
    samples = options.sampling or max(1, math.ceil(height / side)), options.sampling or max(1, math.ceil(width / side))
    ys = [y1 + height * (row + (k + 0.5) / samples[0]) / side for row in range(side) for k in range(samples[0])]
    xs = [x1 + width * (column + (k + 0.5) / samples[1]) / side for column in range(side) for k in range(samples[1])]
    rows, columns = (torch.stack([hat(value, length) for value in values])
                     for values, length in ((ys, level.shape[1]), (xs, level.shape[2])))  # fmt: skip
    sampled = torch.einsum("ry,cyx,sx->crs", rows, level, columns)
    return sampled.unflatten(1, (side, -1)).unflatten(3, (side, -1)).mean((2, 4))


def hat(place, length):
    """Return the weights (length,) of the cells in a bilinear sample along one axis."""
    weights = torch.zeros(length, dtype=torch.float64)
    if not -1 <= place <= length:
        return weights
    place = min(max(place, 0.0), length - 1.0)
    below = int(place)
    weights[below] += 1 - (place - below)
    if place > below:
        weights[below + 1] += place - below
    return weights


def convolve(x, state, prefix, training):
    """Return a convolution, its batch norm and a ReLU."""
    x = F.conv2d(x, state[f"{prefix}.0.weight"], state.get(f"{prefix}.0.bias"), padding=1)
    if f"{prefix}.1.weight" in state:
        if training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        else:
            mean, var = state[f"{prefix}.1.running_mean"], state[f"{prefix}.1.running_var"]
        x = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + 1e-5)
        x = x * state[f"{prefix}.1.weight"][:, None, None] + state[f"{prefix}.1.bias"][:, None, None]
    return x.relu()


def run_box_head(pooled, state, prefix, options, training):
    """Return logits (n, 1 + K) and differences (n, ., 4) of one stage."""
    x = pooled
    for number in range(options.box_convs):
        x = convolve(x, state, f"{prefix}.body.{number}", training)
    x = x.flatten(1)
    for number in range(options.box_fcs):
        name = f"{prefix}.body.{options.box_convs + 1 + 2 * number}"
        x = (x @ state[f"{name}.weight"].t() + state[f"{name}.bias"]).relu()
    logits, differences = (
        x @ state[f"{prefix}.{name}.weight"].t() + state[f"{prefix}.{name}.bias"] for name in ("classify", "regress")
    )
    return logits, differences.reshape(len(x), -1, 4)


def run_rpn(levels, state):
    """Return objectness (B, n) and differences (B, n, 4) of each level: by row, column and ratio."""
    outputs = []
    for level in levels:
        x = convolve(level, state, "rpn.head.conv.0", training=True)
        scores, differences = (
            F.conv2d(x, state[f"rpn.head.{name}.weight"], state[f"rpn.head.{name}.bias"])
            for name in ("cls_logits", "bbox_pred")
        )
        batch, ratios, rows, columns = scores.shape
        differences = differences.reshape(batch, ratios, 4, rows, columns).permute(0, 3, 4, 1, 2)
        outputs.append((scores.permute(0, 2, 3, 1).flatten(1), differences.reshape(batch, -1, 4)))
    return outputs


def propose(outputs, anchors, sizes, candidates, proposals, options):
    """Return the proposals of each image."""
    result = []
    for image, size in enumerate(sizes):
        chosen = []
        for (scores, differences), of_level in zip(outputs, anchors, strict=True):
            best = scores[image].argsort(descending=True)[:candidates].tolist()
            boxes = [clip(decode(of_level[k].tolist(), differences[image, k].tolist(), (1,) * 4), size) for k in best]
            scored = [(box, scores[image, k].item()) for box, k in zip(boxes, best, strict=True) if has_area(box)]
            kept = suppress([box for box, _ in scored], [score for _, score in scored], options.rpn_nms)
            chosen += [scored[place] for place in kept]
        chosen.sort(key=lambda scored: -scored[1])
        result.append(torch.tensor([box for box, _ in chosen[:proposals]], dtype=torch.float64).reshape(-1, 4))
    return result


def compute_rpn_losses(outputs, anchors, targets, options):
    """Return the losses of objectness and boxes; every anchor that is not in between is sampled."""
    flat = torch.cat(anchors)
    objectness = boxes = torch.zeros((), dtype=torch.float64)
    for image, target in enumerate(targets):
        scores = torch.cat([of_level[image] for of_level, _ in outputs])
        differences = torch.cat([of_level[image] for _, of_level in outputs])
        overlaps = match(flat, target) if len(target) else np.zeros((1, len(flat)))
        best = overlaps.max(0)
        is_positive = best >= options.rpn_ious[1]
        if len(target):  # the best anchors of each object, however little they overlap
            is_positive |= (overlaps == overlaps.max(1, keepdims=True)).any(0)
        for k in range(len(flat)):
            if is_positive[k]:
                wanted = encode(flat[k].tolist(), target.boxes[overlaps[:, k].argmax()].tolist(), (1,) * 4)
                objectness = objectness + torch.log1p(torch.exp(-scores[k]))
                boxes = boxes + sum((differences[k, d] - wanted[d]).abs() for d in range(4))
            elif best[k] < options.rpn_ious[0]:
                objectness = objectness + torch.log1p(torch.exp(scores[k]))
    divisor = options.rpn_samples * len(targets)
    return [objectness / divisor, boxes / divisor]


def label(boxes, targets, min_iou):
    """Return of each image the label of each box, 0 the background, and its object."""
    result = []
    for of_image, target in zip(boxes, targets, strict=True):
        overlaps = match(of_image, target) if len(target) and len(of_image) else np.zeros((1, len(of_image)))
        objects = overlaps.argmax(0)
        result.append([(int(target.labels[k]) + 1 if overlaps[k, n] >= min_iou else 0, k)
                       for n, k in enumerate(objects)])  # fmt: skip
    return result


def compute_box_losses(logits, differences, boxes, labels, targets, weights):
    """Return the losses of classes and boxes of one stage."""
    flat = [(box.tolist(), label_, target.boxes[k].tolist() if label_ else None)
            for of_image, of_labels, target in zip(boxes, labels, targets, strict=True)
            for box, (label_, k) in zip(of_image, of_labels, strict=True)]  # fmt: skip
    class_loss = box_loss = logits.sum() * 0
    for n, (box, label_, wanted) in enumerate(flat):
        class_loss = class_loss + torch.logsumexp(logits[n], 0) - logits[n, label_]
        if label_:
            own = differences[n, 0 if differences.shape[1] == 1 else label_ - 1]
            box_loss = box_loss + sum((own[d] - value).abs() for d, value in enumerate(encode(box, wanted, weights)))
    return [class_loss / len(flat), box_loss / len(flat)]


def compute_mask_loss(levels, state, boxes, labels, targets, options):
    """Return the loss of the masks of the positives."""
    chosen = [[n for n, (label_, _) in enumerate(of_image) if label_] for of_image in labels]
    positives = [of_image[places] for of_image, places in zip(boxes, chosen, strict=True)]
    logits = run_mask_head(pool(levels, positives, 14, options), state, options, training=True)
    losses, n = [], 0
    for of_image, places, of_labels, target in zip(positives, chosen, labels, targets, strict=True):
        for box, place in zip(of_image.tolist(), places, strict=True):
            label_, k = of_labels[place]
            wanted = torch.from_numpy(fill(target.masks[k], box)).double()
            own = logits[n, label_ - 1]
            losses.append((torch.log1p(torch.exp(own)) - wanted * own).mean())
            n += 1
    return torch.stack(losses).mean() if losses else logits.sum() * 0


def run_mask_head(pooled, state, options, training):
    """Return logits (n, K, 28, 28)."""
    x = pooled
    for number in range(options.mask_convs):
        x = convolve(x, state, f"roi_heads.masks.body.{number}", training)
    prefix = "roi_heads.masks.predictor"
    weight, bias = state[f"{prefix}.conv5_mask.weight"], state[f"{prefix}.conv5_mask.bias"]
    # Each cell becomes 2 x 2 cells that do not overlap.
    x = torch.einsum("ncyx,cdab->ndyaxb", x, weight).flatten(4, 5).flatten(2, 3) + bias[:, None, None]
    weight, bias = state[f"{prefix}.mask_fcn_logits.weight"], state[f"{prefix}.mask_fcn_logits.bias"]
    return torch.einsum("ncyx,kc->nkyx", x.relu(), weight[:, :, 0, 0]) + bias[:, None, None]


def fill(polygons, box, side=28):
    """Return bool (side, side): what pycocotools draws of polygons that were moved into the box's frame."""
    from pycocotools import mask

    moved = []
    for polygon in polygons:
        xs = (polygon[0::2] - box[0]) * side / (box[2] - box[0])
        ys = (polygon[1::2] - box[1]) * side / (box[3] - box[1])
        moved.append([value for point in zip(xs, ys, strict=True) for value in point])
    return np.any([mask.decode(code) for code in mask.frPyObjects(moved, side, side)], axis=0)


def detect(boxes, probabilities, size, options):
    """Return (boxes, scores, labels) of one image; boxes (n, K or 1, 4) as lists."""
    chosen = []
    for label_ in range(probabilities.shape[1] - 1):
        scored = []
        for n, own in enumerate(boxes):
            box, score = clip(own[0 if len(own) == 1 else label_], size), probabilities[n, label_ + 1].item()
            if score > options.min_score and min(box[2] - box[0], box[3] - box[1]) >= 0.01:  # torchvision's rule
                scored.append((box, score))
        kept = suppress([box for box, _ in scored], [score for _, score in scored], options.nms)
        chosen += [(*scored[place], label_) for place in kept]
    chosen.sort(key=lambda detection: -detection[1])
    return [list(values) for values in zip(*chosen[: options.detections], strict=True)]


def run_stages(levels, boxes, sizes, state, options, training, targets=None, scale=lambda pooled: pooled):
    """Return the losses of all stages; or the last stage's boxes and the mean of the probabilities."""
    losses, probabilities, labels = [], [], []
    for number, (min_iou, weights) in enumerate(options.all_stages):
        if training:
            if number:
                boxes = [torch.stack([box for box in of_image if has_area(box)]) for of_image in boxes]
            labels.append(label(boxes, targets, min_iou))
        pooled = scale(pool(levels, boxes, 7, options))
        logits, differences = run_box_head(pooled, state, f"roi_heads.stages.{number}", options, training)
        if training:
            losses += compute_box_losses(logits, differences, boxes, labels[-1], targets, weights)
        probabilities.append(logits.softmax(1))
        decoded = [[decode(box.tolist(), own.tolist(), weights) for own in of_box]
                   for box, of_box in zip(torch.cat(boxes), differences, strict=True)]  # fmt: skip
        rest = iter(decoded)
        boxes = [torch.tensor([clip(next(rest)[0], size) for _ in of_image], dtype=torch.float64)
                 for of_image, size in zip(boxes, sizes, strict=True)]  # fmt: skip
    return (losses, labels) if training else (decoded, sum(probabilities) / len(probabilities))
