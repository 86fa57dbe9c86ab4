#!/usr/bin/env bash
# Installs the project with its test extra and runs the tests. Options go to pytest, e.g.
#   bash tests/run.sh tests/schedule_test.py -k native
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
install_into "${VENV:-.venv-test}" ".[test]"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
exec "${VENV:-.venv-test}/bin/python" -m pytest -n "${WORKERS:-2}" "$@"
