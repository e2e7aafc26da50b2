"""Quantize SmolLM2-135M and tell what that cost on text that it was not calibrated on, with confidence intervals.

No network is needed.

uv run python examples/evaluate_quantized_model.py
"""

import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM

from hf_cptquant import CPTQuantConfig, evaluate_model
from hf_cptquant.demo import HELD_OUT_TOPICS, python_help_texts, write_bundled_model

texts = python_help_texts()
with tempfile.TemporaryDirectory() as folder:
    write_bundled_model(Path(folder))
    original = AutoModelForCausalLM.from_pretrained(folder)
    config = CPTQuantConfig(
        quality="fast",
        target_bits=4.5,
        group_size=64,
        dataset=texts[:-HELD_OUT_TOPICS],
        num_samples=8,
        sequence_length=128,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    held_out = CPTQuantConfig(dataset=texts[-HELD_OUT_TOPICS:], num_samples=16, sequence_length=128)
    results = evaluate_model(model, held_out, against=original)

for result in results:
    before = "" if result.base is None else f"{result.base:.4g} before, "
    print(f"{result.metric}: {before}{result.value:.4g}, between {result.low:.4g} and {result.high:.4g}")
