"""Plans as files: made, solved, edited, used for another model; what does not fit; `method="auto"`."""

import dataclasses
import json

import pytest
import torch
from conftest import tiny_model
from transformers import AutoModelForCausalLM

from hf_cptquant import BitPlan, CPTQuantConfig, make_plan, measure_frontier, measure_sensitivity, solve
from hf_cptquant.calibration import CalibrationSet, hold_out
from hf_cptquant.errors import CalibrationError, ConfigError, PlanError
from hf_cptquant.model_view import view_model
from hf_cptquant.plan import LayerScheme
from hf_cptquant.record import QuantizationRecord
from hf_cptquant.table import SensitivityTable

SHARED = {"bits": (3, 4, 8, 16), "group_size": 32}


def config_for(tokens, **settings) -> CPTQuantConfig:
    data = {"dataset": tokens, "sequence_length": 32, "num_samples": 8}
    return CPTQuantConfig(**{**data, **SHARED, "target_bits": 5.0, "quality": "fast", **settings})


def bits_of(plan) -> dict[str, int]:
    return {module.name: module.scheme.bits for module in plan.modules}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama").to(torch.bfloat16).save_pretrained(path)
    return path


def load(folder, config=None):
    extra = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(folder, **extra)


@pytest.fixture(scope="module")
def record(folder, tokens):
    return make_plan(load(folder), config_for(tokens))


@pytest.fixture
def plan_file(record, tmp_path):
    record.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_quantizing_by_a_plan_is_quantizing_at_once(folder, tokens, plan_file, tmp_path):
    at_once, by_plan = load(folder, config_for(tokens)), load(folder, CPTQuantConfig(quality="fast", plan=plan_file))
    for name, model in (("at once", at_once), ("by plan", by_plan)):
        model.save_pretrained(tmp_path / name)
    assert (tmp_path / "at once" / "model.safetensors").read_bytes() == (
        tmp_path / "by plan" / "model.safetensors"
    ).read_bytes()
    sections = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("at once", "by plan")]
    for section in sections:
        assert section["quantization_config"]["cptquant"]["measured"].keys() == {"predicted_loss_increase"}
    assert sections[0] == sections[1]
    runs = [QuantizationRecord.load(tmp_path / name).run for name in ("at once", "by plan")]
    assert [run["seconds"].keys() for run in runs] == [{"scoring", "rounding"}, {"rounding"}]


@pytest.mark.parametrize("given", ["path", "text", "record", "plan", "folder of a quantized model"])
def test_a_plan_may_be_a_file_or_a_value(given, folder, record, plan_file, tmp_path):
    values = {"path": plan_file, "text": str(plan_file), "record": record, "plan": record.plan}
    if given.startswith("folder"):
        load(folder, CPTQuantConfig(quality="fast", plan=record)).save_pretrained(tmp_path / "quantized")
        values[given] = tmp_path / "quantized"
    model = load(folder, CPTQuantConfig(quality="fast", plan=values[given]))
    made = model.hf_quantizer.record
    assert made.plan == record.plan
    assert made.table == (None if given == "plan" else record.table)
    model.save_pretrained(tmp_path / "saved")
    reloaded = load(tmp_path / "saved").hf_quantizer.record
    assert (reloaded.plan, reloaded.table, reloaded.settings) == (made.plan, made.table, made.settings)
    assert reloaded.settings["granularity"] == "group"


@pytest.mark.parametrize("granularity", ["block", "group", "module"])
def test_a_bare_plan_keeps_its_units(granularity, folder, tmp_path):
    undecided = view_model(tiny_model("llama").to(torch.bfloat16)).plan(granularity)
    units = list(dict.fromkeys(module.unit for module in undecided.modules))
    undecided.with_bits({unit: (4, 8)[index % 2] for index, unit in enumerate(units)}, 32).save(tmp_path / "plan.json")
    record = load(folder, CPTQuantConfig(quality="fast", plan=tmp_path / "plan.json")).hf_quantizer.record
    assert record.plan == BitPlan.load(tmp_path / "plan.json")
    assert record.settings["granularity"] == granularity


def test_a_plan_needs_no_data_and_measures_nothing(folder, plan_file, monkeypatch):
    monkeypatch.setattr("hf_cptquant.pipeline.load_calibration", lambda *_: pytest.fail("data were loaded"))
    monkeypatch.setattr("hf_cptquant.pipeline.score", lambda *_: pytest.fail("scores were measured"))
    load(folder, CPTQuantConfig(quality="fast", plan=plan_file))
    with pytest.raises(ConfigError, match="plan= is for quantizing"):
        measure_sensitivity(load(folder), CPTQuantConfig(quality="fast", plan=plan_file))


def test_a_plan_of_one_fine_tune_is_for_another(record, plan_file, tmp_path):
    other = tiny_model("llama")  # float32, and other weights
    for parameter in other.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
    other.save_pretrained(tmp_path / "other")
    model = load(tmp_path / "other", CPTQuantConfig(quality="fast", plan=plan_file))
    plan = model.hf_quantizer.record.plan
    assert bits_of(plan) == bits_of(record.plan)
    assert {module.element_size for module in plan.modules} == {4}
    assert plan.other_bytes == 2 * record.plan.other_bytes


def test_a_plan_can_be_edited(folder, plan_file):
    data = json.loads(plan_file.read_text())
    data["modules"]["model.layers.1.mlp.down_proj"] |= {"bits": 6, "group_size": 16, "symmetric": False}
    plan_file.write_text(json.dumps(data))
    model = load(folder, CPTQuantConfig(quality="fast", plan=plan_file))
    assert model.get_submodule("model.layers.1.mlp.down_proj").scheme == LayerScheme(6, 16, False)


def edited(record, name, /, **changes) -> BitPlan:
    modules = [
        dataclasses.replace(module, **changes) if module.name == name else module for module in record.plan.modules
    ]
    return dataclasses.replace(record.plan, modules=tuple(modules))


Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: edited(r, DOWN, in_features=64),
            rf"another model: it has other shapes for {DOWN} \(64, 64\) instead",
        ),
        (lambda r: edited(r, DOWN, name="x.fc1"), rf"decides on what the model lacks x.fc1; it says nothing of {DOWN}"),
        (
            lambda r: dataclasses.replace(r.plan, modules=r.plan.modules[:-5]),
            r"it says nothing of model.layers.2.\S+, model.layers.2.\S+ and 3 more",
        ),
        (lambda r: edited(r, DOWN, scheme=LayerScheme(4, 48)), rf"{DOWN}: group size 48 does not divide 128"),
    ],
    ids=["shape", "name", "missing", "group size"],
)
def test_a_plan_that_does_not_fit_says_how(change, message, folder, record):
    with pytest.raises(PlanError, match=message):
        load(folder, CPTQuantConfig(quality="fast", plan=change(record)))


def test_modules_of_a_unit_keep_equal_bits(folder, record):
    other = next(bits for bits in (4, 8) if bits != bits_of(record.plan)[Q])
    changed = dataclasses.replace(record, plan=edited(record, Q, scheme=LayerScheme(other)))
    with pytest.raises(
        PlanError, match=r"k_proj: the plan has \d+ bits, and \d+ for .*q_proj, which share the unit .*qkv"
    ):
        load(folder, CPTQuantConfig(quality="fast", plan=changed))


def test_what_is_no_plan_is_told_before_the_weights_are_loaded(folder, record, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_cptquant.pipeline.quantize_model", lambda *_: pytest.fail("the weights were loaded"))
    record.table.save(tmp_path / "table.json")
    incomplete = record.to_dict()
    del incomplete["settings"]["granularity"]
    (tmp_path / "incomplete.json").write_text(json.dumps(incomplete))
    dataclasses.replace(record, plan=record.plan.undecided).save(tmp_path / "scores.json")  # as `sensitivity` writes
    for name, message in (
        ("table.json", "not a bit plan of version 1"),
        ("scores.json", "leaves everything at 16 bits; make one from its scores with `cptquant solve`"),
        ("nowhere.json", "nowhere.json does not exist"),
        ("incomplete.json", "the settings in the record of the plan lack 'granularity'"),
    ):
        with pytest.raises(PlanError, match=message):
            load(folder, CPTQuantConfig(quality="fast", plan=tmp_path / name))


def test_solving_again_gives_the_same_plan(record, tokens, tmp_path):
    record.table.save(tmp_path / "table.json")
    table = SensitivityTable.load(tmp_path / "table.json")
    assert table == record.table
    assert solve(table, CPTQuantConfig(target_bits=5.0, **SHARED)) == record.plan
    assert solve(table, CPTQuantConfig(target_bits=4.0, **SHARED)).bits_per_weight <= 4.0
    record.save(tmp_path / "plan.json")
    assert SensitivityTable.load(tmp_path / "plan.json") == table


@pytest.mark.parametrize("method", ["pmpq", "cmpq"])
def test_methods_without_costs_can_be_solved_from_their_table(method, folder, tokens):
    record = make_plan(load(folder), config_for(tokens, method=method))
    assert solve(record.table, CPTQuantConfig(method=method, target_bits=5.0, **SHARED)) == record.plan
    with pytest.raises(PlanError, match=f"costs in nats, which a table of method='{method}' has not"):
        solve(record.table, CPTQuantConfig(max_loss_increase=0.1, estimator="taylor", **SHARED))


def test_a_table_without_scores_cannot_be_solved(record, tmp_path):
    QuantizationRecord(record.plan, None, {}, {}).save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="without the scores that it came from"):
        SensitivityTable.load(tmp_path / "plan.json")


# Held-out data


def calibration_of(sequences: int, batch_size: int) -> CalibrationSet:
    ids = torch.arange(sequences * 4).view(sequences, 4)
    batches = tuple({"input_ids": rows, "labels": rows} for rows in ids.split(batch_size))
    return CalibrationSet(batches, {"source": "texts", "sequences": sequences})


@pytest.mark.parametrize(("sequences", "batch_size", "kept"), [(8, 3, 6), (2, 1, 1), (9, 9, 7), (3, 2, 2)])
def test_the_last_quarter_is_held_out(sequences, batch_size, kept):
    given = calibration_of(sequences, batch_size)
    measured, judged = hold_out(given)
    rows = [torch.cat([batch["input_ids"] for batch in part.batches]) for part in (measured, judged)]
    assert [len(part) for part in rows] == [kept, sequences - kept]
    assert torch.equal(torch.cat(rows), torch.cat([batch["input_ids"] for batch in given.batches]))
    assert all(len(batch["input_ids"]) <= batch_size for part in (measured, judged) for batch in part.batches)
    assert [part.description["sequences"] for part in (measured, judged)] == [kept, sequences - kept]
    assert measured.description["sha256"] != judged.description["sha256"]


def test_a_single_sequence_cannot_be_divided(folder, tokens):
    with pytest.raises(CalibrationError, match="there is only one sequence; raise num_samples"):
        load(folder, config_for(tokens, method="auto", num_samples=1))


# method="auto"


@pytest.fixture(scope="module")
def chosen(folder, tokens):
    return make_plan(load(folder), config_for(tokens, method="auto"))


CANDIDATES = {
    "tdmpq, taylor": {"method": "tdmpq", "estimator": "taylor"},
    "tdmpq, perturbation": {"method": "tdmpq", "estimator": "perturbation"},
    "pmpq": {"method": "pmpq"},
    "cmpq": {"method": "cmpq"},
}


@torch.no_grad()
def test_auto_takes_the_plan_whose_model_is_best_on_held_out_data(chosen, folder, tokens):
    """Each method by itself on the first three quarters, quantized, and judged on the rest."""
    losses = chosen.table.settings["held_out_losses"]
    rows = load(folder).eval()
    dataset = torch.cat([batch["input_ids"] for batch in _batches(rows, tokens)])
    scored, judged = dataset[:6], dataset[6:]
    assert losses["unrounded"] == pytest.approx(rows(input_ids=judged, labels=judged).loss.item(), rel=1e-3)
    plans = {}
    for name, settings in CANDIDATES.items():
        model = load(folder, config_for(scored, num_samples=6, **settings))
        plans[name] = model.hf_quantizer.record.plan
        # packed layers multiply in another order than dense bfloat16 ones, so dense weights are compared
        dense = model.dequantize()
        assert losses[name] == pytest.approx(dense(input_ids=judged, labels=judged).loss.item(), rel=1e-3)
    best = min(CANDIDATES, key=losses.get)
    assert bits_of(chosen.plan) == bits_of(plans[best])
    assert len({tuple(bits_of(plan).values()) for plan in plans.values()}) > 1  # there was a choice
    assert chosen.table.method == CANDIDATES[best]["method"]
    assert chosen.settings["method"] == "auto"


def _batches(model, tokens):
    from hf_cptquant.pipeline import prepare

    return prepare(model, config_for(tokens).recipe()).calibration.batches


def test_figures_of_auto_are_in_the_plan_and_the_config(chosen, folder, tmp_path):
    chosen.save(tmp_path / "plan.json")
    model = load(folder, CPTQuantConfig(quality="fast", plan=tmp_path / "plan.json"))
    model.save_pretrained(tmp_path / "saved")
    losses = chosen.table.settings["held_out_losses"]
    assert losses.keys() == {"unrounded", *CANDIDATES}
    section = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]["cptquant"]
    assert section["sensitivity_settings"]["held_out_losses"] == losses
    assert QuantizationRecord.load(tmp_path / "saved").table.settings["held_out_losses"] == losses


def test_auto_shares_the_walk_through_the_model(folder, tokens, monkeypatch):
    """PMPQ and the perturbation together carry each block's output once, and measure the unchanged model once each."""
    from hf_cptquant.sensitivity.engine import SuffixRunner

    made = []
    build = SuffixRunner.__init__
    monkeypatch.setattr(SuffixRunner, "__init__", lambda self, *a: (made.append(self), build(self, *a))[1])
    make_plan(load(folder), config_for(tokens, method="auto"))
    assert len(made) == 1


def test_auto_goes_on_from_its_work_folder(folder, tokens, tmp_path, chosen):
    config = config_for(tokens, method="auto", work_dir=tmp_path / "work")
    first = make_plan(load(folder), config)
    assert {path.name for path in (tmp_path / "work").iterdir()} == {
        "cmpq", "pmpq", "tdmpq-perturbation", "tdmpq-taylor",
    }  # fmt: skip
    second = make_plan(load(folder), config)
    assert first == second
    assert first.plan == chosen.plan


# The frontier, measured


@torch.no_grad()
def test_a_measured_frontier_tells_the_loss_of_each_plan(folder, tokens):
    model = load(folder).eval()
    config = config_for(tokens, target_bits=None, estimator="taylor", granularity="group")
    points = measure_frontier(model, config, 4)
    dataset = torch.cat([batch["input_ids"] for batch in _batches(model, tokens)])
    judged = dataset[6:]
    base = model(input_ids=judged, labels=judged).loss.item()
    for point in points:
        dense = load(folder)  # unrounded, where a plan leaves everything at 16 bits
        if point.plan.packed:
            dense = load(folder, CPTQuantConfig(quality="fast", plan=point.plan)).dequantize()
        assert point.measured == pytest.approx(dense(input_ids=judged, labels=judged).loss.item() - base, abs=2e-3)
    assert points[0].measured != points[-1].measured
    assert [point.plan for point in points] == sorted((p.plan for p in points), key=lambda plan: plan.nbytes)
