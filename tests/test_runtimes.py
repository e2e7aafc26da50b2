"""What runtimes load: the rules against what stands in the sources of vLLM 0.32.0 and SGLang 0.5.23, the changes that
help, and plans that are made for a runtime against every plan there is."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL_SETTINGS, tiny_model
from transformers import AutoModelForCausalLM

from hf_cptquant import CPTQuantConfig, make_plan
from hf_cptquant.allocation import allocate
from hf_cptquant.errors import PlanError
from hf_cptquant.plan import UNTOUCHED, BitPlan, LayerScheme, LeftAlone, ModulePlan
from hf_cptquant.runtimes import RUNTIMES, matrices, model_problems, problems
from hf_cptquant.section import write_section
from hf_cptquant.table import SensitivityTable

LAYER = {  # of a Llama with 1,024 hidden features, 8 heads and 2 heads for keys and values: (outputs, inputs)
    "self_attn.q_proj": (1024, 1024),
    "self_attn.k_proj": (256, 1024),
    "self_attn.v_proj": (256, 1024),
    "self_attn.o_proj": (1024, 1024),
    "mlp.gate_proj": (2816, 1024),
    "mlp.up_proj": (2816, 1024),
    "mlp.down_proj": (1024, 2816),
}


def plan_with(schemes, shapes=LAYER, left=()):
    """A plan of one layer: module → scheme, 16 bits for those not named."""
    modules = tuple(
        ModulePlan(f"l.0.{name}", "l.0", f"l.0.{name}", *shape, 2, schemes.get(name, UNTOUCHED))
        for name, shape in shapes.items()
    )
    return BitPlan(modules, tuple(LeftAlone(f"l.0.{name}", "left", 1) for name in left))


def everywhere(scheme, shapes=LAYER):
    return plan_with(dict.fromkeys(shapes, scheme), shapes)


def with_changes(plan, found):
    """The plan after what the problems propose."""
    changed = {name: problem.scheme for problem in found for name in problem.modules}
    return replace(plan, modules=tuple(replace(m, scheme=changed.get(m.name, m.scheme)) for m in plan.modules))


# (bits, symmetric) and group sizes, typed from query_marlin_supported_quant_types, MARLIN_SUPPORTED_GROUP_SIZES and
# CPUWNA16LinearKernel.can_implement
TAKEN = {
    "vllm": ({(4, True), (8, True), (4, False)}, {-1, 32, 64, 128}),
    "vllm-cpu": ({(4, True), (4, False)}, {-1, 16, 32, 64, 128, 256}),
    "sglang": ({(4, True), (8, True), (4, False)}, {-1, 32, 64, 128}),
}


@pytest.mark.parametrize("name", TAKEN)
def test_bits_and_groups_are_those_of_the_kernels(name):
    widths, sizes = TAKEN[name]
    for bits, symmetric, size in itertools.product((2, 3, 4, 5, 6, 8), (True, False), (-1, 16, 32, 64, 128, 256)):
        found = problems(everywhere(LayerScheme(bits, size, symmetric)), RUNTIMES[name])
        assert bool(found) == ((bits, symmetric) not in widths or size not in sizes), (bits, symmetric, size)
    assert problems(everywhere(UNTOUCHED), RUNTIMES[name]) == ()


@pytest.mark.parametrize(
    ("name", "shape", "loads"),
    [
        ("vllm", (576, 576), True),  # Marlin pads in vLLM
        ("vllm", (100, 104), True),
        ("vllm", (100, 100), False),  # 12.5 words of 8 integers
        ("vllm-cpu", (96, 96), True),
        ("vllm-cpu", (96, 48), False),
        ("vllm-cpu", (48, 96), False),
        ("sglang", (64, 128), True),
        ("sglang", (128, 64), True),
        ("sglang", (64, 64), False),
        ("sglang", (576, 576), False),
        ("sglang", (96, 128), False),
    ],
)
def test_shapes_are_those_of_the_kernels(name, shape, loads):
    plan = everywhere(LayerScheme(4), {"mlp.up_proj": shape})
    assert (problems(plan, RUNTIMES[name]) == ()) == loads


def test_a_fused_matrix_has_the_outputs_of_all_its_parts():
    shapes = {"self_attn.q_proj": (32, 64), "self_attn.k_proj": (16, 64), "self_attn.v_proj": (16, 64)}
    assert problems(everywhere(LayerScheme(4, 32), shapes), RUNTIMES["vllm-cpu"]) == ()  # 64 × 64, not 16 × 64
    (problem,) = problems(
        everywhere(LayerScheme(4, 32), {**shapes, "self_attn.k_proj": (24, 64)}), RUNTIMES["vllm-cpu"]
    )
    assert "multiples of 32 × 32 (outputs × inputs), not 72 × 64" in problem.rule


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize(
    ("schemes", "expected"),
    [
        ({"self_attn.q_proj": (4, 64), "self_attn.k_proj": (4, 64), "self_attn.v_proj": (4, 128)}, (4, 128)),
        ({"self_attn.q_proj": (4, 64), "self_attn.k_proj": (4, 64)}, (16,)),
        ({"mlp.gate_proj": (4, 64), "mlp.up_proj": (4, 64, False)}, (4, 64)),
    ],
    ids=["groups", "one part untouched", "zero points"],
)
def test_fused_parts_have_one_scheme(name, schemes, expected):
    plan = plan_with({module: LayerScheme(*scheme) for module, scheme in schemes.items()})
    (problem,) = problems(plan, RUNTIMES[name])
    assert set(problem.modules) >= {f"l.0.{module}" for module in schemes}
    assert "in one matrix of one scheme" in problem.rule
    assert problem.scheme == LayerScheme(*expected)
    assert problems(with_changes(plan, [problem]), RUNTIMES[name]) == ()


def test_a_part_that_is_left_alone_leaves_no_choice():
    shapes = {name: shape for name, shape in LAYER.items() if name != "self_attn.k_proj"}
    plan = plan_with({"self_attn.q_proj": LayerScheme(4, 64), "self_attn.v_proj": LayerScheme(4, 64)}, shapes)
    assert problems(plan, RUNTIMES["vllm"]) == ()  # a model without keys of that name fuses nothing
    plan = replace(plan, left=(LeftAlone("l.0.self_attn.k_proj", "named in modules_to_not_convert", 1),))
    (problem,) = problems(plan, RUNTIMES["vllm"])
    assert problem.modules == ("l.0.self_attn.q_proj", "l.0.self_attn.v_proj")
    assert "l.0.self_attn.k_proj" in problem.rule
    assert problem.scheme == UNTOUCHED


def test_all_projections_of_all_experts_have_one_scheme():
    shapes = {
        f"experts.{expert}.{leaf}": shape
        for expert in range(3)
        for leaf, shape in {"gate_proj": (512, 256), "up_proj": (512, 256), "down_proj": (256, 512)}.items()
    }
    plan = everywhere(LayerScheme(4, 64), shapes)
    assert set(matrices(module.name for module in plan.modules).values()) == {"l.0.experts"}
    assert problems(plan, RUNTIMES["vllm"]) == ()
    last = replace(plan.modules[-1], scheme=LayerScheme(8))
    (problem,) = problems(replace(plan, modules=(*plan.modules[:-1], last)), RUNTIMES["vllm"])
    assert len(problem.modules) == 9
    assert str(problem).startswith("l.0.experts.0.gate_proj (with up_proj, down_proj and 6 more): ")


def test_experts_by_other_names_are_not_found():
    shapes = {f"experts.{expert}.{leaf}": (512, 512) for expert in range(3) for leaf in ("w1", "w3", "w2")}
    (problem,) = problems(everywhere(LayerScheme(4, 64), shapes), RUNTIMES["vllm"])
    assert "by the names gate_proj, up_proj and down_proj" in str(problem)
    assert problem.scheme == UNTOUCHED
    assert problems(everywhere(UNTOUCHED, shapes), RUNTIMES["vllm"]) == ()


@pytest.mark.parametrize(
    ("scheme", "ranks", "broken"),
    [  # o_proj and down_proj have 1,024 and 2,816 = 22 × 128 inputs, which are split; of the others, the outputs are
        (LayerScheme(4, 128), 1, set()),
        (LayerScheme(4, 128), 2, set()),
        (LayerScheme(4, 128), 4, {"mlp.down_proj"}),  # 704 = 5.5 × 128
        (LayerScheme(4, 64), 4, set()),
        (LayerScheme(4, 64), 8, {"mlp.down_proj"}),  # 352 = 5.5 × 64
        (LayerScheme(4, 32), 8, set()),
        (LayerScheme(8), 8, set()),
    ],
)
def test_ranks_have_whole_groups(scheme, ranks, broken):
    plan = everywhere(scheme)
    found = problems(plan, RUNTIMES["vllm"], ranks)
    assert {problem.modules[0] for problem in found} == {f"l.0.{name}" for name in broken}
    assert problems(with_changes(plan, found), RUNTIMES["vllm"], ranks) == ()


def test_what_cannot_be_split_needs_fewer_ranks():
    (q, *_) = found = problems(everywhere(LayerScheme(4, 64)), RUNTIMES["vllm"], 3)
    assert len(found) == 4
    assert q.scheme is None
    assert str(q).endswith("its 1024 output features cannot be split over 3 ranks; use fewer ranks")


def test_zero_points_fill_whole_words():
    shapes = {"mlp.up_proj": (36, 64)}
    assert problems(everywhere(LayerScheme(4, 32), shapes), RUNTIMES["vllm"]) == ()
    (problem,) = problems(everywhere(LayerScheme(4, 32, False), shapes), RUNTIMES["vllm"])
    assert "36 output features are no whole words of 8 zero points" in problem.rule
    assert problem.scheme == LayerScheme(4, 32)


@pytest.mark.parametrize(
    ("name", "given", "proposed"),
    [
        ("vllm", LayerScheme(3, 64), LayerScheme(4, 64)),
        ("vllm", LayerScheme(5, 64), LayerScheme(8, 64)),
        ("vllm", LayerScheme(8, -1, False), LayerScheme(8)),
        ("vllm", LayerScheme(4, 256), LayerScheme(4, 128)),
        ("vllm", LayerScheme(4, 16), LayerScheme(4, 32)),
        ("vllm-cpu", LayerScheme(8), UNTOUCHED),
        ("vllm-cpu", LayerScheme(2, 64), LayerScheme(4, 64)),
    ],
    ids=str,
)
def test_the_change_is_the_nearest_that_helps(name, given, proposed):
    plan = everywhere(given)
    found = problems(plan, RUNTIMES[name])
    assert len(found) == 4  # q/k/v, o, gate/up, down
    assert {problem.scheme for problem in found} == {proposed}
    assert problems(with_changes(plan, found), RUNTIMES[name]) == ()


@pytest.mark.parametrize("name", RUNTIMES)
def test_only_causal_language_models_in_the_portable_format_are_loaded(name):
    assert model_problems("causal-lm", True, RUNTIMES[name]) == ()
    assert len(model_problems("masked-lm", True, RUNTIMES[name])) == 1
    (problem,) = model_problems("causal-lm", False, RUNTIMES[name])
    assert "only linear layers" in str(problem)


@pytest.mark.parametrize("runtime", RUNTIMES.values(), ids=RUNTIMES)
def test_the_readme_tells_the_rules(runtime):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    row = (runtime.title, runtime.kernel, runtime.bits_in_words, runtime.group_sizes_in_words)
    assert f"| {' | '.join(row)} |" in readme


# Plans for a runtime


def table_of(shapes, group_size=32, symmetric=True, granularity="group", widths=(2, 3, 4, 8)):
    """Made-up costs that fall with the bits, and differ between units."""
    fused = matrices(f"l.0.{name}" for name in shapes)
    plan = plan_with({}, shapes)
    if granularity == "group":
        plan = replace(plan, modules=tuple(replace(module, unit=fused[module.name]) for module in plan.modules))
    units = list(dict.fromkeys(module.unit for module in plan.modules))
    costs = {unit: {bits: (1 + index * 0.37) * 4.0**-bits for bits in widths} for index, unit in enumerate(units)}
    raw = {unit: 1.0 + index for index, unit in enumerate(units)}
    return SensitivityTable(
        method="tdmpq", metric="loss", base=1.0, raw=raw, plan=plan, settings={}, fingerprint="", costs=costs,
        errors=costs, group_size=group_size, symmetric=symmetric,
    )  # fmt: skip


ODD = {**LAYER, "self_attn.o_proj": (1024, 1008), "mlp.down_proj": (1016, 2816)}  # per channel, and not × 32


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("target_bits", [4.6, 6.5, 9.0, 12.0])
def test_the_plan_for_a_runtime_is_the_cheapest_that_it_loads(name, symmetric, target_bits):
    table = table_of(ODD, symmetric=symmetric)
    settings = {"bits": (2, 3, 4, 8, 16), "group_size": 32, "symmetric": symmetric, "target_bits": target_bits}
    units = list(table.raw)
    every = [
        table.plan.with_bits(dict(zip(units, choice, strict=True)), 32, symmetric)
        for choice in itertools.product((2, 3, 4, 8, 16), repeat=len(units))
    ]
    allowed = [plan for plan in every if plan.bits_per_weight <= target_bits and not problems(plan, RUNTIMES[name])]

    def cost(plan):
        bits = {module.unit: module.scheme.bits for module in plan.modules}
        return sum(table.costs[unit].get(bits[unit], 0.0) for unit in units)

    config = CPTQuantConfig(target_runtime=name, **settings)
    if not allowed:
        with pytest.raises(PlanError, match="cannot be met"):
            allocate(table, config.recipe())
        return
    found = allocate(table, config.recipe())
    assert not problems(found, RUNTIMES[name])
    assert found.bits_per_weight <= target_bits
    assert cost(found) == pytest.approx(min(map(cost, allowed)))


@pytest.mark.parametrize("allocation", ["kmeans", "k-harmonic-means"])
@pytest.mark.parametrize("name", RUNTIMES)
def test_clusters_give_the_next_wider_bits_that_are_loaded(name, allocation):
    table = table_of(ODD, widths=(4, 8))
    settings = {"allocation": allocation, "granularity": "group", "estimator": "taylor", "group_size": 32}
    free = allocate(
        table, CPTQuantConfig(bits=[b for b in (4, 8, 16) if RUNTIMES[name].takes_bits(b, True)], **settings).recipe()
    )
    found = allocate(table, CPTQuantConfig(target_runtime=name, **settings).recipe())
    assert not problems(found, RUNTIMES[name])
    refused = {module for problem in problems(free, RUNTIMES[name]) for module in problem.modules}
    assert bool(refused) == (name != "vllm")
    for before, after in zip(free.modules, found.modules, strict=True):
        assert after.scheme.bits > before.scheme.bits if after.name in refused else after == before


def test_a_unit_without_a_choice_is_named():
    table = table_of({**LAYER, "mlp.down_proj": (1016, 2816)})
    settings = {"group_size": 32, "target_runtime": "vllm-cpu"}
    with pytest.raises(
        PlanError, match=r"vLLM on CPUs loads l\.0\.mlp\.down_proj with none of the bits 4 \(.*1016 × 2816"
    ):
        allocate(table, CPTQuantConfig(bits=(4, 8), **settings).recipe())
    override = {"*.down_proj": 16}
    assert allocate(table, CPTQuantConfig(bits=(4, 8), bits_override=override, target_bits=8, **settings).recipe())
    with pytest.raises(PlanError, match=r"loads l\.0\.mlp\.down_proj with none of the bits 4"):
        allocate(table, CPTQuantConfig(bits_override={"*.down_proj": 4}, **settings).recipe())


def test_scores_of_modules_make_no_plan_for_a_runtime():
    table = table_of(LAYER, granularity="module")
    with pytest.raises(PlanError, match=r"k_proj in one matrix with modules of other units; .*granularity='group'"):
        allocate(table, CPTQuantConfig(group_size=32, target_runtime="vllm").recipe())


# Models

SETTINGS = {**SMALL_SETTINGS, "estimator": "taylor", "target_bits": 6.0}


def prepared(kind, tokens, **settings):
    return make_plan(tiny_model(kind), CPTQuantConfig(**{**SETTINGS, "dataset": tokens, **settings}))


def test_a_model_is_planned_for_a_runtime(tokens):
    record = prepared("llama", tokens, bits=(2, 3, 4, 8, 16), target_runtime="vllm")
    assert record.settings["target_runtime"] == "vllm"
    assert {module.scheme.bits for module in record.plan.modules} <= {4, 8, 16}
    assert set(record.table.costs[record.plan.modules[0].unit]) == {4, 8}  # the others are not even measured
    assert not problems(record.plan, RUNTIMES["vllm"])


@pytest.mark.parametrize("asked", [{"strict": True}, {"target_runtime": "vllm"}], ids=str)
def test_models_that_no_plan_helps_are_refused_before_any_work(asked, tokens, monkeypatch):
    monkeypatch.setattr("hf_cptquant.pipeline.score", lambda *_: pytest.fail("scores were measured"))
    with pytest.raises(PlanError, match="only linear layers are written"):
        prepared("gpt2", tokens, **asked)
    with pytest.raises(PlanError, match="only known to load causal language models"):
        prepared("bert-mlm", tokens, **asked)


def test_strict_stops_before_the_work_or_before_rounding(tokens, monkeypatch):
    with pytest.raises(PlanError, match="Marlin takes 4 and 8 bits"):
        prepared("llama", tokens, bits=(3, 4, 8), strict=True, target_bits=4.4)
    monkeypatch.setattr("hf_cptquant.pipeline.score", lambda *_: pytest.fail("scores were measured"))
    with pytest.raises(
        PlanError, match=r"vLLM on CUDA loads .* with none of the bits 2, 3 .*Marlin takes 4 and 8 bits"
    ):
        prepared("llama", tokens, bits=(2, 3), strict=True, target_bits=4)


def test_a_given_plan_is_refused_before_any_work(tokens, tiny_folder, monkeypatch):
    plan = prepared("llama", tokens, bits=(3, 8)).plan
    monkeypatch.setattr("hf_cptquant.pipeline.quantize_model", lambda *_: pytest.fail("something was quantized"))
    for asked in ({"strict": True}, {"target_runtime": "sglang"}):
        config = CPTQuantConfig(plan=plan, quality="fast", **asked)
        with pytest.raises(PlanError, match=r"it would not load this checkpoint: model\.layers\.\d\..*bits"):
            AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), quantization_config=config)


def test_a_given_plan_that_is_loaded_may_be_of_single_modules(tokens, tiny_folder, tmp_path):
    undecided = prepared("llama", tokens, granularity="module").plan.undecided
    plan = undecided.with_bits({module.unit: 8 for module in undecided.modules})
    config = CPTQuantConfig(plan=plan, quality="fast", target_runtime="vllm", strict=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    assert BitPlan.load(tmp_path / "saved") == plan


@pytest.fixture(scope="module")
def saved(tokens, tmp_path_factory):
    """bits → a tiny Llama quantized to them everywhere, in a folder, and what was logged when it was saved."""
    base = tmp_path_factory.mktemp("dense")
    tiny_model("llama").to(torch.bfloat16).save_pretrained(base)

    def save(name, bits, **settings):
        config = CPTQuantConfig(bits=(bits,), group_size=32, quality="fast", target_bits=16, dataset=tokens, **settings)
        config.num_samples, config.sequence_length = 4, 32
        model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
        folder = tmp_path_factory.mktemp("saved") / name
        return model, folder

    return save


@pytest.mark.parametrize(
    ("bits", "settings", "loads"), [(4, {}, True), (3, {}, False), (8, {"symmetric": False}, False)]
)
def test_saving_says_in_a_line_what_vllm_would_not_load(bits, settings, loads, saved, logged):
    model, folder = saved("llama-cptquant", bits, **settings)
    logged.clear()
    model.save_pretrained(folder)
    said = [record.getMessage() for record in logged.records if "would not load" in record.getMessage()]
    card = (folder / "README.md").read_text()
    assert ("\n- vllm\n" in card) == loads
    assert ("\n$ vllm serve llama-cptquant\n" in card) == loads
    if loads:
        assert not said
    else:
        (line,) = said
        assert line.count("\n") == 0
        assert line.startswith(
            "By the rules of vLLM on CUDA (Marlin) it would not load this checkpoint: model.layers.0."
        )
        assert line.endswith("(11 more).")  # of 3 layers with q/k/v, o, gate/up and down


# Against the format itself


def test_the_section_names_every_part_of_a_fused_matrix_alike(tokens):
    """vLLM looks for the names of the parts: all in `ignore`, or all among the targets of one scheme."""
    record = prepared("llama", tokens, bits=(4, 8, 16), target_bits=9, target_runtime="vllm")
    section = json.loads(json.dumps(write_section(record, portable=True)))
    group_of = {name: key for key, group in section["config_groups"].items() for name in group["targets"]}
    assert all(group.keys() == {"targets", "weights"} for group in section["config_groups"].values())
    for index in range(3):
        for fused in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            names = [f"model.layers.{index}.{fused[0]}.{part}_proj" for part in fused[1]]
            places = {("ignore" if name in section["ignore"] else group_of[name]) for name in names}
            assert len(places) == 1
    assert {"model.embed_tokens", "lm_head"} <= set(section["ignore"])
