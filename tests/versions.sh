#!/usr/bin/env bash
# The core of the tests with other versions of what this package stands on: all sets of versions, or those named.
#
#   tests/versions.sh [oldest] [older] [newest]
#
# Each set is an environment in a temporary folder whose files are links into uv's cache. UV_PYTHON chooses its Python,
# CORE other test files.
# Versions are forced: compressed-tensors asks for torch 2.10, but works with 2.9.
set -euo pipefail
cd "$(dirname "$0")/.."

declare -A sets=(
    [oldest]="transformers==5.16.* torch==2.9.* compressed-tensors==0.17.*"
    [older]="transformers==5.17.* torch==2.10.* compressed-tensors==0.18.*"
    [newest]=""
)
unset UV_COMPILE_BYTECODE  # the files are links
core=${CORE:-packing grid modules experts model_view checkpoint plain_reload backend citizen llama_cpp/architectures}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
[ $# -gt 0 ] || set -- oldest older newest
for name in "$@"; do
    tr ' ' '\n' <<<"${sets[$name]}" >"$folder/$name.txt"
    uv venv --quiet "$folder/$name"
    python="$folder/$name/bin/python"
    uv pip install --quiet --link-mode symlink --python "$python" --overrides "$folder/$name.txt" \
        --editable . --group dev --group demo
    echo "$name: $(uv pip freeze --quiet --python "$python" | grep -E '^(transformers|torch|compressed-tensors)==' | xargs)"
    "$python" -m pytest -p no:cacheprovider --quiet $(sed -E 's#(\S*/)?(\S+)#tests/\1test_\2.py#g' <<<"$core")
done
