"""The names of COCO's classes, for published detectors, whose files have no names."""

import functools

NOTHING = "N/A"  # a category id that COCO has given to no class


@functools.cache
def coco_categories() -> tuple[str, ...]:
    """Return the names of COCO's category ids 1 to 90, as torchvision has them; `NOTHING` for ten of them."""
    from resnest_imagenet.torchvision_import import importing_torchvision  # it imports torch

    with importing_torchvision():
        from torchvision.models.detection import FasterRCNN_ResNet50_FPN_V2_Weights

    background, *names = FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"]
    assert background == "__background__"
    return tuple(names)


def coco_classes() -> list[str]:
    """Return the names of COCO's 80 classes in the order of their ids."""
    return [name for name in coco_categories() if name != NOTHING]
