#!/usr/bin/env bash
# Sets up everything and runs the smallest study, on the CPU of a fresh machine that has Python 3.11 or 3.12.
# A second call reuses the environment and the finished runs. Options go to launch.study, e.g.
#   bash launch/quickstart.sh --config=experiments/quickstart.py:steps=60,seeds=2 --workdir=runs/tiny
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
install_into .venv "."
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
exec .venv/bin/python -m launch.study --config=experiments/quickstart.py --workdir=runs/quickstart "$@"
