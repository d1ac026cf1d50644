#!/usr/bin/env bash
# Writes requirements.lock from pyproject.toml: exact versions, no host names. Review the difference:
# torch, NeMo, megatron-core and Lightning move together or not at all (CONTRIBUTING.md).
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$(command -v uv || echo .venv/bin/uv)
# Every extra but `neuron`, whose packages are on AWS's index only.
extras=(--extra nemo --extra xla --extra s3 --extra test --extra dev)
"$uv" pip compile pyproject.toml --quiet "${extras[@]}" --no-emit-index-url --python-version 3.11 -o requirements.lock
if grep -v '^#' requirements.lock | grep -E '://|index-url|find-links'; then
  echo "lock.sh: requirements.lock names a host" >&2
  exit 1
fi
