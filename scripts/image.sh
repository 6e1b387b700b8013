#!/usr/bin/env bash
# What the image is made of. The Dockerfile runs these steps, and so does a test, on a machine without Docker.
#
#   image.sh build DIST           builds wheels of this source and of what comes without one, with the tools of requirements/build.txt
#   image.sh install PREFIX DIST  makes PREFIX: a virtual environment with what requirements/image.txt pins by hash, and those wheels
#   image.sh lock                 pins anew what pyproject.toml asks for; look at the difference, and commit it
#
# PREFIX should not be moved afterwards: the programs in it name it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
pip="pip --disable-pip-version-check --no-input"
source_only=pysyncobj  # published as source alone

# Prints the entries of requirements/image.txt that are of that package, or, with "others", all but those.
entries() {
  awk -v name="$source_only" -v others="${1:-}" '
    /^[^ #]/ { own = index($0, name "==") == 1 }
    /^[^#]/ && (others ? !own : own)' requirements/image.txt
}

case "${1:-}" in
build)
  dist=${2:?DIST}
  tools=$(mktemp -d)
  trap 'rm -rf "$tools"' EXIT
  "$python" -m venv "$tools"
  "$tools/bin/python" -m $pip install --quiet --require-hashes --only-binary :all: -r requirements/build.txt
  "$tools/bin/python" -m $pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$dist" .
  entries > "$tools/source.txt"
  "$tools/bin/python" -m $pip wheel --quiet --no-deps --no-build-isolation --no-binary "$source_only" --require-hashes \
    --wheel-dir "$dist" -r "$tools/source.txt"
  ;;
install)
  prefix=${2:?PREFIX}; dist=${3:?DIST}
  "$python" -m venv "$prefix"
  "$prefix/bin/python" -m $pip install --quiet --no-deps --require-hashes --only-binary :all: -r <(entries others)
  "$prefix/bin/python" -m $pip install --quiet --no-deps --no-index "$dist"/*.whl
  "$prefix/bin/python" -m $pip check
  "$prefix/bin/python" -m compileall -q "$prefix/lib"
  "$prefix/bin/python" -m $pip uninstall --quiet --yes pip setuptools 2>/dev/null || true  # nothing is installed later
  ;;
lock)
  tools=$(mktemp -d)
  trap 'rm -rf "$tools"' EXIT
  "$python" -m venv "$tools"
  "$tools/bin/python" -m $pip install --quiet uv
  compile=("$tools/bin/uv" pip compile --quiet --generate-hashes --python-version 3.11 --python-platform linux --no-emit-index-url
           --custom-compile-command "scripts/image.sh lock")
  "${compile[@]}" pyproject.toml --extra broker --extra jwt --extra dispatch --extra cli -o requirements/image.txt
  printf 'hatchling\nsetuptools\nwheel\n' | "${compile[@]}" - -o requirements/build.txt
  ;;
*)
  sed -n '4,6s/^# *//p' "$0" >&2
  exit 2
  ;;
esac
