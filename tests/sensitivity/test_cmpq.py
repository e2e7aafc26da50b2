"""CMPQ against a literal Algorithm 1 and statsmodels' canonical correlations; what is sampled; degenerate outputs."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from conftest import TINY_CONFIGS, tiny_model
from statsmodels.multivariate.cancorr import CanCorr

from hf_cptquant.errors import ConfigError, CPTQuantError
from hf_cptquant.model_view import view_model
from hf_cptquant.recipe import Recipe
from hf_cptquant.sensitivity import METHODS, cmpq
from hf_cptquant.sensitivity.cmpq import correlations, sample_outputs, whiten
from sensitivity.test_tdmpq import calibration_for, recipe_for

EVERYTHING = 10**6  # more samples than there are positions


def table_of(model, kind, tokens, minilm, granularity="block", **settings):
    recipe = recipe_for(
        kind, tokens, **{"method": "cmpq", "granularity": granularity, "cca_samples": EVERYTHING, **settings}
    )
    return METHODS["cmpq"](model, view_model(model).plan(granularity), calibration_for(model, recipe, minilm), recipe)


def random_rows(samples, features, seed=0) -> torch.Tensor:
    return torch.randn(samples, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# The reference


@torch.no_grad()
def literal_outputs(model, batches, units, position_fields) -> dict[str, np.ndarray]:
    """Run the whole model on every batch; per unit the outputs of its modules side by side at all real positions."""
    seen = {name: [] for members in units.values() for name in members}
    with ExitStack() as hooks:
        for name, outputs in seen.items():

            def keep(_module, _inputs, output, outputs=outputs):
                outputs.append(output[0] if isinstance(output, tuple) else output)

            hooks.enter_context(model.get_submodule(name).register_forward_hook(keep))
        for batch in batches:
            model(**batch)
    rows = {}
    for unit, members in units.items():
        parts = []
        for index, batch in enumerate(batches):
            sequences, length = batch[position_fields[unit]].shape
            real = batch["attention_mask"] if position_fields[unit] == "input_ids" else torch.ones(sequences, length)
            for sequence in range(sequences):
                outputs = [seen[name][index].reshape(sequences, length, -1)[sequence] for name in members]
                parts += [torch.cat(outputs, 1)[p] for p in range(length) if real[sequence, p]]
        rows[unit] = torch.stack(parts).double().numpy()
    return rows


def literal_components(rows: np.ndarray, components: int) -> np.ndarray:
    """Standardised features on the principal components that hold 99 % of the variance, at most so many."""
    standard = (rows - rows.mean(0)) / rows.std(0)
    variances, axes = np.linalg.eigh(standard.T @ standard)
    share, kept = 0.0, 0
    while share < 0.99 and kept < components:
        kept += 1
        share = variances[-kept:].sum() / variances.sum()
    return standard @ axes[:, -kept:]


def inverse_root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return vectors @ np.diag(values**-0.5) @ vectors.T


def literal_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Mean singular value of C_XX^{-1/2} C_XY C_YY^{-1/2}, with a ridge of 1e-6 of the largest variance."""
    c_xx, c_yy = x.T @ x, y.T @ y
    c_xx += 1e-6 * np.linalg.eigvalsh(c_xx).max() * np.eye(len(c_xx))
    c_yy += 1e-6 * np.linalg.eigvalsh(c_yy).max() * np.eye(len(c_yy))
    singular = np.linalg.svd(inverse_root(c_xx) @ (x.T @ y) @ inverse_root(c_yy), compute_uv=False)
    return float(singular.mean())


def tokens_of(module: str) -> str:
    """Which tokens a module of any tiny model runs over: cross-attention's keys and values are of the encoder's."""
    from_encoder = module.endswith(("EncDecAttention.k", "EncDecAttention.v"))
    return "labels" if module.startswith("decoder") and not from_encoder else "input_ids"


def literal_table(model, plan, batches, components) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Algorithm 1 as written, for the encoder's and the decoder's tokens apart."""
    members: dict[str, list[str]] = {}
    for module in plan.modules:
        members.setdefault(module.unit, []).append(module.block if module.unit == module.block else module.name)
    stacks: dict[str, dict[str, list[str]]] = {}
    for unit, names in members.items():
        field = "labels" if "labels" in map(tokens_of, names) else "input_ids"
        kept = [name for name in dict.fromkeys(names) if tokens_of(name) == field]
        stacks.setdefault(field, {})[unit] = kept
    scores, pairs = {}, {}
    for field, units in stacks.items():
        fields = dict.fromkeys(units, field)
        outputs = literal_outputs(model, batches, units, fields)
        reduced = {unit: literal_components(rows, components) for unit, rows in outputs.items()}
        for unit in units:
            pairs[unit] = {other: literal_correlation(reduced[unit], reduced[other]) for other in units}
            pairs[unit][unit] = 1.0
            others = [pairs[unit][other] for other in units if other != unit]
            scores[unit] = 1 - sum(others) / len(others)
    return scores, pairs


@pytest.mark.parametrize("kind", TINY_CONFIGS)
@pytest.mark.parametrize("granularity", ["block", "group"])
def test_scores_equal_the_literal_algorithm(kind, granularity, tokens, minilm):
    model = tiny_model(kind)
    recipe = recipe_for(
        kind,
        tokens,
        method="cmpq",
        granularity=granularity,
        sequence_length=32,
        cca_components=24,
        cca_samples=EVERYTHING,
    )
    plan = view_model(model).plan(granularity)
    calibration = calibration_for(model, recipe, minilm)
    table = METHODS["cmpq"](model, plan, calibration, recipe)
    scores, pairs = literal_table(model, plan, calibration.batches, 24)
    assert list(table.raw) == list(dict.fromkeys(module.unit for module in plan.modules))
    # what is compared is neither all zero nor the same for all
    assert max(scores.values()) > 0.02
    assert max(scores.values()) - min(scores.values()) > 1e-5
    assert table.raw == pytest.approx(scores, rel=1e-6, abs=1e-6)
    assert table.correlations.keys() == pairs.keys()
    for unit, row in pairs.items():
        assert table.correlations[unit] == pytest.approx(row, rel=1e-6, abs=1e-6)
    assert (table.method, table.metric, table.base) == ("cmpq", "correlation", 1.0)


# Canonical correlations of matrices


def test_correlations_equal_those_of_statsmodels(monkeypatch):
    monkeypatch.setattr(cmpq, "KEPT_VARIANCE", 1.0)
    shared = random_rows(300, 4)
    samples = {
        "a": random_rows(300, 6, 1) @ random_rows(6, 6, 4) + shared @ random_rows(4, 6, 5),
        "b": random_rows(300, 9, 2) + shared @ random_rows(4, 9, 6),
        "c": random_rows(300, 4, 3) + 0.1 * shared,
    }
    matrix = correlations(samples, 50)
    names = list(samples)
    for i, first in enumerate(names):
        for j, second in enumerate(names):
            if i != j:
                expected = CanCorr(samples[first].numpy(), samples[second].numpy()).cancorr.mean()
                assert 0.1 < expected < 0.95
                assert matrix[i, j] == pytest.approx(expected, abs=1e-4)


def test_correlations_are_a_symmetric_matrix_with_ones_on_the_diagonal():
    shared = random_rows(60, 12)
    samples = {f"unit {index}": shared + 0.5 * random_rows(60, 12, index) for index in range(1, 6)}
    matrix = correlations(samples, 64)
    assert matrix.shape == (5, 5)
    assert np.array_equal(matrix, matrix.T)
    assert np.array_equal(np.diag(matrix), np.ones(5))
    assert matrix.min() >= 0
    assert matrix.max() <= 1
    assert 0.3 < matrix[0, 1] < 0.99


def test_invertible_linear_maps_of_each_other_correlate_perfectly():
    rows = random_rows(500, 10)
    mapped = rows @ random_rows(10, 10, 1) + 7
    assert correlations({"unit": rows, "mapped": mapped}, 64)[0, 1] == pytest.approx(1, abs=1e-3)
    assert correlations({"unit": rows, "scaled": -1000 * rows}, 64)[0, 1] == pytest.approx(1, abs=1e-5)


def test_independent_noise_does_not_correlate():
    samples = {name: random_rows(10_000, 10, seed) for name, seed in (("a", 1), ("b", 2), ("c", 3))}
    matrix = correlations(samples, 64)
    assert matrix[np.tril_indices(3, -1)].max() < 0.05


# Principal components


def whitened_by_svd(rows: np.ndarray, components: int) -> np.ndarray:
    """The columns of `whiten` from the singular value decomposition of the standardised sample."""
    standard = (rows - rows.mean(0)) / rows.std(0)
    left, singular, _ = np.linalg.svd(standard, full_matrices=False)
    share = np.cumsum(singular**2) / (singular**2).sum()
    kept = min(components, int((share < 0.99).sum()) + 1)
    singular = singular[:kept]
    return left[:, :kept] * singular / np.sqrt(singular**2 + 1e-6 * singular[0] ** 2)


@pytest.mark.parametrize(("samples", "features"), [(200, 30), (40, 90), (50, 50)])
@pytest.mark.parametrize("components", [5, 1000])
def test_components_equal_those_of_a_singular_value_decomposition(samples, features, components):
    rows = random_rows(samples, features) @ random_rows(features, features, 1) + random_rows(1, features, 2)
    found, expected = whiten(rows, components), whitened_by_svd(rows.numpy(), components)
    assert found.shape == expected.shape
    assert found.shape[1] == 5 if components == 5 else found.shape[1] > 5
    signs = np.sign((found * expected).sum(0))
    assert found * signs == pytest.approx(expected, abs=1e-8)


def test_repeated_features_change_nothing_though_they_are_more_than_the_samples():
    rows = random_rows(100, 30) @ random_rows(30, 30, 1)
    narrow, wide = whiten(rows, 64), whiten(torch.cat((rows,) * 4, 1), 64)
    assert narrow.shape == wide.shape
    assert wide @ wide.T == pytest.approx(narrow @ narrow.T, abs=1e-8)


@pytest.mark.parametrize("samples", [400, 30])  # more and fewer than the features
def test_three_directions_in_many_features_are_at_most_three_components(samples):
    rows = random_rows(samples, 3) @ random_rows(3, 50, 1) + 1e-4 * random_rows(samples, 50, 2)
    assert 1 < whiten(rows, 64).shape[1] <= 3


@pytest.mark.parametrize(("samples", "features"), [(500, 40), (40, 500)])
def test_whitened_columns_are_uncorrelated_and_of_unit_length(samples, features):
    columns = whiten(random_rows(samples, features) + 5, 20)
    assert columns.shape == (samples, 20)
    assert columns.mean(0) == pytest.approx(np.zeros(20), abs=1e-10)
    assert columns.T @ columns == pytest.approx(np.eye(20), abs=1e-5)


def test_constant_features_are_left_out():
    rows, other = random_rows(200, 8), random_rows(200, 8, 1)
    constant = torch.full((200, 3), 1 / 3, dtype=torch.float64)
    with_constants = torch.cat((constant, rows, torch.zeros(200, 2)), 1)
    assert whiten(with_constants, 64) == pytest.approx(whiten(rows, 64))
    assert correlations({"a": with_constants, "b": other}, 64)[0, 1] == correlations({"a": rows, "b": other}, 64)[0, 1]


def test_features_that_vary_little_around_a_large_value_count():
    rows, other = random_rows(200, 8), random_rows(200, 8, 1) + random_rows(200, 8)
    assert correlations({"a": rows + 1e5, "b": other}, 64) == pytest.approx(
        correlations({"a": rows, "b": other}, 64), abs=1e-6
    )


def test_a_feature_with_a_few_huge_values_does_not_drown_the_others():
    rows = random_rows(300, 20)
    rows[:3, 4] *= 1e4
    assert whiten(rows, 64).shape[1] > 15
    unscaled = (rows - rows.mean(0)).square().sum(0)
    assert unscaled[4] / unscaled.sum() > 0.99  # which would be all the variance that is kept
    other = random_rows(300, 20, 1)
    assert correlations({"a": rows, "same": rows @ torch.linalg.qr(random_rows(20, 20, 2)).Q}, 64)[0, 1] > 0.05
    assert correlations({"a": rows, "other": other}, 64)[0, 1] < 0.5


def test_a_unit_with_equal_outputs_is_uncorrelated_with_all_others(tokens, minilm, logged):
    model = tiny_model("llama")
    for name in ("q_proj", "k_proj", "v_proj"):
        model.model.layers[1].self_attn.get_submodule(name).weight.data.zero_()
    table = table_of(model, "llama", tokens, minilm, "group")
    dead = "model.layers.1.self_attn.qkv_proj"
    # attention over zeros is zero, so the projection behind it is dead too
    also_dead = "model.layers.1.self_attn.o_proj"
    assert table.raw[dead] == table.raw[also_dead] == 1.0
    assert {unit: value for unit, value in table.correlations[dead].items() if value} == {dead: 1.0}
    alive = [value for unit, value in table.raw.items() if unit not in (dead, also_dead)]
    assert min(alive) > 0
    assert max(alive) < 1
    assert f"{dead} gives the same output for every token" in logged.text
    assert logged.text.count("gives the same output for every token") == 2


# The sample


def test_same_seed_same_table_other_seed_other_table(tokens, minilm):
    model = tiny_model("llama")
    recipe = recipe_for("llama", tokens, method="cmpq")
    calibration = calibration_for(model, recipe, minilm)  # the same windows for all seeds
    plan = view_model(model).plan("block")
    tables = [
        METHODS["cmpq"](
            model,
            plan,
            calibration,
            recipe_for("llama", tokens, method="cmpq", cca_samples=60, cca_components=8, seed=s),
        )
        for s in (0, 0, 1)
    ]
    assert tables[0] == tables[1]
    assert tables[0].raw != pytest.approx(tables[2].raw, abs=1e-4)
    assert tables[0].fingerprint != tables[2].fingerprint


@pytest.mark.parametrize("kind", ["llama", "bert-classifier", "t5"])
@pytest.mark.parametrize("samples", [40, EVERYTHING])
def test_the_batch_size_changes_nothing(kind, samples, tokens, minilm):
    model = tiny_model(kind)
    tables = [
        table_of(model, kind, tokens, minilm, batch_size=size, cca_samples=samples, cca_components=8)
        for size in (1, 3, 8)
    ]
    for table in tables[1:]:
        assert table.raw == pytest.approx(tables[0].raw, rel=1e-5, abs=1e-6)


def test_the_sample_has_the_size_that_was_asked_for_and_no_row_twice(tokens, minilm):
    model = tiny_model("llama")
    recipe = recipe_for("llama", tokens)
    calibration = calibration_for(model, recipe, minilm)
    units = {"embeddings": ("model.embed_tokens",), "block": ("model.layers.1",)}
    whole = sample_outputs(model, units, "input_ids", calibration, EVERYTHING, 0)
    assert [tuple(rows.shape) for rows in whole.values()] == [(128, 64), (128, 64)]
    some = sample_outputs(model, units, "input_ids", calibration, 50, 0)
    assert len(some["block"].unique(dim=0)) == len(some["block"]) == 50
    places = [(row == whole["block"]).all(1).nonzero().item() for row in some["block"]]
    assert torch.equal(some["embeddings"], whole["embeddings"][places])  # the same positions in all units
    sequences = {place // 16 for place in places}
    assert len(sequences) > 5  # from everywhere


@pytest.mark.parametrize("samples", [20, EVERYTHING])
def test_padding_is_never_sampled(samples, tokens, minilm):
    model = tiny_model("bert-classifier")
    recipe = recipe_for("bert-classifier", tokens, method="cmpq")
    calibration = calibration_for(model, recipe, minilm)
    real = sum(int(batch["attention_mask"].sum()) for batch in calibration.batches)
    assert real < sum(batch["input_ids"].numel() for batch in calibration.batches)  # there is padding
    units = {f"block {index}": (f"bert.encoder.layer.{index}",) for index in range(3)}
    expected = sample_outputs(model, units, "input_ids", calibration, samples, 0)
    assert all(len(rows) == min(samples, real) for rows in expected.values())
    # attention never looks at padding, so what stands there reaches nothing but its own row
    for batch in calibration.batches:
        batch["input_ids"][batch["attention_mask"] == 0] = 2023
    changed = sample_outputs(model, units, "input_ids", calibration, samples, 0)
    for unit, rows in expected.items():
        assert torch.equal(changed[unit], rows)


def test_running_out_of_memory_changes_nothing(tokens, minilm, logged):
    model = tiny_model("llama")
    expected = table_of(model, "llama", tokens, minilm, batch_size=8, cca_samples=50, cca_components=8)

    def little_memory(_module, args):
        if len(args[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")

    model.model.layers[2].mlp.register_forward_pre_hook(little_memory)
    table = table_of(model, "llama", tokens, minilm, batch_size=8, cca_samples=50, cca_components=8)
    assert table.raw == pytest.approx(expected.raw, rel=1e-5, abs=1e-6)
    assert "Out of memory with 8 sequences at a time; going on with 4, on the same data." in logged.text


@pytest.mark.parametrize("granularity", ["block", "group", "module"])
@pytest.mark.parametrize("length", [16, 17])  # an odd window gives the encoder one token more than the decoder
def test_encoder_and_decoder_are_compared_within_themselves(granularity, length, tokens, minilm):
    table = table_of(tiny_model("t5"), "t5", tokens, minilm, granularity, sequence_length=length, cca_components=8)
    stacks = {field: [unit for unit in table.raw if tokens_of(unit) == field] for field in ("input_ids", "labels")}
    assert sum(map(len, stacks.values())) == len(table.raw)
    for units in stacks.values():
        assert len(units) > 1
        for unit in units:
            assert list(table.correlations[unit]) == units
            others = [table.correlations[unit][other] for other in units if other != unit]
            assert table.raw[unit] == pytest.approx(1 - sum(others) / len(others), abs=1e-12)


def test_a_table_survives_its_file(tokens, minilm, tmp_path):
    table = table_of(tiny_model("llama"), "llama", tokens, minilm)
    table.save(tmp_path / "table.json")
    assert type(table).load(tmp_path / "table.json") == table


def test_results_in_a_work_folder_are_not_measured_again(tokens, minilm, tmp_path):
    model = tiny_model("t5")
    expected = table_of(model, "t5", tokens, minilm, work_dir=tmp_path)

    def refuse(_module, _args, kwargs):
        assert len(kwargs["input_ids"]) == 1  # no more than a look at which tokens its modules run over

    model.encoder.register_forward_pre_hook(refuse, with_kwargs=True)
    assert table_of(model, "t5", tokens, minilm, work_dir=tmp_path) == expected


# Bad input and what is left behind


@pytest.mark.parametrize(
    ("kind", "few", "block"),
    [("llama", {"num_hidden_layers": 1}, "model.layers.0"), ("t5", {"num_layers": 1}, "encoder.block.0")],
)
def test_a_single_unit_is_refused_by_name(kind, few, block, tokens, minilm):
    with pytest.raises(CPTQuantError, match=rf"{block} is the only one over the input_ids.*finer granularity"):
        table_of(tiny_model(kind, **few), kind, tokens, minilm)


def test_one_block_can_be_compared_by_its_groups(tokens, minilm):
    table = table_of(tiny_model("llama", num_hidden_layers=1), "llama", tokens, minilm, "group")
    assert len(table.raw) == 4


@pytest.mark.parametrize(
    ("kind", "module"),
    [("llama", "model.layers.1.mlp.down_proj"), ("bert-classifier", "bert.encoder.layer.1.output.dense")],
)
def test_the_module_with_an_activation_that_is_not_finite_is_named(kind, module, tokens, minilm):
    model = tiny_model(kind)
    model.get_submodule(module).register_forward_hook(lambda *seen: seen[2] / 0)
    with pytest.raises(CPTQuantError, match=f"gives NaN or infinity.*output of {module} is the first"):
        table_of(model, kind, tokens, minilm)


def test_a_weight_that_is_not_finite_is_named(tokens, minilm):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(CPTQuantError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        table_of(model, "llama", tokens, minilm)


def test_nothing_is_left_changed(tokens, minilm):
    model = tiny_model("llama")
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    table_of(model, "llama", tokens, minilm, "group")
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])
    assert not any(module._forward_hooks or "forward" in module.__dict__ for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
def test_other_metrics_are_refused(metric):
    with pytest.raises(ConfigError, match=rf"metric='{metric}' cannot be had with method='cmpq'.*metric='loss'"):
        Recipe(method="cmpq", metric=metric)
