# shellcheck shell=bash
# Sourced by launch/quickstart.sh and tests/run.sh: finds a Python and installs the project.

# Prints the first Python on the PATH that the project supports; $PYTHON overrides.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.12 python3.11 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or 3.12 on the PATH; install one, or name it: PYTHON=/path/to/python3.12 bash $0" >&2
  return 1
}

# install_into VENV WHAT: makes the virtual environment VENV and installs WHAT (e.g. ".[test]") into it, editable;
# does nothing if setup.cfg has not changed since the last time.
install_into() {
  local venv=$1 what=$2 python stamp
  stamp="$venv/.installed-$(cksum < setup.cfg | cut -d' ' -f1)-$(printf '%s' "$what" | cksum | cut -d' ' -f1)"
  [ -e "$stamp" ] && return
  python=$(find_python) || return
  echo "installing into $venv with $("$python" --version) (about a minute) ..."
  "$python" -m venv "$venv" &&
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip &&
    PYTHONWARNINGS=ignore "$venv/bin/python" -m pip install --quiet --disable-pip-version-check ${CONSTRAINTS:+--constraint "$CONSTRAINTS"} -e "$what" &&
    touch "$stamp"  # whether or not the caller has set -e
}
