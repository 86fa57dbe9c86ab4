#!/usr/bin/env bash
# Installs the project with its test extra, or another one ($EXTRA), and runs the tests. Options go to pytest, e.g.
#   bash tests/run.sh tests/schedule_test.py -k native
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
install_into "${VENV:-.venv-test}" ".[${EXTRA:-test}]"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
exec "${VENV:-.venv-test}/bin/python" -m pytest -n "${WORKERS:-2}" --dist worksteal "$@"
