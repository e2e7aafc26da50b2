#!/usr/bin/env bash
# The core of the tests, with what this package stands on in other versions: all sets of them, or those that are named.
#
#   tests/versions.sh                # all
#   tests/versions.sh oldest newest
#
# Each set gets an environment in a temporary folder whose files are links into uv's cache.
set -euo pipefail
cd "$(dirname "$0")/.."

declare -A sets=(
    [oldest]="transformers==5.16.* torch==2.10.* compressed-tensors==0.17.*"
    [torch-2.9]="transformers==5.17.* torch==2.9.* compressed-tensors==0.17.*"
    [transformers-5.17]="transformers==5.17.* torch compressed-tensors==0.18.*"
    [newest]="transformers torch compressed-tensors"
)
declare -A pythons=([oldest]=3.10 [torch-2.9]=3.11 [transformers-5.17]=3.11 [newest]=3.11)
core=(packing grid modules model_view checkpoint backend citizen plain_reload)

for name in "${@:-oldest}"; do
    echo "$name"
done
