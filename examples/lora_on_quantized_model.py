"""Train a LoRA adapter on SmolLM2-135M quantized to about 4.5 bits, save it, and load it again onto the packed model.

No network is needed. It takes peft besides this package, and about a minute on two cores.

    uv run python examples/lora_on_quantized_model.py
"""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cptquant import CPTQuantConfig
from hf_cptquant.demo import python_help_texts, write_bundled_model

texts = python_help_texts()
data = {"dataset": texts, "num_samples": 2, "sequence_length": 64, "group_size": 64}
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    write_bundled_model(folder / "original")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "original", quantization_config=CPTQuantConfig(quality="fast", **data)
    )
    tokens = AutoTokenizer.from_pretrained(folder / "original")(texts[-1], return_tensors="pt")["input_ids"][:, :64]

    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM"))
    adapted.train()
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-3)
    losses = []
    for _ in range(8):
        loss = adapted(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"Loss {losses[0]:.3f} → {losses[-1]:.3f} on a text that is learnt by heart.")

    adapted.save_pretrained(folder / "adapter")  # a few megabytes; the packed model stays as it is
    loaded = PeftModel.from_pretrained(adapted.unload(), folder / "adapter")
    with torch.no_grad():
        print(f"With the adapter from disk: {loaded(input_ids=tokens, labels=tokens).loss.item():.3f}")
