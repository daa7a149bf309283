#!/bin/sh
# Install pace with what its tests need into .venv (made if missing) and run the suite. Arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
.venv/bin/python -m pip install --quiet --disable-pip-version-check ".[test]"
exec .venv/bin/python -m pytest "$@"
