"""Controlled experiments: what is made more or less sensitive on purpose must score so, and get bits accordingly.

On SmolLM2, with the units of four blocks in a row. A block is made louder or quieter by scaling what it adds to the
residual stream, so that errors in it weigh more or less. Or outliers are planted that leave the function of the model
as it was, exactly, and spoil the grid that weights are rounded to.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_cptquant import CPTQuantConfig, measure_sensitivity, solve
from hf_cptquant.evaluate import losses_of_plans
from hf_cptquant.pipeline import prepare

BLOCKS = (13, 14, 15, 16)
UNIT = "model.layers.14"
METHODS = {
    "taylor": {"method": "tdmpq", "estimator": "taylor"},
    "perturbation": {"method": "tdmpq", "estimator": "perturbation"},
    "pmpq": {"method": "pmpq", "sparsity_levels": (0.5,)},
    "cmpq": {"method": "cmpq"},
}
BITS, TARGET = (3, 4, 8), 5.3  # what one block of four needs for 8 bits, and the others for 4


@pytest.fixture
def config(texts):
    def build(method, blocks=BLOCKS, **settings) -> CPTQuantConfig:
        others = rf"model\.layers\.(?!({'|'.join(map(str, blocks))})\.)\d+\."
        data = {"dataset": texts, "num_samples": 2, "sequence_length": 64, "batch_size": 2}
        return CPTQuantConfig(
            **{
                **data,
                "bits": BITS,
                "group_size": 64,
                "quality": "fast",
                "modules_to_not_convert": [others],
                **METHODS[method],
                **settings,
            }
        )

    return build


@pytest.fixture
def load(smollm2):
    return lambda: AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@torch.no_grad()
def scale_contribution(model, block: int, factor: float) -> None:
    """Scale what a block adds to the residual stream."""
    layer = model.model.layers[block]
    for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
        projection.weight.mul_(factor)


@torch.no_grad()
def shrink_what_matters(model, block: int) -> None:
    """Make projections 16 times as small and those that they feed 16 times as large: the function stays as it was."""
    layer = model.model.layers[block]
    for small, large in ((layer.self_attn.v_proj, layer.self_attn.o_proj), (layer.mlp.up_proj, layer.mlp.down_proj)):
        small.weight.mul_(1 / 16)
        large.weight.mul_(16)


@torch.no_grad()
def plant_outliers(model, block: int) -> None:
    """Make one input feature of `down_proj` in each group 16 times as large, and what feeds it 16 times as small."""
    mlp = model.model.layers[block].mlp
    mlp.up_proj.weight[::64] /= 16  # powers of two: no rounding
    mlp.down_proj.weight[:, ::64] *= 16


def bits_of(plan) -> dict[str, int]:
    return {module.unit: module.scheme.bits for module in plan.modules}


@pytest.mark.parametrize("method", METHODS)
def test_a_quiet_block_scores_lower_and_gets_fewer_bits(method, config, load):
    """Its errors hardly matter, nothing is lost without it, and its output is that of the block before it."""
    model, settings = load(), config(method, granularity="block")
    before = measure_sensitivity(model, settings) if method == "cmpq" else None
    scale_contribution(model, 14, 1 / 16)
    after = measure_sensitivity(model, settings)
    assert len(after.raw) == len(BLOCKS)
    if method == "cmpq":  # as like the others as the block before it is
        assert after.raw[UNIT] < before.raw[UNIT]
        assert after.raw[UNIT] == pytest.approx(after.raw["model.layers.13"], rel=0.02)
    else:
        assert abs(after.raw[UNIT]) < 0.2 * max(map(abs, after.raw.values()))
    by_clusters = bits_of(solve(after, CPTQuantConfig(bits=BITS, group_size=64, allocation="kmeans")))
    assert by_clusters[UNIT] < max(by_clusters.values())
    if method != "cmpq":  # whose scores differ too little for different bits in this budget
        plan = bits_of(solve(after, CPTQuantConfig(bits=BITS, group_size=64, target_bits=TARGET)))
        assert plan[UNIT] < max(plan.values())


RAISED = {  # method → the blocks that are its units, the one that is to be sensitive, what is done to it
    "taylor": (BLOCKS, 14, lambda model: scale_contribution(model, 14, 4.0)),
    "perturbation": (BLOCKS, 14, lambda model: scale_contribution(model, 14, 4.0)),
    # A louder block disturbs the model, which pruning it cures; but small weights that matter are missed.
    "pmpq": (BLOCKS, 14, lambda model: shrink_what_matters(model, 14)),
    # A block's output holds those of all before it, so the last one alone is unlike the others when it is louder.
    "cmpq": ((20, 23, 26, 29), 29, lambda model: scale_contribution(model, 29, 4.0)),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_block_that_matters_more_scores_higher_and_gets_more_bits(method, config, load):
    blocks, block, change = RAISED[method]
    unit = f"model.layers.{block}"
    model, settings = load(), config(method, blocks, granularity="block")
    before = measure_sensitivity(model, settings)
    change(model)
    after = measure_sensitivity(model, settings)
    assert after.raw[unit] > 1.1 * before.raw[unit]
    assert after.scores[unit] == 1
    by_clusters = CPTQuantConfig(bits=BITS, group_size=64, allocation="kmeans")
    assert bits_of(solve(after, by_clusters))[unit] == 8
    if method != "cmpq":  # whose scores differ by less than the rounding errors that they are multiplied by
        plan = bits_of(solve(after, CPTQuantConfig(bits=BITS, group_size=64, target_bits=TARGET)))
        assert plan[unit] == 8 > max(bits for other, bits in plan.items() if other != unit)


@pytest.mark.parametrize("method", METHODS)
def test_outliers_get_more_bits_though_the_function_is_the_same(method, config, load, tokens):
    block, unit = 14, "model.layers.14.mlp.down_proj"
    model, settings = load(), config(method, granularity="group", sparsity_levels=(0.3, 0.5, 0.7))
    logits = model(tokens[:2]).logits
    before = measure_sensitivity(model, settings)
    plant_outliers(model, block)
    assert torch.equal(model(tokens[:2]).logits, logits)
    after = measure_sensitivity(model, settings)
    assert after.errors[unit][4] > 3 * before.errors[unit][4]
    if method == "taylor":
        assert after.costs[unit][4] > 5 * abs(before.costs[unit][4])
    if method == "perturbation":  # noise relative to weights that are larger
        assert after.raw[unit] > 1.5 * before.raw[unit]
    budget = CPTQuantConfig(bits=BITS, group_size=64, target_bits=4.6)
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
        losses = losses_of_plans(model, plans, preparation.calibration.batches)
        rises.append(losses["one"] - losses["none"])
    assert rises[1] > 5 * abs(rises[0])
