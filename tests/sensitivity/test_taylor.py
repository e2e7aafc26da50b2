"""The Taylor estimator against plain float64 gradients of each sequence; drawn labels; memory; nothing left changed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_CONFIGS, tiny_model
from scipy.stats import chi2, spearmanr
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_cptquant.errors import ConfigError, CPTQuantError
from hf_cptquant.grid import dequantize
from hf_cptquant.model_view import task_of, view_model
from hf_cptquant.plan import scheme_for
from hf_cptquant.recipe import Recipe
from hf_cptquant.rounding import round_nearest
from hf_cptquant.sensitivity import METHODS, taylor
from hf_cptquant.sensitivity.compensation import shares_left
from hf_cptquant.sensitivity.taylor import draw, gradient_of_drawn, share_of_signal
from sensitivity.test_tdmpq import calibration_for, recipe_for

WIDTHS = (3, 4, 8)


def taylor_recipe(kind, tokens, **settings) -> Recipe:
    return recipe_for(kind, tokens, **{"estimator": "taylor", "bits": WIDTHS, "group_size": 32, **settings})


def table_of(model, kind, tokens, minilm, granularity="block", **settings):
    recipe = taylor_recipe(kind, tokens, granularity=granularity, **settings)
    return METHODS["tdmpq"](model, view_model(model).plan(granularity), calibration_for(model, recipe, minilm), recipe)


def flat(costs) -> dict[tuple[str, int], float]:
    return {(unit, bits): cost for unit, prices in costs.items() for bits, cost in prices.items()}


# The reference


def rounding_error(module, scheme) -> torch.Tensor:
    """W' − W of rounding to nearest in float64, in the layout of the module's weight."""
    matrix = module.weight.detach().t().contiguous() if isinstance(module, Conv1D) else module.weight.detach()
    rounded = round_nearest(matrix, scheme)
    change = dequantize(rounded.integers, rounded.scale, rounded.zero_point).double() - matrix.double()
    return change.t() if isinstance(module, Conv1D) else change


def literal_loss(logits, labels, task) -> torch.Tensor:
    """Mean cross-entropy of the labels in float64; that of the next tokens for a causal language model."""
    if task == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100)


def sampled(logits, labels, uniform, task) -> torch.Tensor:
    """Labels by inverse transform sampling, one after the other: as many classes as the cumulative sum doesn't pass."""
    probabilities = logits.detach().double().softmax(-1).reshape(-1, logits.shape[-1]).numpy()
    drawn = []
    for row, number in zip(probabilities, uniform.double().flatten().tolist(), strict=True):
        drawn.append(int((np.cumsum(row) <= number).sum()))
    if task == "causal-lm":  # the logits at a position are for the next one
        drawn = [int(labels[0, 0]), *drawn[:-1]]
    return torch.tensor(drawn).view_as(labels).where(labels != -100, torch.tensor(-100))


def combined(first, second, predictions) -> dict:
    """λ·first + second, with James and Stein's λ = 1 − Σσ² / Σ first² for errors of variance σ² = 2·second / n."""
    signal = 1 - sum(2 * term / predictions for term in second.values()) / sum(term**2 for term in first.values())
    return {key: max(signal, 0.0) * first[key] + second[key] for key in first}


def literal_costs(kind, plan, batches, recipe) -> tuple[float, dict, dict, int]:
    """Mean loss; (unit, width) → first-order and second-order term, from one autograd.grad for each sequence; how many
    labels are predicted."""
    single, model = tiny_model(kind), tiny_model(kind).double()
    task = task_of(model)
    names = [module.name for module in plan.modules]
    weights = [model.get_submodule(name).weight for name in names]
    changes = {
        (module.name, bits): rounding_error(
            single.get_submodule(module.name),
            scheme_for(bits, module.in_features, recipe.group_size, recipe.symmetric),
        )
        for module in plan.modules
        for bits in recipe.bits
    }
    first, second, losses, predictions = {}, {}, [], 0
    sequences = [
        {
            name: tensor[i : i + 1].to(torch.float64 if tensor.is_floating_point() else None)
            for name, tensor in batch.items()
        }
        for batch in batches
        for i in range(len(next(iter(batch.values()))))
    ]
    for index, sequence in enumerate(sequences):
        if "labels" not in sequence:
            sequence["labels"] = model(**sequence).logits.argmax(-1)
        labels = sequence["labels"]
        outputs = model(**sequence)
        loss = literal_loss(outputs.logits, labels, task)
        assert loss.item() == pytest.approx(outputs.loss.item(), rel=1e-6)  # it is the model's own loss
        losses.append(loss.item())
        of_data = torch.autograd.grad(loss, weights, retain_graph=True)
        uniform = taylor.uniform_numbers(labels, recipe.seed, [index])[0]
        drawn = sampled(outputs.logits, labels, uniform, task)
        of_drawn = torch.autograd.grad(literal_loss(outputs.logits, drawn, task), weights)
        count = int(((labels[:, 1:] if task == "causal-lm" else labels) != -100).sum())
        predictions += count
        for module, g, h in zip(plan.modules, of_data, of_drawn, strict=True):
            for bits in recipe.bits:
                key, change = (module.unit, bits), changes[module.name, bits]
                first[key] = first.get(key, 0.0) + (g * change).sum().item() / len(sequences)
                weighted = (h.square() * change.square()).sum().item()
                second[key] = second.get(key, 0.0) + count / 2 * weighted / len(sequences)
    return sum(losses) / len(losses), first, second, predictions


@pytest.mark.parametrize("kind", TINY_CONFIGS)
@pytest.mark.parametrize("granularity", ["block", "group"])
def test_costs_equal_those_of_plain_gradients(kind, granularity, tokens, minilm):
    model = tiny_model(kind)
    recipe = taylor_recipe(kind, tokens, granularity=granularity, seed=5)
    plan = view_model(model).plan(granularity)
    calibration = calibration_for(model, recipe, minilm)
    table = METHODS["tdmpq"](model, plan, calibration, recipe)
    base, first, second, predictions = literal_costs(kind, plan, calibration.batches, recipe)
    expected = combined(first, second, predictions)
    assert max(second.values()) > 3e-4  # both terms matter, so the comparison means something
    assert kind == "llama" or max(abs(expected[key] - second[key]) for key in first) > 3e-3  # its labels are chance
    assert table.base == pytest.approx(base, rel=1e-5)
    assert flat(table.costs) == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert list(table.raw) == list(dict.fromkeys(module.unit for module in plan.modules))
    assert table.raw == {unit: prices[3] for unit, prices in table.costs.items()}
    assert (table.method, table.metric, table.settings["estimator"]) == ("tdmpq", "loss", "taylor")


@pytest.mark.parametrize("settings", [{"symmetric": False}, {"group_size": 16}, {"group_size": -1}])
def test_costs_are_those_of_the_scheme_that_is_asked_for(settings, tokens, minilm):
    model = tiny_model("llama")
    recipe = taylor_recipe("llama", tokens, bits=(3,), **settings)
    plan = view_model(model).plan("block")
    calibration = calibration_for(model, recipe, minilm)
    costs = flat(METHODS["tdmpq"](model, plan, calibration, recipe).costs)
    _, *terms = literal_costs("llama", plan, calibration.batches, recipe)
    assert costs == pytest.approx(combined(*terms), rel=1e-3, abs=1e-7)
    assert costs != pytest.approx(flat(table_of(model, "llama", tokens, minilm, bits=(3,)).costs), rel=1e-2)


def test_clipped_rounding_costs_the_second_order_term(tokens, minilm):
    model = tiny_model("llama")
    recipe = taylor_recipe("llama", tokens, rounding="clipped")
    plan = view_model(model).plan("module")
    calibration = calibration_for(model, recipe, minilm)
    _, _, second, _ = literal_costs("llama", plan, calibration.batches, recipe)
    costs = flat(METHODS["tdmpq"](model, plan, calibration, recipe).costs)
    assert costs == pytest.approx(second, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("rounding", ["gptq", "signround"])
def test_tuned_rounding_costs_what_compensation_leaves_of_the_second_order_term(rounding, tokens, minilm):
    model = tiny_model("llama")
    recipe = taylor_recipe("llama", tokens, rounding=rounding)
    plan = view_model(model).plan("module")
    calibration = calibration_for(model, recipe, minilm)
    costs = flat(METHODS["tdmpq"](model, plan, calibration, recipe).costs)
    _, _, second, _ = literal_costs("llama", plan, calibration.batches, recipe)
    shares = shares_left(model, plan, calibration.batches)
    assert max(shares.values()) < 0.95
    assert costs == pytest.approx({key: shares[key[0]] * cost for key, cost in second.items()}, rel=1e-3, abs=1e-7)


def test_as_many_tokens_are_measured_as_are_asked_for(tokens, minilm):
    model = tiny_model("llama")
    plan = view_model(model).plan("block")
    recipe = taylor_recipe("llama", tokens, taylor_samples=48)  # of 8 × 16
    calibration = calibration_for(model, recipe, minilm)
    base = METHODS["tdmpq"](model, plan, calibration, recipe).base
    chosen = torch.cat([batch["input_ids"] for batch in calibration.batches])[[0, 2, 5]]
    assert base == pytest.approx(model(chosen, labels=chosen).loss.item(), rel=1e-5)


# What first-order terms count


def test_first_order_terms_count_by_their_signal():
    """Means m of scale τ that are measured with errors of variance v: the best linear estimate is m·τ²/(τ² + v)."""
    generator = np.random.default_rng(0)
    predictions, units, scale = 50, 20_000, 3.0
    second = generator.uniform(1, 2, units)
    chance = 2 * second / predictions
    measured = generator.normal(0, scale * chance.mean() ** 0.5, units) + generator.normal(0, chance**0.5)
    found = share_of_signal(list(zip(measured, second, strict=True)), predictions)
    assert found == pytest.approx(scale**2 / (scale**2 + 1), abs=0.01)


def test_first_order_terms_of_chance_alone_do_not_count():
    """The labels of the data are drawn from the model here: it is at its minimum, and every first-order term is chance,
    of the size that the second-order terms predict."""
    model = tiny_model("bert-classifier").double()
    weight = model.get_submodule("bert.encoder.layer.0.output.dense").weight
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.randint(5, 500, (64, 12), generator=torch.Generator().manual_seed(1))
    log_probabilities = model(input_ids=ids).logits.log_softmax(-1)
    slopes = torch.tensor(
        [
            [(torch.autograd.grad(-of_class, weight, retain_graph=True)[0] * change).sum() for of_class in row]
            for row in log_probabilities
        ]
    )
    second = (log_probabilities.exp().detach() * slopes**2).sum(1).mean().item() / 2  # ½ ΔWᵀ F ΔW
    generator = torch.Generator().manual_seed(2)
    labels = torch.multinomial(log_probabilities.exp().detach(), 4000, replacement=True, generator=generator)
    first = slopes.gather(1, labels).mean(0)  # of 4000 data sets of 64 predictions
    assert first.square().mean().item() == pytest.approx(2 * second / len(ids), rel=0.1)
    assert share_of_signal([(term, second) for term in first.tolist()], len(ids)) < 0.1


def test_without_first_order_terms_there_is_no_signal():
    assert share_of_signal([(0.0, 0.1), (0.0, 0.0)], 8) == 0
    assert share_of_signal([], 8) == 0


# Drawn labels


@pytest.mark.parametrize("classes", [3, 8])
def test_drawn_labels_follow_the_prediction(classes):
    probabilities = (torch.randn(4, classes, generator=torch.Generator().manual_seed(3)) * 1.5).softmax(-1)
    draws = 20_000
    uniform = torch.rand(draws, 4, generator=torch.Generator().manual_seed(0))
    drawn = draw(probabilities.expand(draws, -1, -1), uniform)
    assert drawn.shape == (draws, 4, 1)
    for position in range(4):
        counts = torch.bincount(drawn[:, position, 0], minlength=classes).double()
        expected = draws * probabilities[position].double()
        assert ((counts - expected).square() / expected).sum().item() < chi2.isf(1e-4, df=classes - 1)


def test_the_ends_of_the_interval_give_possible_classes():
    probabilities = torch.tensor([-torch.inf, 1, 2, 0, -torch.inf]).softmax(-1).expand(1, 2, 5)
    assert draw(probabilities, torch.tensor([[0.0, 1 - 2**-24]])).flatten().tolist() == [1, 3]


@pytest.mark.parametrize("kind", ["llama", "bert-mlm", "t5", "bert-classifier"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_that_of_the_loss_of_the_drawn_labels(kind, dtype):
    model, classes = tiny_model(kind), 512
    labels = torch.randint(1, classes, (3, 10), generator=torch.Generator().manual_seed(2))
    labels[:, 4:7] = -100
    if kind == "bert-classifier":
        labels = labels[:, 0]
    before = labels.clone()
    logits = torch.randn(*labels.shape, classes, generator=torch.Generator().manual_seed(3)).to(dtype)
    uniform = torch.rand(labels.shape, generator=torch.Generator().manual_seed(4))
    found = gradient_of_drawn(model, labels, logits, uniform)
    exact = logits.double().requires_grad_()
    drawn = sampled(exact, labels, uniform, task_of(model))
    literal_loss(exact, drawn, task_of(model)).backward()
    assert (found.shape, found.dtype) == (logits.shape, dtype)
    assert torch.equal(labels, before)  # the given ones are as they were
    torch.testing.assert_close(found.double(), exact.grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-9)


# What the costs are worth


@torch.no_grad()
def test_costs_rank_the_blocks_of_a_real_model_as_rounding_them_does(smollm2, texts):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    recipe = Recipe(
        dataset=texts,
        tokenizer=smollm2,
        estimator="taylor",
        rounding="nearest",
        bits=(3, 4),
        num_samples=4,
        sequence_length=64,
        batch_size=4,
    )
    whole = view_model(model).plan("block")
    chosen = list(dict.fromkeys(module.block for module in whole.modules))[::5]
    plan = replace(whole, modules=tuple(module for module in whole.modules if module.block in chosen))
    calibration = calibration_for(model, recipe, None)
    (batch,) = calibration.batches
    table = METHODS["tdmpq"](model, plan, calibration, recipe)
    base = model(**batch).loss.item()
    assert table.base == pytest.approx(base, rel=1e-4)
    predicted, measured = [], []
    for block in chosen:
        for bits in (3, 4):
            originals = {}
            for module in (module for module in plan.modules if module.unit == block):
                weight = model.get_submodule(module.name).weight
                originals[weight] = weight.data
                weight.data = weight.data + rounding_error(
                    model.get_submodule(module.name), scheme_for(bits, module.in_features)
                ).to(weight.dtype)
            measured.append(model(**batch).loss.item() - base)
            predicted.append(table.costs[block][bits])
            for weight, original in originals.items():
                weight.data = original
    assert spearmanr(predicted, measured).statistic > 0.7
    # and not only in their order
    assert 0.5 < sum(predicted) / sum(measured) < 2


def test_more_bits_cost_less(tokens, minilm):
    table = table_of(tiny_model("llama"), "llama", tokens, minilm, bits=(2, 4, 8, 16))
    sums = {bits: sum(abs(prices[bits]) for prices in table.costs.values()) for bits in (2, 4, 8)}
    assert sums[2] > 4 * sums[4] > 16 * sums[8] > 0


@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_16_bits_cost_nothing(kind, tokens, minilm):
    table = table_of(tiny_model(kind), kind, tokens, minilm, bits=(16,))
    assert set(table.raw.values()) == {0.0}
    assert set(table.scores.values()) == {0.0}
    assert table.base > 0


# What decides a result


@pytest.mark.parametrize("kind", ["llama", "bert-mlm", "bert-classifier", "t5"])
def test_costs_do_not_depend_on_the_batch_size(kind, tokens, minilm):
    model = tiny_model(kind)
    costs = [flat(table_of(model, kind, tokens, minilm, batch_size=size).costs) for size in (1, 3, 8)]
    assert max(map(abs, costs[0].values())) > 1e-3
    assert costs[1] == pytest.approx(costs[0], abs=1e-5)
    assert costs[2] == pytest.approx(costs[0], abs=1e-5)


def test_same_seed_same_table_other_seed_other_labels(tokens, minilm):
    model = tiny_model("llama")
    plan = view_model(model).plan("block")
    recipes = [taylor_recipe("llama", tokens, seed=seed) for seed in (0, 0, 1)]
    calibration = calibration_for(model, recipes[0], minilm)
    tables = [METHODS["tdmpq"](model, plan, calibration, recipe) for recipe in recipes]
    assert tables[0] == tables[1]
    assert tables[0].base == tables[2].base
    assert flat(tables[0].costs) != pytest.approx(flat(tables[2].costs), rel=1e-3)
    assert tables[0].fingerprint != tables[2].fingerprint


def test_a_table_survives_its_file(tokens, minilm, tmp_path):
    table = table_of(tiny_model("llama"), "llama", tokens, minilm)
    table.save(tmp_path / "table.json")
    assert type(table).load(tmp_path / "table.json") == table


def test_running_out_of_memory_halves_the_batches_and_changes_nothing(tokens, minilm, logged):
    model = tiny_model("llama")
    expected = table_of(model, "llama", tokens, minilm, batch_size=8)
    sizes = []

    def little_memory(_module, args):
        if len(args[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")
        sizes.append(len(args[0]))

    model.model.layers[2].mlp.register_forward_pre_hook(little_memory)
    table = table_of(model, "llama", tokens, minilm, batch_size=8)
    assert flat(table.costs) == pytest.approx(flat(expected.costs), abs=1e-5)
    assert table.base == pytest.approx(expected.base, rel=1e-6)
    assert table.fingerprint == expected.fingerprint
    assert max(sizes) == 2
    assert "Out of memory with 8 sequences at a time; going on with 4, on the same data." in logged.text


def test_memory_that_runs_out_in_the_backward_pass_changes_nothing(tokens, minilm, logged):
    model = tiny_model("llama")
    expected = table_of(model, "llama", tokens, minilm, batch_size=8)
    calls = 0

    def little_memory(_module, args):
        nonlocal calls
        calls += 1
        if len(args[0]) > 4 and calls % 2 == 0:  # when it is recomputed
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")

    model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(little_memory)
    table = table_of(model, "llama", tokens, minilm, batch_size=8)
    assert flat(table.costs) == pytest.approx(flat(expected.costs), abs=1e-5)
    assert "going on with 4" in logged.text


# Memory


@pytest.mark.parametrize(("rounding", "passes"), [("nearest", 2), ("clipped", 1)])  # whose first-order terms count
def test_blocks_are_checkpointed(rounding, passes, tokens, minilm):
    model = tiny_model("llama")
    runs, saved, saved_by_the_end = [], [], []
    model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda *_: runs.append(1))
    model.lm_head.register_forward_pre_hook(lambda *_: saved_by_the_end.append(list(saved)))

    def pack(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        table_of(model, "llama", tokens, minilm, batch_size=3, rounding=rounding)
    # for each of 3 batches one forward pass and some backward passes, each of which runs the block again
    assert len(runs) == 3 * (1 + passes)
    # when the first forward pass is through the blocks, none of their inner activations has been saved
    assert saved_by_the_end[0]
    assert not any(shape[-1:] == (128,) for shape in saved_by_the_end[0])


def test_no_gradient_of_a_parameter_ever_exists(tokens, minilm):
    model = tiny_model("llama")
    looks = 0

    def look(*_args):
        nonlocal looks
        looks += 1
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert all(parameter.grad is None for parameter in model.parameters())

    handles = [module.register_forward_hook(look) for module in model.modules()]
    table_of(model, "llama", tokens, minilm)
    for handle in handles:
        handle.remove()
    assert looks > 100
    assert all(parameter.grad is None for parameter in model.parameters())


# What is left behind


def state_of(model):
    return {
        "weights": {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()},
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
        "forwards": {name: module.__dict__.get("forward") for name, module in model.named_modules()},
        "loss": model.__dict__.get("_loss_function"),
    }


def assert_unchanged(model, before) -> None:
    after = state_of(model)
    for name, (address, tensor) in after.pop("weights").items():
        assert address == before["weights"][name][0]
        assert torch.equal(tensor, before["weights"][name][1])
    assert after == {name: value for name, value in before.items() if name != "weights"}
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_nothing_is_left_changed(kind, tokens, minilm):
    model = tiny_model(kind)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
    before = state_of(model)
    assert len(set(before["flags"].values())) == 2
    table_of(model, kind, tokens, minilm)
    assert_unchanged(model, before)


def test_a_forward_of_the_users_is_put_back_and_used(tokens, minilm):
    model = tiny_model("llama")
    expected = table_of(model, "llama", tokens, minilm)
    layer, calls = model.model.layers[1], []
    original = layer.forward

    def counting(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    layer.forward = counting
    assert table_of(model, "llama", tokens, minilm).costs == expected.costs
    assert calls
    assert layer.forward is counting


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2, 3, 4, 6])  # in a forward pass, in a backward pass, in later ones
def test_everything_is_restored_after_an_interruption(interruption, call, tokens, minilm):
    model = tiny_model("llama")
    model.model.norm.weight.requires_grad_(False)
    calls = 0

    def interrupt(*_args):
        nonlocal calls
        calls += 1
        if calls == call:
            raise interruption

    model.model.layers[2].self_attn.q_proj.register_forward_pre_hook(interrupt)
    before = state_of(model)
    with pytest.raises(interruption):
        table_of(model, "llama", tokens, minilm)
    assert_unchanged(model, before)


# Bad input


def test_a_weight_that_is_not_finite_is_named(tokens, minilm):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(CPTQuantError, match=r"the loss is nan.*model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        table_of(model, "llama", tokens, minilm)
    assert before == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "bert-classifier"])
def test_the_module_with_an_activation_that_is_not_finite_is_named(kind, tokens, minilm):
    model = tiny_model(kind)
    name = {"llama": "model.layers.1.mlp.down_proj", "bert-classifier": "bert.encoder.layer.1.output.dense"}[kind]
    model.get_submodule(name).register_forward_hook(lambda *seen: seen[2] / 0)
    with pytest.raises(CPTQuantError, match=f"the output of {name} is the first that holds NaN"):
        table_of(model, kind, tokens, minilm)


def test_a_gradient_that_is_not_finite_is_placed(tokens, minilm):
    model = tiny_model("llama")

    def spoil(_module, _inputs, output):
        output.register_hook(lambda gradient: gradient * torch.inf)
        return output

    model.model.layers[1].register_forward_hook(spoil)
    with pytest.raises(CPTQuantError, match=r"a gradient in model\.layers\.\d is not finite, though the loss is"):
        table_of(model, "llama", tokens, minilm)


def test_a_regression_has_no_classes_to_draw_from(tokens, minilm):
    model = tiny_model("bert-classifier", num_labels=1)
    recipe = taylor_recipe("bert-classifier", tokens)
    texts = calibration_for(model, recipe, minilm)
    graded = tuple({**batch, "labels": torch.rand(len(next(iter(batch.values()))))} for batch in texts.batches)
    with pytest.raises(CPTQuantError, match="no classes; use estimator='perturbation'"):
        METHODS["tdmpq"](model, view_model(model).plan("block"), replace(texts, batches=graded), recipe)


@pytest.mark.parametrize("changes", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}])
def test_predictions_that_cannot_stand_for_labels_are_refused(changes, tokens, minilm):
    model = tiny_model("bert-classifier", **changes)
    with pytest.raises(CPTQuantError, match="predicts no single class that could stand for them; set label_column"):
        table_of(model, "bert-classifier", tokens, minilm)


@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
def test_other_metrics_are_refused(metric):
    with pytest.raises(
        ConfigError, match=rf"metric='{metric}' cannot be had with method='tdmpq' and estimator='taylor'"
    ):
        Recipe(estimator="taylor", metric=metric)
