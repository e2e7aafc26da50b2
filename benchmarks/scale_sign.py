"""What the sign of the scale is worth: perplexity of SmolLM2-135M after rounding every block to 4 bits in three ways.

"signed": the weight of largest magnitude lies on −2^(b−1) (the package's symmetric grid); "zero point": asymmetric;
"unsigned": the textbook symmetric grid, scale = max|w| / (2^(b−1) − 1). The models are dense with rounded weights, so
only the grid differs.

    uv run python benchmarks/scale_sign.py --text wikitext2_test.txt
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path

import compressed_tensors
import torch
import transformers
from text_windows import arguments, windows_of
from transformers import AutoModelForCausalLM

from hf_cptquant.demo import write_bundled_model
from hf_cptquant.evaluate import perplexity
from hf_cptquant.grid import dequantize, fit_grid, quantize
from hf_cptquant.model_view import view_model
from hf_cptquant.plan import LayerScheme

GROUP_SIZE, BITS = 64, 4
RESULTS = Path(__file__).parent / "results" / "scale_sign.json"


def rounded(weight: torch.Tensor, grid: str) -> torch.Tensor:
    """A weight on one of the three grids, dequantized."""
    scheme = LayerScheme(BITS, GROUP_SIZE, grid != "zero point")
    scale, zero_point = fit_grid(weight, scheme)
    if grid == "unsigned":
        grouped = weight.float().view(len(weight), -1, GROUP_SIZE)
        scale = (grouped.abs().amax(-1) / (2 ** (BITS - 1) - 1)).to(weight.dtype)
    quantized = quantize(weight, scale, zero_point, scheme)
    return dequantize(quantized.integers, quantized.scale, quantized.zero_point)


def main() -> None:
    """Measure, write the result file, print it as the last line."""
    given, found = arguments(__doc__), {}
    with tempfile.TemporaryDirectory() as folder:
        write_bundled_model(Path(folder))
        windows = windows_of(given.text, given.windows, Path(folder))
        for grid in ("bfloat16", "signed", "zero point", "unsigned"):
            model = AutoModelForCausalLM.from_pretrained(folder)
            plan = view_model(model).plan("module")
            if grid != "bfloat16":
                for module in plan.modules:
                    weight = model.get_submodule(module.name).weight
                    weight.data = rounded(weight.data, grid)
            scheme = LayerScheme(BITS, GROUP_SIZE, grid != "zero point") if grid != "bfloat16" else LayerScheme(16)
            bits = 8 * sum(scheme.nbytes(m.out_features, m.in_features, 2) for m in plan.modules) / plan.weights
            found[grid] = {
                "perplexity": round(perplexity(model, windows, 4, grid), 3),
                "bits_per_weight": round(bits, 4),
            }
    result = {
        "command": f"python benchmarks/scale_sign.py --text {given.text.name} --windows {given.windows}",
        "model": "SmolLM2-135M-Instruct",
        "tokens": windows.numel(),
        "group_size": GROUP_SIZE,
        "results": found,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "compressed-tensors": compressed_tensors.__version__,
            "python": sys.version.split()[0],
        },
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
