# Everything runs from .venv, which `make setup` builds from Python and the package index alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := .venv-oldest

# Idle OpenMP threads sleep: 20 times faster where processes share cores.
export OMP_WAIT_POLICY := PASSIVE
export UV_PYTHON_DOWNLOADS := never
# Without compiled files every process would compile torch again, for seconds.
unexport PYTHONDONTWRITEBYTECODE
# A process with tests on each core, which has its torch on one thread (tests/conftest.py).
PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-segmentation demo-detection test test-quick test-oldest fault-test lint docs picture \
  bench bench-segmentation bench-detection bench-inference growth scaling bench-gpu goals-gpu bench-data options \
  lock clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

setup: $(READY) ## build .venv with all that the project needs

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dali,dev]'
	touch $@

demo: $(READY) ## make the demo images, train on them and evaluate: a few minutes on 2 CPU cores
	$(BIN)/resnest-data demo out=data/demo
	$(BIN)/resnest-train +experiment=demo data.root=data/demo
	$(BIN)/resnest-eval ckpt=runs/demo/checkpoints/best.pt data.root=data/demo crop=[56,64] out=runs/demo/eval.json
	@echo
	@echo "  the run      runs/demo (metrics.jsonl, config.yaml, checkpoints/best.pt)"
	@echo "  its curves   $(BIN)/tensorboard --logdir runs/demo/tensorboard"
	@echo "  next         $(BIN)/resnest-train --help, and README.md"

demo-segmentation: $(READY) ## the same for scenes, from the demo's network: some minutes more
	test -e runs/demo/checkpoints/best.pt || $(MAKE) demo
	$(BIN)/resnest-data demo task=segmentation out=data/demo-scenes
	$(BIN)/resnest-train +experiment=demo_segmentation data.root=data/demo-scenes \
	  train.init_from=runs/demo/checkpoints/best.pt
	$(BIN)/resnest-eval ckpt=runs/demo_segmentation/checkpoints/best.pt data.root=data/demo-scenes

demo-detection: $(READY) ## the same for objects and their masks, from the demo's network: some minutes more
	test -e runs/demo/checkpoints/best.pt || $(MAKE) demo
	$(BIN)/resnest-data demo task=detection out=data/demo-objects
	$(BIN)/resnest-train +experiment=demo_detection data.root=data/demo-objects \
	  train.init_from=runs/demo/checkpoints/best.pt
	$(BIN)/resnest-eval ckpt=runs/demo_detection/checkpoints/best.pt data.root=data/demo-objects

docs: $(READY) ## build the documentation site into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "wrote site/index.html"

picture: $(READY) ## draw the README's picture from the demos' networks and a cascade: needs Chromium, ten minutes at first
	test -e runs/demo_segmentation/checkpoints/best.pt || $(MAKE) demo-segmentation
	test -e data/demo-objects || $(BIN)/resnest-data demo task=detection out=data/demo-objects
	test -e runs/demo_cascade/checkpoints/best.pt || $(BIN)/resnest-train +experiment=demo_detection \
	  data.root=data/demo-objects train.init_from=runs/demo/checkpoints/best.pt train.cascade=true run_dir=runs/demo_cascade
	$(BIN)/python tools/picture.py

test: $(READY) ## run the tests, in at most 4 processes
	$(BIN)/python -m pytest $(PARALLEL)

test-quick: $(READY) ## run those that start no process and take no time, for the inner loop
	$(BIN)/python -m pytest --quick $(PARALLEL)

test-oldest: $(OLDEST)/.ready ## run the tests on the oldest versions that pyproject.toml admits, on Python 3.10
	$(OLDEST)/bin/python -m pytest $(PARALLEL)

$(OLDEST)/.ready: $(READY) pyproject.toml
	$(BIN)/uv venv --quiet --clear --seed --python 3.10 $(OLDEST)
	$(BIN)/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct --editable '.[dali,dev]'
	touch $@

fault-test: $(READY) ## kill, stop, starve and damage real runs: minutes on 2 CPU cores, writes reliability.json
	PYTHONPATH=tests $(BIN)/python -m faults

lint: $(READY) ## check style, format, the Dockerfile and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/mypy

bench: $(READY) ## compare split attention, a training step and inference with timm's, side by side: 20 minutes
	$(BIN)/python tools/benchmarks/bench.py --compile --out docs/performance.json
	$(BIN)/python tools/benchmarks/bench.py --report docs/performance.json > docs/performance.md

bench-segmentation: $(READY) ## compare DeepLabV3 with torchvision's on timm's backbone, side by side: 15 minutes
	$(BIN)/python tools/benchmarks/bench_segmentation.py --out docs/performance_segmentation.json
	$(BIN)/python tools/benchmarks/bench_segmentation.py --report docs/performance_segmentation.json \
	  > docs/performance_segmentation.md

bench-detection: $(READY) ## compare Faster R-CNN with torchvision's on timm's backbone, side by side: 20 minutes
	$(BIN)/python tools/benchmarks/bench_detection.py --out docs/performance_detection.json
	$(BIN)/python tools/benchmarks/bench_detection.py --report docs/performance_detection.json \
	  > docs/performance_detection.md

bench-inference: $(READY) ## compare inference in torch, onnxruntime and OpenVINO, in 8-bit integers too: 15 minutes
	$(BIN)/python tools/benchmarks/bench_inference.py --profile --out docs/performance_inference.json
	$(BIN)/python tools/benchmarks/bench_inference.py --compile --batch 8 --out docs/performance_inference.json
	test -e runs/demo/checkpoints/best.pt || $(MAKE) demo
	$(BIN)/python tools/benchmarks/bench_inference.py --accuracy runs/demo/checkpoints/best.pt data/demo/val \
	  --out docs/performance_inference.json
	$(BIN)/python tools/benchmarks/bench_inference.py --report docs/performance_inference.json \
	  > docs/performance_inference.md

growth: $(READY) ## measure how cost grows with batch, crop and depth, and what surrounds the steps: 30 minutes
	$(BIN)/python tools/benchmarks/growth.py --out docs/growth.json
	$(BIN)/python tools/benchmarks/growth.py --report docs/growth.json > docs/growth.md

scaling: $(READY) ## try the model of many ranks against two, and plan for published GPUs: 5 minutes
	$(BIN)/python tools/benchmarks/scaling.py --out docs/scaling.json
	$(BIN)/python tools/benchmarks/scaling.py --report docs/scaling.json > docs/scaling.md

bench-gpu: ## the same on a GPU, with the Python at hand (PYTHON=...), which needs torch, timm and this project
	PYTHONPATH=src $(PYTHON) tools/benchmarks/bench.py --device cuda --batch 128 --precision bf16 --compile --rounds 20 \
	  --out docs/performance_gpu.json

goals-gpu: ## the table of all goals on a GPU, eight minutes, with the Python at hand: OUT=DIR [IMAGES=DIR]
	PYTHONPATH=src:tools/benchmarks $(PYTHON) tools/gpu/goals.py $(or $(OUT),$(error set OUT=DIR)) \
	  $(if $(IMAGES),--images $(IMAGES))

bench-data: $(READY) ## compare the loaders with torchvision's and DALI's own: IMAGES=DIR, with DIR/<class>/<image>
	$(BIN)/python tools/benchmarks/bench_data.py $(or $(IMAGES),$(error set IMAGES=DIR, with photographs in DIR/<class>/))

options: $(READY) ## write docs/options.md from the schema
	$(BIN)/python tools/options_page.py > docs/options.md.new
	mv docs/options.md.new docs/options.md

lock: $(READY) ## renew constraints.txt
	$(BIN)/uv pip compile --quiet --universal --upgrade --no-header --no-annotate --python-version 3.10 \
	  --extra dali --extra dev --output-file constraints.txt pyproject.toml

clean: ## remove .venv, caches and build products; data/ and runs/ stay
	rm -rf $(VENV) $(OLDEST) build dist site .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
