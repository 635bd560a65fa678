#!/usr/bin/env bash
# One suite by its name; options go to pytest. What each is, and how long it takes, stands in
# docs/reliability.md.
set -euo pipefail
cd "$(dirname "$0")/.."
suite=${1:?"usage: scripts/reliability.sh faults | kills | fuzz | first-hour [option ...]"}
shift
source scripts/environment.sh
if [ "$suite" = first-hour ]; then
  exec "$(find_python)" scripts/first_hour.py "$@"
fi
use_environment .venv-test "[test]"
case $suite in
  faults) exec "$PYTHON" -m pytest --numprocesses 2 tests/faults tests/train/test_faults.py "$@" ;;
  kills)
    exec "$PYTHON" -m pytest -s --long tests/convert/test_kill.py tests/train/test_kill_run.py \
      tests/train/test_kill_export.py "$@"
    ;;
  fuzz) HYPOTHESIS_PROFILE=long exec "$PYTHON" -m pytest -s tests/faults/test_fuzz.py "$@" ;;
  *) echo "no suite $suite: faults, kills, fuzz, first-hour" >&2; exit 2 ;;
esac
