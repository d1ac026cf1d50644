#!/usr/bin/env bash
# Writes requirements.lock and requirements-neuron.lock from pyproject.toml: exact versions, no host names. Review the
# difference: torch, NeMo, megatron-core and Lightning move together or not at all (CONTRIBUTING.md).
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$(command -v uv || echo .venv/bin/uv)
# Every extra but `neuron`, whose packages are on AWS's index only.
extras=(--extra nemo --extra xla --extra s3 --extra test --extra dev)
"$uv" pip compile pyproject.toml --quiet "${extras[@]}" --no-emit-index-url --python-version 3.11 -o requirements.lock
# The stack of the neuron lane (docs/neuron.md): the torch that TorchNeuron is released for, no torch-xla, and of all
# else the versions of requirements.lock, which uv keeps where it finds them in the file.
torch=2.14.0
neuron=requirements-neuron.lock
overrides=$(mktemp)
trap 'rm -f "$overrides"' EXIT
printf 'torch==%s\ntorchvision\n' "$torch" > "$overrides"
grep -vE '^ *#|^(torch|torchvision|triton|torch-xla|nvidia-.*)==' requirements.lock > "$neuron"
"$uv" pip compile pyproject.toml --quiet --extra nemo --extra s3 --extra test --extra dev --override "$overrides" \
  --no-emit-index-url --python-version 3.11 --custom-compile-command tools/lock.sh -o "$neuron"
sed -i -E 's|^( +#.*) --override [^ ]+|\1 an override|; /^ +# +--override/d' "$neuron"
for lock in requirements.lock "$neuron"; do
  if grep -v '^#' "$lock" | grep -E '://|index-url|find-links|/tmp'; then
    echo "lock.sh: $lock names a host or a path" >&2
    exit 1
  fi
done
