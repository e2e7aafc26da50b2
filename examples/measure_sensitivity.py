"""Measure how sensitive each projection of SmolLM2-135M is, in two ways, without quantizing it, and draw it.

No network is needed. It takes about a minute on two cores; stopped and started again, it goes on where it was.

    uv run python examples/measure_sensitivity.py
"""

import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cptquant import CPTQuantConfig, measure_sensitivity
from hf_cptquant.demo import python_help_texts, write_bundled_model
from hf_cptquant.plots import plot_sensitivity

with tempfile.TemporaryDirectory() as folder:
    write_bundled_model(Path(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

data = {"dataset": python_help_texts(), "tokenizer": tokenizer, "num_samples": 4, "sequence_length": 128}
for method, granularity in (("tdmpq", "group"), ("cmpq", "block")):
    config = CPTQuantConfig(
        method=method, estimator="taylor", granularity=granularity, group_size=64, work_dir="sensitivity", **data
    )
    table = measure_sensitivity(model, config)
    table.save(f"sensitivity/{method}.json")
    plot_sensitivity(table, f"sensitivity/{method}.png")
    print(f"{method}: the three most sensitive units")
    for unit, score in sorted(table.scores.items(), key=lambda item: -item[1])[:3]:
        print(f"  {unit}: {score:.3f}")
