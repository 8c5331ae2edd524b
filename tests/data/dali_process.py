"""Decodes images with DALI in a process of its own, so that a signal which ends it is seen as one.

python dali_process.py IN OUT: pickled requests and answers.
"""

import os
import pickle
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from resnest_imagenet.data.dali import _to_decodable
from resnest_imagenet.data.dali_decoding import build_decoding
from resnest_imagenet.data.decoding import BadImage
from resnest_imagenet.data.folder import read_image_folder
from resnest_imagenet.data.loader import build_loader
from resnest_imagenet.data.plan import BatchPlan
from resnest_imagenet.data.transforms import EvalTransform, TrainTransform
from resnest_imagenet.errors import DataError

TRANSFORMS = {"evaluation": EvalTransform(32), "training": TrainTransform(32, seed=0)}


def decode_each(images):
    """Return the pixels of each image as the loader gets them, or "bad"."""
    answers, pipeline = [], None
    for encoded in images:
        for by_pillow in (False, True):  # where DALI refuses it
            if pipeline is None:
                pipeline = build_decoding("cpu", torch.device("cpu"))
            try:
                pipeline.feed_input("encoded", [np.frombuffer(_to_decodable(encoded, by_pillow), np.uint8)])
                (pixels,) = pipeline.run()
            except BadImage:
                answers.append("bad")
                break
            except RuntimeError:
                assert not by_pillow
                pipeline = None
            else:
                answers.append(np.array(pixels.at(0)))
                break
    return answers


def load(root, kind, batch, max_errors):
    """Make a pass of the DALI loader over <root>/train; return the bad images that it counts, or its error."""
    images = read_image_folder(root, "train", "x")
    plan = BatchPlan(len(images), batch, len(images) // batch)
    loader = build_loader("dali", images, plan, TRANSFORMS[kind], torch.device("cpu"), 4, max_errors)
    try:
        assert sum(len(labels) for _, labels in loader.batches(0)) == len(images)
    except DataError as error:
        return str(error)
    return sorted(loader.substitution.bad)


if __name__ == "__main__":
    images, passes = pickle.loads(Path(sys.argv[1]).read_bytes())
    Path(sys.argv[2]).write_bytes(pickle.dumps((decode_each(images), [load(*each) for each in passes])))
