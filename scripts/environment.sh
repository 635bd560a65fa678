# Sourced by demo.sh and test.sh: a Python environment with this checkout installed.
#
# An active virtual environment is used as it is; otherwise one is made in the folder $1. What is
# installed there already is left alone until pyproject.toml changes.

use_environment() {
  local folder=$1 extras=$2
  if [ -n "${VIRTUAL_ENV:-}" ]; then
    folder=$VIRTUAL_ENV
  elif ! "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
    "$(find_python)" -m venv "$folder"
  fi
  PYTHON=$folder/bin/python
  local stamp=$folder/.phi3-jax$extras
  if [ ! "$stamp" -nt pyproject.toml ]; then
    echo "Installing phi3-jax$extras into $folder ..." >&2
    "$PYTHON" -m pip install --quiet --editable ".$extras"
    touch "$stamp"
  fi
}

find_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11; do
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
        2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "phi3-jax needs Python 3.11, 3.12 or 3.13; none was found" >&2
  return 1
}
