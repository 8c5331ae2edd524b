#!/usr/bin/env bash
# Join the pieces of prepare.sh and install them into this machine's Python, which has torch already.
set -euo pipefail
folder=$1
cat "$folder"/wheels.tar.part-* | tar -C "$folder" -xf -
python3 -m pip install --quiet --no-index --no-deps "$folder"/wheels/*.whl
python3 -c "import hydra, nvidia.dali, omegaconf, pydantic, torch; print(torch.__version__, nvidia.dali.__version__)"
