"""What few bits for the matrix that looks tokens up and predicts them cost: perplexity of SmolLM2-135M with that matrix
alone packed, once for both uses, and all else in bfloat16.

The bundled weights lie on a grid of groups of 32, so groups are of 64 (8 bits: per row).

    uv run python benchmarks/tied_embedding.py --text wikitext2_test.txt
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from environment import environment
from text_windows import arguments, windows_of
from transformers import AutoModelForCausalLM

from hf_cptquant.demo import write_bundled_model
from hf_cptquant.evaluate import perplexity
from hf_cptquant.model_view import input_embedding, view_model
from hf_cptquant.plan import scheme_for
from hf_cptquant.quantize import apply_plan

GROUP_SIZE, WIDTHS = 64, (16, 8, 4)
RESULTS = Path(__file__).parent / "results" / "tied_embedding.json"


def main() -> None:
    """Measure, write the result file, print it as the last line."""
    given, found = arguments(__doc__), {}
    with tempfile.TemporaryDirectory() as folder:
        write_bundled_model(Path(folder))
        windows = windows_of(given.text, given.windows, Path(folder))
        for bits in WIDTHS:
            model = AutoModelForCausalLM.from_pretrained(folder)
            plan = view_model(model, outside=[input_embedding(model)]).plan("module")
            (embedding,) = (module for module in plan.modules if module.outside)
            scheme = scheme_for(bits, embedding.in_features, GROUP_SIZE)
            alone = replace(plan, modules=(replace(embedding, scheme=scheme), *plan.inside.modules))
            apply_plan(model, alone)
            found[str(bits)] = {
                "perplexity": round(perplexity(model, windows, 4, f"{bits} bits"), 3),
                "matrix_bytes": alone.modules[0].nbytes,
                "checkpoint_bytes": alone.nbytes,
            }
    result = {
        "command": f"python benchmarks/tied_embedding.py --text {given.text.name} --windows {given.windows}",
        "model": "SmolLM2-135M-Instruct",
        "tokens": windows.numel(),
        "group_size": GROUP_SIZE,
        "results": found,
        **environment(),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
