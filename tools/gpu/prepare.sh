#!/usr/bin/env bash
# Collect what a machine without an index needs beside its own torch, torchvision, timm and tensorboard: wheels for
# its Python in pieces of 50 MB under FOLDER. There: tools/gpu/install.sh FOLDER, then tools/gpu/measure.py OUT.
#   tools/gpu/prepare.sh FOLDER [python version, default 3.12]
set -euo pipefail
folder=$1 version=${2:-3.12}
constraints=$(dirname "$0")/../../constraints.txt
mkdir -p "$folder/wheels"
# A source package: pure Python, so a wheel built by any Python serves.
python3 -m pip wheel --quiet --no-deps --wheel-dir "$folder/wheels" antlr4-python3-runtime==4.9.3
python3 -m pip download --quiet --only-binary :all: --python-version "$version" --platform manylinux_2_28_x86_64 \
  --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any --no-deps --constraint "$constraints" --dest "$folder/wheels" \
  hydra-core omegaconf pycocotools hotcoco nvidia-dali-cuda130 astunparse gast six wheel makefun libcst \
  nvtx optree pydantic pydantic-core annotated-types typing-inspection nvidia-nvimgcodec-cu13 nvidia-nvjpeg nvidia-nvjpeg2k-cu13 nvidia-nvtiff-cu13 nvidia-libnvcomp-cu13
tar -C "$folder" -cf - wheels | split --bytes 50M - "$folder/wheels.tar.part-"
rm -r "$folder/wheels"
ls -l "$folder"
