#!/usr/bin/env bash
# Sets everything up and runs the tests that need no torch; options go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
use_environment .venv-test "[test]"
exec "$PYTHON" -m pytest --numprocesses 2 "$@"
