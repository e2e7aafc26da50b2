"""Plan once, on SmolLM2-135M, and quantize a fine-tune of it by the same plan: nothing is measured a second time.

No network is needed. It takes about a minute on two cores.

    uv run python examples/plan_for_fine_tune.py
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cptquant import CPTQuantConfig, make_plan
from hf_cptquant.demo import python_help_texts, write_bundled_model

texts = python_help_texts()
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    write_bundled_model(folder / "original")
    model = AutoModelForCausalLM.from_pretrained(folder / "original")
    data = {"dataset": texts, "num_samples": 2, "sequence_length": 64}
    record = make_plan(model, CPTQuantConfig(target_bits=4.5, group_size=64, **data))
    record.save(folder / "plan.json")

    tokens = AutoTokenizer.from_pretrained(folder / "original")(texts[-1], return_tensors="pt")["input_ids"][:, :64]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)  # any fine-tuning; this is the shortest
    for _ in range(4):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "fine-tuned")

    config = CPTQuantConfig(plan=folder / "plan.json", quality="fast")
    quantized = AutoModelForCausalLM.from_pretrained(folder / "fine-tuned", quantization_config=config)
    with torch.no_grad():
        losses = [each(input_ids=tokens, labels=tokens).loss.item() for each in (model, quantized)]

print(f"The plan of the original: {record.plan.summary}")
print(f"That of the fine-tune: {quantized.hf_quantizer.record.plan.summary}")
print(f"Its loss: {losses[0]:.3f} → {losses[1]:.3f}")
