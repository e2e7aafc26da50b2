"""Round SmolLM2-135M to nearest, train scales and norms after that, and print how much nearer to the original it comes.

No network is needed.

uv run python examples/recover_after_rounding.py
"""

import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM

from hf_cptquant import CPTQuantConfig
from hf_cptquant.demo import python_help_texts, write_bundled_model

with tempfile.TemporaryDirectory() as folder:
    write_bundled_model(Path(folder))
    config = CPTQuantConfig(
        quality="fast",
        recover="scales",
        group_size=64,
        dataset=python_help_texts(),
        num_samples=16,
        sequence_length=128,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)

measured = model.hf_quantizer.record.measured
before, after = measured["kl_before_recovery"], measured["kl_after_recovery"]
print(f"KL divergence from the original on data kept for judging: {before:.4f} nats, after recovery {after:.4f}.")
