#!/usr/bin/env bash
# Sets everything up and answers a prompt with the embedded phi3-tiny-demo model.
# Options go to phi3-generate: bash scripts/demo.sh "What is 7 + 5?" --stats
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
use_environment .venv ""
[ $# -gt 0 ] || set -- "What is the capital of France?"
exec "$PYTHON" -c "from phi3_jax.cli import generate_command; generate_command()" "$@"
