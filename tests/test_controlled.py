"""Controlled experiments: what is made more sensitive on purpose must score higher and get more bits.

On SmolLM2, with the units of four of its blocks. One experiment makes a block louder: its projections into the residual
stream are scaled up, so that errors in it weigh more. The other plants outliers that leave the function of the model
as it was, exactly, and spoil the grid that weights are rounded to.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_cptquant import CPTQuantConfig, measure_sensitivity, solve
from hf_cptquant.evaluate import losses_of_plans
from hf_cptquant.pipeline import prepare

BLOCKS = (5, 14, 23, 29)
METHODS = {
    "taylor": {"method": "tdmpq", "estimator": "taylor"},
    "perturbation": {"method": "tdmpq", "estimator": "perturbation"},
    "pmpq": {"method": "pmpq"},
    "cmpq": {"method": "cmpq"},
}
BITS, TARGET = (3, 4, 8), 5.3  # what one block of four needs for 8 bits, and the others for 4
OTHERS = rf"model\.layers\.(?!({'|'.join(map(str, BLOCKS))})\.)\d+\."


@pytest.fixture
def config(texts):
    def build(method, **settings) -> CPTQuantConfig:
        data = {"dataset": texts, "num_samples": 4, "sequence_length": 64, "batch_size": 4}
        return CPTQuantConfig(
            **{**data, "bits": BITS, "group_size": 64, "modules_to_not_convert": [OTHERS], **METHODS[method], **settings}
        )

    return build


@pytest.fixture
def load(smollm2):
    return lambda: AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@torch.no_grad()
def make_louder(model, block: int, factor: float) -> None:
    """Scale what a block adds to the residual stream."""
    layer = model.model.layers[block]
    for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
        projection.weight.mul_(factor)


@torch.no_grad()
def plant_outliers(model, block: int) -> None:
    """Make one input feature of `down_proj` in each group 16 times as large, and what feeds it 16 times as small."""
    mlp = model.model.layers[block].mlp
    mlp.up_proj.weight[::64] /= 16  # powers of two: no rounding
    mlp.down_proj.weight[:, ::64] *= 16


def bits_of(plan) -> dict[str, int]:
    return {module.unit: module.scheme.bits for module in plan.modules}


@pytest.mark.parametrize("method", METHODS)
def test_a_louder_block_scores_higher_and_gets_more_bits(method, config, load):
    # A block's output holds those of all before it, so only the last one is unlike the others when it is louder.
    block = 29 if method == "cmpq" else 14
    unit = f"model.layers.{block}"
    model, settings = load(), config(method, granularity="block")
    before = measure_sensitivity(model, settings)
    make_louder(model, block, 4.0)
    after = measure_sensitivity(model, settings)
    assert len(before.raw) == len(BLOCKS)
    assert after.raw[unit] > 1.5 * before.raw[unit]
    assert after.scores[unit] == 1 == max(after.scores.values())
    budget = CPTQuantConfig(bits=BITS, group_size=64, target_bits=TARGET)
    plan = bits_of(solve(after, budget))
    assert plan[unit] == 8 > max(bits for other, bits in plan.items() if other != unit)
    clustered = bits_of(solve(after, CPTQuantConfig(bits=BITS, group_size=64)))
    assert clustered[unit] == 8


@pytest.mark.parametrize("method", METHODS)
def test_outliers_get_more_bits_though_the_function_is_the_same(method, config, load, tokens):
    block, unit = 14, "model.layers.14.mlp.down_proj"
    model, settings = load(), config(method, granularity="group")
    logits = model(tokens[:2]).logits
    before = measure_sensitivity(model, settings)
    plant_outliers(model, block)
    assert torch.equal(model(tokens[:2]).logits, logits)
    after = measure_sensitivity(model, settings)
    assert after.errors[unit][4] > 10 * before.errors[unit][4]
    if method == "taylor":
        assert after.costs[unit][4] > 5 * abs(before.costs[unit][4])
    if method == "perturbation":  # noise relative to weights that are larger
        assert after.raw[unit] > 1.5 * before.raw[unit]
    budget = CPTQuantConfig(bits=BITS, group_size=64, target_bits=TARGET)
    old, new = solve(before, budget), solve(after, budget)
    assert bits_of(new)[unit] == 8 > bits_of(old)[unit]


def test_the_truth_follows_the_outliers(config, load):
    """What the experiment takes for granted: rounding that layer alone does cost more with outliers."""
    model, settings = load(), config("taylor", granularity="group")
    preparation = prepare(model, settings.recipe())
    widths = {module.unit: 16 for module in preparation.plan.modules} | {"model.layers.14.mlp.down_proj": 4}
    plans = {"none": preparation.plan, "one": preparation.plan.with_bits(widths, 64)}
    rises = []
    for change in (lambda: None, lambda: plant_outliers(model, 14)):
        change()
        losses = losses_of_plans(model, plans, preparation.calibration.batches, "nearest")
        rises.append(losses["one"] - losses["none"])
    assert rises[1] > 5 * abs(rises[0])
