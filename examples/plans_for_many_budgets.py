"""Measure SmolLM2-135M once, draw what every size costs, make plans for some sizes, and quantize it by one of them.

No network is needed. It takes about a minute on two cores.

    uv run python examples/plans_for_many_budgets.py
"""

from pathlib import Path

from transformers import AutoModelForCausalLM

from hf_cptquant import CPTQuantConfig, measure_sensitivity, solve
from hf_cptquant.allocation import frontier
from hf_cptquant.demo import python_help_texts, write_bundled_model
from hf_cptquant.plots import plot_frontier, plot_plan

folder = Path("plans")
write_bundled_model(folder / "original")
model = AutoModelForCausalLM.from_pretrained(folder / "original")

bits, group_size = (3, 4, 8, 16), 64
data = {"dataset": python_help_texts(), "num_samples": 8, "sequence_length": 256}
config = CPTQuantConfig(estimator="taylor", granularity="group", bits=bits, group_size=group_size, **data)
table = measure_sensitivity(model, config)
table.save(folder / "table.json")
plot_frontier(frontier(table, config.recipe(), count=12), "nats", folder / "frontier.png")

for target in (3.5, 4.5, 6.0):
    plan = solve(table, CPTQuantConfig(target_bits=target, bits=bits, group_size=group_size))
    plan.save(folder / f"{target}.json")
    plot_plan(plan, table, folder / f"{target}.png")
    print(f"target {target}: {plan.summary}")

config = CPTQuantConfig(plan=folder / "4.5.json", quality="fast")
AutoModelForCausalLM.from_pretrained(folder / "original", quantization_config=config).save_pretrained(folder / "4.5")
print(f"Written to {folder / '4.5'}")
