#!/usr/bin/env bash
# Makes .venv with everything that a target needs. Arguments: the extras, e.g. "broker,cli". Quick when nothing changed.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:?extras}
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "Spillway needs Python 3.11 or newer; $("$python" --version) was found. Set PYTHON=/path/to/python3.11." >&2; exit 1; }

if [ ! -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  rm -rf .venv
  if ! "$python" -m venv .venv 2>/dev/null; then
    # Debian ships venv apart from Python.
    rm -rf .venv
    if [ "$(id -u)" = 0 ]; then as_root=; elif command -v sudo >/dev/null; then as_root=sudo; else
      echo "Python's venv module is missing. Install it: apt-get install python3-venv" >&2; exit 1; fi
    echo "Installing python3-venv (part of Python that Debian packages apart) ..."
    $as_root apt-get update -q >/dev/null && $as_root apt-get install -q -y python3-venv >/dev/null
    "$python" -m venv .venv
  fi
fi

stamp=.venv/.spillway-$(echo "$extras" | tr ',' '-')
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  echo "Installing into .venv (extras: $extras) ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$extras]"
  touch "$stamp"
fi
