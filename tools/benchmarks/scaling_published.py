"""Published speeds, each with its source; what has none is not here. docs/scaling.md prints the sources."""

from dataclasses import dataclass

from scaling_model import Cluster, Link

SOURCES = {
    "nvidia": "NVIDIA/DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5/README.md, Training "
    "performance results: one A100 80 GB 2470 images/s in mixed precision, 938 in TF32, eight 16621; one V100 16 GB "
    "1200, 367 in fp32, eight 8322",
    "lambda": "lambdal/deeplearning-benchmark, pytorch/pytorch-train-throughput-fp16.csv and -fp32.csv, resnet50, by "
    "the same scripts: one A100 80GB SXM4 1582 (TF32 1066), one H100 80GB SXM5 (1CC) 2791 (TF32 1898), eight 22088",
    "timm": "huggingface/pytorch-image-models, results/benchmark-train-amp-{nhwc,nchw}-pt112-cu113-rtx3090.csv, "
    "train_samples_per_sec, the better of the two layouts",
    "nccl-29": "NVIDIA/nccl-tests issue 29, sjeaugey: a DGX-1 reaches 48 GB/s between nodes, with 4 adapters of "
    "100 Gb/s",
    "nccl-212": "NVIDIA/nccl-tests issue 212, sjeaugey: H100's NVLink has 450 GB/s each way, the protocol costs about "
    "20 %, NCCL's ring reaches 370 GB/s",
    "nccl-290": "NVIDIA/nccl-tests issue 290, AddyLaddy: 46 to 48 GB/s for each adapter of 400 Gb/s",
    "nccl-175": "NVIDIA/nccl-tests issue 175: eight A100 in a node, 232 GB/s",
    "nccl-812": "NVIDIA/nccl issue 812, AddyLaddy: DGX A100 with 8 adapters of 200 Gb/s, 192 GB/s between nodes",
    "deepep-303": "deepseek-ai/DeepEP issue 303, nccl-tests: eight H20 in a node, 12.5 us for a few bytes",
    "nccl-1244": "NVIDIA/nccl issue 1244, nccl-tests: two nodes of 8 GPUs on InfiniBand, 46 us for a few bytes; what "
    "it is longer than inside a node is taken for each level of the tree",
    "dgx-1": "NVIDIA, NVLink (nvidia.com/en-us/data-center/nvlink): six links for each V100, 25 GB/s each way, so 150 "
    "less the protocol's 20 %; a DGX-1 has two Xeon E5-2698 v4 of 20 cores",
    "dgx-a100": "NVIDIA developer blog, Defining AI Innovation with DGX A100: two EPYC 7742 of 64 cores",
    "dgx-h100": "NVIDIA DGX BasePOD reference architecture, Core Components: 112 cores, eight ConnectX-7 of 400 Gb/s",
    "detectron2": "facebookresearch/detectron2, MODEL_ZOO.md, train time: eight V100 in fp32, 16 images",
    "mmseg": "open-mmlab/mmsegmentation, docs/en/model_zoo.md, Training speed: 0.85 s for DeepLabV3+ with ResNet-101, "
    "two images of 1024 x 512 on each of eight V100; and configs/deeplabv3 and configs/resnest, Inf time at 512 x 512 "
    "on ADE20K: ResNet-50 14.76, ResNet-101 10.14, ResNeSt-101 9.28 images/s",
    "imagenet": "huggingface.co/datasets/presencesw/ILSVRC2012: ILSVRC2012_img_train.tar in parts of 41.9, 41.9, 41.9 "
    "and 22.1 GB; 1,281,167 images, so 115 kB on average",
    "coco": "cocodataset.org, Download: train2017, 118K images, 18 GB",
    "ade20k": "ADEChallengeData2016.zip: 22,210 images and their label maps in 923 MB",
}


@dataclass(frozen=True)
class GPU:
    """Nodes of eight GPUs.

    Attributes:
        name: of the GPU and its node.
        speed: images/s of one at training ResNet-50, crop 224, in mixed precision.
        slower: how many times as long a step takes in the precision of fp32 recipes: fp32 on V100, TF32 on others.
        cluster: its links.
        cores: CPU cores of a node.
        sources: names in `SOURCES`.
    """

    name: str
    speed: float
    slower: float
    cluster: Cluster
    cores: int
    sources: tuple[str, ...]


INSIDE = 12.5e-6  # deepep-303
BETWEEN = 46e-6 - INSIDE  # nccl-1244
GPUS = (
    GPU(
        "V100 (DGX-1)",
        *(1200, 1200 / 367),
        Cluster(8, Link(INSIDE, 0.8 * 150e9), Link(BETWEEN, 48e9)),
        40,
        ("nvidia", "nccl-29", "nccl-212", "deepep-303", "nccl-1244", "dgx-1"),
    ),
    GPU(
        "A100 (DGX A100)",
        *(2470, 2470 / 938),
        Cluster(8, Link(INSIDE, 232e9), Link(BETWEEN, 192e9)),
        128,
        ("nvidia", "nccl-175", "nccl-812", "deepep-303", "nccl-1244", "dgx-a100"),
    ),
    GPU(
        "H100 (DGX H100)",
        *(2470 * 2791 / 1582, 2791 / 1898),
        Cluster(8, Link(INSIDE, 370e9), Link(BETWEEN, 8 * 46e9)),
        112,
        ("nvidia", "lambda", "nccl-212", "nccl-290", "deepep-303", "nccl-1244", "dgx-h100"),
    ),
)

# timm's images/s in training on one RTX 3090, mixed precision, and the crop: source "timm". A network of 32x4d is the
# same in timm. There is no figure for skresnext101_32x4d and for the networks called fast in Table 3.
TIMM = {
    "resnet50": (1218.01, 224),
    "resnext50_32x4d": (1001.03, 224),
    "seresnext50_32x4d": (814.69, 224),
    "resnet50d": (1078.00, 224),
    "skresnext50_32x4d": (432.30, 224),
    "resnest50": (534.66, 224),
    "resnet101": (747.89, 224),
    "resnext101_32x4d": (609.01, 224),
    "seresnext101_32x4d": (479.03, 224),
    "resnet101d": (688.26, 224),
    "resnest101": (253.90, 256),
    "resnest200": (83.33, 320),
    "resnest269": (35.75, 416),
}

# Seconds of a step of 16 images on eight V100 in fp32, by row of Tables 5 and 6: source "detectron2".
DETECTORS = {
    ("Faster R-CNN", "resnet50"): 0.210,
    ("Faster R-CNN", "resnet101"): 0.286,
    ("Mask R-CNN", "resnet50"): 0.261,
    ("Mask R-CNN", "resnet101"): 0.340,
    ("Cascade Mask R-CNN", "resnet50"): 0.317,
}
DEEPLAB = (0.85, 1024 * 512)  # seconds of a step with ResNet-101, and the pixels of an image: source "mmseg"
INFERENCE = {"resnet50": 14.76, "resnet101": 10.14, "resnest101": 9.28}  # images/s of DeepLabV3: source "mmseg"
JPEG_BYTES = {"imagenet": 115e3, "coco": 18e9 / 118_287, "ade20k": 923e6 / 22_210}


def scale_speed(gpu: GPU, network: str, crop: int) -> float:
    """Return the images/s of one GPU at training a network in mixed precision.

    timm's ratio to ResNet-50 on its GPU is taken for that of this GPU. A multiply-add costs the same at every crop
    (docs/growth.md), so speed falls with the pixels.
    """
    images, own_crop = TIMM[network]
    return gpu.speed * images / TIMM["resnet50"][0] * (own_crop / crop) ** 2
