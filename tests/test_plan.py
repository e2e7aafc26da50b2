"""Schemes, bit plans, sensitivity tables and records: sizes by hand, rules, JSON both ways, refused input."""

import dataclasses
import json
import math
from xml.etree import ElementTree

import pytest
from conftest import plan_of

from hf_cptquant.bitmap import COLOURS
from hf_cptquant.errors import CPTQuantError, PlanError
from hf_cptquant.plan import PLAN_FILE, UNTOUCHED, BitPlan, LayerScheme, LeftAlone, ModulePlan, scheme_for
from hf_cptquant.record import QuantizationRecord
from hf_cptquant.table import SensitivityTable

BLOCK0, BLOCK10 = "model.layers.0", "model.layers.10"


@pytest.fixture
def plan():
    """Two blocks; in bytes: 288 of 1024, 264 of 512, 1024 of 1024, and 392 of everything else."""
    return BitPlan(
        modules=(
            ModulePlan(f"{BLOCK0}.attn.q", BLOCK0, f"{BLOCK0}.attn", 8, 64, 2, LayerScheme(4, 32)),
            ModulePlan(f"{BLOCK0}.fc", BLOCK0, f"{BLOCK0}.fc", 4, 64, 2, LayerScheme(8)),
            ModulePlan(f"{BLOCK10}.attn.q", BLOCK10, f"{BLOCK10}.attn", 8, 64, 2, LayerScheme(16)),
        ),
        left=(LeftAlone("lm_head", "outside the blocks", 640),),
        other_bytes=392,
    )


@pytest.fixture
def table():
    return SensitivityTable(
        method="tdmpq",
        metric="loss",
        base=2.5,
        raw={"layers.0": 0.5, "layers.é": -2.0},
        plan=plan_of({"layers.0": "layers.0", "layers.é": "layers.é"}),
        settings={"estimator": "taylor", "bits": [4]},
        fingerprint="abc",
        costs={"layers.0": {4: 0.5}, "layers.é": {4: -2.0}},
        correlations={"layers.0": {"layers.é": 0.25}},
        errors={"layers.0": {4: 0.01}, "layers.é": {4: 0.02}},
        group_size=64,
    )


@pytest.fixture
def record(plan, table):
    raw = {module.unit: 0.5 for module in plan.modules}
    table = dataclasses.replace(table, plan=plan.undecided, raw=raw, costs={}, errors={unit: {4: 0.01} for unit in raw})
    return QuantizationRecord(plan, table, {"bits": [4, 8]}, {"source": "texts"}, {"seconds": 1.5})


@pytest.mark.parametrize(
    ("scheme", "shape", "element_size", "nbytes"),
    [
        # integers 576·72·4, scales 576·9·2
        (LayerScheme(4, 64), (576, 576), 2, 165888 + 10368),
        # and zero points: 72 words for each of 9 groups
        (LayerScheme(4, 64, symmetric=False), (576, 576), 2, 165888 + 10368 + 72 * 9 * 4),
        (LayerScheme(4, 64), (576, 576), 4, 165888 + 2 * 10368),
        (LayerScheme(3, 64), (576, 576), 2, 576 * 54 * 4 + 10368),
        (LayerScheme(2, 128), (256, 256), 2, 256 * 16 * 4 + 256 * 2 * 2),
        (LayerScheme(8), (576, 576), 2, 576 * 576 + 576 * 2),
        # 33 · 3 = 99 bits need 4 words, 10 · 3 = 30 bits of zero points need 1
        (LayerScheme(3), (10, 33), 4, 10 * 4 * 4 + 10 * 4),
        (LayerScheme(3, symmetric=False), (10, 33), 4, 10 * 4 * 4 + 10 * 4 + 4),
        # 5 · 4 = 20 bits of zero points need 1 word in each of 2 groups
        (LayerScheme(4, 32, symmetric=False), (5, 64), 2, 5 * 8 * 4 + 5 * 2 * 2 + 2 * 4),
        (LayerScheme(16), (576, 576), 2, 576 * 576 * 2),
        (LayerScheme(16), (576, 576), 4, 576 * 576 * 4),
    ],
    ids=str,
)
def test_bytes_of_a_scheme(scheme, shape, element_size, nbytes):
    assert scheme.nbytes(*shape, element_size) == nbytes


@pytest.mark.parametrize(
    ("scheme", "bits_per_weight"),
    [
        (LayerScheme(4, 64), 4.25),
        (LayerScheme(4, 64, symmetric=False), 4.3125),
        (LayerScheme(3, 64), 3.25),
        (LayerScheme(4), 4 + 16 / 576),
        (LayerScheme(8), 8 + 16 / 576),
        (LayerScheme(16), 16),
    ],
    ids=str,
)
def test_bits_per_weight_include_scales_and_zero_points(scheme, bits_per_weight):
    plan = BitPlan((ModulePlan("block.fc", "block", "block", 576, 576, 2, scheme),))
    assert plan.bits_per_weight == pytest.approx(bits_per_weight, rel=1e-12)


@pytest.mark.parametrize("bits", [0, 1, 7, 9, 32, -4, "4"])
def test_unknown_bits_are_refused(bits):
    with pytest.raises(PlanError, match=r"bits are not possible; choose from 2, 3, 4, 5, 6, 8, 16"):
        LayerScheme(bits)


@pytest.mark.parametrize("group_size", [0, -2, -128])
def test_impossible_group_sizes_are_refused(group_size):
    with pytest.raises(PlanError, match=f"group size {group_size} is not possible"):
        LayerScheme(4, group_size)


def test_group_size_must_divide_the_input_features():
    with pytest.raises(PlanError, match=r"64 does not divide 100 input features"):
        LayerScheme(4, 64).groups(100)
    assert LayerScheme(4, 64).groups(192) == 3
    assert LayerScheme(4).groups(100) == 1


@pytest.mark.parametrize(
    ("in_features", "group_size", "fitting"),
    [
        (256, 128, 128),
        (192, 128, 64),
        (96, 128, 32),
        (100, 128, -1),
        (16, 128, -1),
        (128, 64, 64),
        (96, 64, 32),
        (128, 32, 32),
        (48, 32, -1),
        (48, 16, 16),
        (40, 16, -1),
        (512, 256, 256),
        (384, 256, 128),
        (128, -1, -1),
    ],
)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_groups_fall_back_to_the_largest_that_fits(bits, in_features, group_size, fitting):
    for symmetric in (True, False):
        expected = LayerScheme(bits, fitting, symmetric)
        assert scheme_for(bits, in_features, group_size, symmetric) == expected


@pytest.mark.parametrize("symmetric", [True, False])
def test_8_bits_are_per_channel(symmetric):
    assert scheme_for(8, 256, 128, symmetric) == LayerScheme(8, -1, symmetric)


def test_16_bits_are_untouched():
    scheme = scheme_for(16, 256, 128, symmetric=False)
    assert scheme.bits == 16
    assert not scheme.packed


def test_default_group_size_is_128():
    assert scheme_for(4, 256) == LayerScheme(4, 128, symmetric=True)


def test_totals(plan):
    assert [module.nbytes for module in plan.modules] == [288, 264, 1024]
    assert [module.original_bytes for module in plan.modules] == [1024, 512, 1024]
    assert plan.weights == 512 + 256 + 512
    assert plan.bits_per_weight == pytest.approx(8 * 1576 / 1280)
    assert plan.nbytes == 1968
    assert plan.original_bytes == 2952


def test_compression_ratio_and_reduction_are_before_over_after(plan):
    assert plan.compression_ratio == pytest.approx(1.5)
    assert plan.final_reduction_percentage == pytest.approx(100 / 3)


def test_packed_are_the_modules_below_16_bits(plan):
    assert plan.packed == plan.modules[:2]


def test_by_block_keeps_order_and_strips_only_the_own_block(plan):
    blocks = plan.by_block()
    assert list(blocks) == [BLOCK0, BLOCK10]
    assert blocks[BLOCK0] == {"attn.q": plan.modules[0], "fc": plan.modules[1]}
    assert list(blocks[BLOCK0]) == ["attn.q", "fc"]
    assert blocks[BLOCK10] == {"attn.q": plan.modules[2]}


def test_with_bits_decides_by_unit_and_changes_nothing_else(plan):
    before = plan.to_dict()
    decided = plan.with_bits({f"{BLOCK0}.attn": 3, f"{BLOCK0}.fc": 16, f"{BLOCK10}.attn": 8}, 128, symmetric=False)
    schemes = [module.scheme for module in decided.modules]
    assert schemes == [LayerScheme(3, 64, symmetric=False), LayerScheme(16), LayerScheme(8, symmetric=False)]
    assert [module.name for module in decided.modules] == [module.name for module in plan.modules]
    assert (decided.left, decided.other_bytes) == (plan.left, plan.other_bytes)
    assert plan.to_dict() == before


def test_a_module_may_be_decided_only_once(plan):
    with pytest.raises(PlanError, match=rf"{BLOCK0}\.fc more than once"):
        dataclasses.replace(plan, modules=(*plan.modules, plan.modules[1]))


@pytest.mark.parametrize("value", ["plan", "table", "record"])
def test_json_round_trip(value, request, tmp_path):
    original = request.getfixturevalue(value)
    assert type(original).from_dict(json.loads(json.dumps(original.to_dict()))) == original
    path = tmp_path / "value.json"
    original.save(path)
    assert type(original).load(path) == original
    assert type(original).load(str(path)) == original


@pytest.mark.parametrize("value", ["plan", "record"])
def test_load_from_the_folder_of_a_checkpoint(value, request, tmp_path):
    original = request.getfixturevalue(value)
    original.save(tmp_path / PLAN_FILE)
    assert PLAN_FILE == "cptquant_plan.json"
    assert type(original).load(tmp_path) == original


def test_a_record_is_also_a_plan(record, tmp_path):
    record.save(tmp_path / PLAN_FILE)
    assert BitPlan.load(tmp_path) == record.plan


def test_table_file_holds_the_scores(table, tmp_path):
    table.save(tmp_path / "table.json")
    stored = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert stored["scores"] == {"layers.0": 0.25, "layers.é": -1.0}
    assert stored["raw"] == {"layers.0": 0.5, "layers.é": -2.0}


@pytest.mark.parametrize(
    ("raw", "scores"),
    [
        ({"b": 2.0, "a": -4.0, "c": 1.0}, {"b": 0.5, "a": -1.0, "c": 0.25}),
        ({"a": 0.001}, {"a": 1.0}),
        ({"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}),
        ({}, {}),
    ],
    ids=["largest-magnitude-negative", "single", "all-zero", "empty"],
)
def test_scores_are_divided_by_the_largest_magnitude(raw, scores):
    table = SensitivityTable("tdmpq", "loss", 1.0, raw, plan_of(dict.fromkeys(raw, "block")), {}, "")
    assert table.scores == scores
    assert list(table.scores) == list(raw)


@pytest.mark.parametrize("change", [{"version": 2}, {"version": None}, {"format": "other"}], ids=str)
def test_other_versions_and_formats_are_refused(plan, change):
    with pytest.raises(PlanError, match=r"not a bit plan of version 1: format .*, version"):
        BitPlan.from_dict({**plan.to_dict(), **change})


@pytest.mark.parametrize("key", ["modules", "left", "other_bytes"])
def test_missing_key_of_a_plan_is_named(plan, key):
    data = plan.to_dict()
    del data[key]
    with pytest.raises(PlanError, match=f"incomplete.*{key}"):
        BitPlan.from_dict(data)


@pytest.mark.parametrize("key", ["block", "unit", "shape", "element_size", "bits", "group_size", "symmetric"])
def test_missing_key_of_a_module_is_named(plan, key):
    data = plan.to_dict()
    del data["modules"][f"{BLOCK0}.fc"][key]
    with pytest.raises(PlanError, match=rf"{BLOCK0}\.fc: its entry in the bit plan is wrong: .*{key}"):
        BitPlan.from_dict(data)


@pytest.mark.parametrize("key", ["method", "metric", "base", "raw", "fingerprint"])
def test_missing_key_of_a_table_is_named(table, key):
    data = table.to_dict()
    del data[key]
    with pytest.raises(PlanError, match=f"sensitivity table is incomplete: .*{key}"):
        SensitivityTable.from_dict(data)


@pytest.mark.parametrize("key", ["sensitivity", "settings", "calibration", "measured"])
def test_missing_key_of_a_record_is_named(record, key):
    data = record.to_dict()
    del data[key]
    with pytest.raises(PlanError, match=f"has no '{key}'"):
        QuantizationRecord.from_dict(data)


def test_unknown_bits_in_a_file_are_refused(plan, tmp_path):
    data = plan.to_dict()
    data["modules"][f"{BLOCK0}.fc"]["bits"] = 7
    (tmp_path / PLAN_FILE).write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(PlanError, match=r"7 bits are not possible; choose from 2, 3, 4"):
        BitPlan.load(tmp_path)


def test_error_in_the_entry_of_a_module_names_the_module(plan):
    data = plan.to_dict()
    data["modules"][f"{BLOCK0}.fc"]["bits"] = 7
    with pytest.raises(PlanError, match=rf"{BLOCK0}\.fc"):
        BitPlan.from_dict(data)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shape", [4]),
        ("shape", [4, "64"]),
        ("shape", [-4, 64]),
        ("element_size", None),
        ("bits", 4.0),
        ("bits", "4"),
        ("group_size", "64"),
        ("symmetric", "no"),
    ],
)
def test_wrong_type_in_the_entry_of_a_module_is_refused(plan, key, value):
    data = plan.to_dict()
    data["modules"][f"{BLOCK0}.fc"][key] = value
    with pytest.raises(PlanError):
        BitPlan.from_dict(data)


@pytest.mark.parametrize(
    ("key", "value"), [("modules", []), ("left", None), ("left", [{"name": "x"}]), ("other_bytes", "x")]
)
def test_wrong_type_in_a_plan_is_refused(plan, key, value):
    with pytest.raises(PlanError):
        BitPlan.from_dict({**plan.to_dict(), key: value})


@pytest.mark.parametrize("raw", [None, [1.0], {"a": "x"}, {"a": None}], ids=str)
def test_wrong_type_in_a_table_is_refused(table, raw):
    with pytest.raises(PlanError):
        SensitivityTable.from_dict({**table.to_dict(), "raw": raw})


@pytest.mark.parametrize("key", ["sensitivity", "settings", "calibration", "measured"])
def test_wrong_type_in_a_record_is_refused(record, key):
    with pytest.raises(PlanError):
        QuantizationRecord.from_dict({**record.to_dict(), key: "x"})


@pytest.mark.parametrize("loader", [BitPlan, SensitivityTable, QuantizationRecord])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{not json", "value.json is not JSON"),
        (b"", "value.json is not JSON"),
        (b"\xff\xfe\x00", "value.json is not JSON"),
        (b"[1, 2]", "value.json holds list, not a JSON object"),
        (b'"text"', "value.json holds str, not a JSON object"),
    ],
    ids=["broken", "empty", "binary", "list", "string"],
)
def test_a_file_without_a_json_object_is_refused(loader, content, message, tmp_path):
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=message):
        loader.load(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(PlanError, match=r"absent\.json does not exist"):
        BitPlan.load(tmp_path / "absent.json")
    with pytest.raises(PlanError, match=r"cptquant_plan\.json does not exist"):
        BitPlan.load(tmp_path)


def test_plan_errors_are_value_errors_of_the_package():
    assert issubclass(PlanError, CPTQuantError)
    assert issubclass(CPTQuantError, ValueError)


def scored(values, kinds=("",)) -> SensitivityTable:
    """A table with given sums of blocks, each split unevenly among some units."""
    raw, blocks = {}, {}
    for index, value in enumerate(values):
        for number, kind in enumerate(kinds):
            unit = f"layers.{index}{kind}"
            rest = value + len(kinds) - 1  # the units after the first measured -1 each
            raw[unit], blocks[unit] = (rest if number == 0 else -1.0), f"layers.{index}"
    return SensitivityTable("pmpq", "loss", 1.0, raw, plan_of(blocks), {}, "")


KINDS = [("",), (".q", ".o"), (".q", ".o", ".up", ".down")]


@pytest.mark.parametrize("kinds", KINDS, ids=len)
@pytest.mark.parametrize(
    ("values", "deviations"),
    [
        # the only block is the first and the last, and the mean
        ([5.0], (0, 0, 0)),
        # mean 2; nothing lies between the two
        ([1.0, 3.0], (1, 0, 1)),
        # mean 2; one block in each part
        ([0.0, 1.0, 5.0], (2, 1, 3)),
        # mean -1
        ([-2.0, -1.5, 0.5], (1, 0.5, 1.5)),
        # mean 2; 30 % of 4 blocks is about one
        ([0.0, 1.0, 3.0, 4.0], (2, 1, 2)),
        # mean 4; three blocks, four, three
        ([0.0, 1.0, 2.0, 3.0, 5.0, 4.0, 8.0, 5.0, 3.0, 9.0], (29 / 3, 18 / 4, 27 / 3)),
    ],
    ids=["1 block", "2 blocks", "3 blocks", "negative", "4 blocks", "10 blocks"],
)
def test_deviations_from_the_mean_of_all_blocks(values, deviations, kinds):
    expected = [math.sqrt(value) for value in deviations] if len(values) == 10 else list(deviations)
    assert list(scored(values, kinds).deviations()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kinds", KINDS, ids=len)
def test_sensitivity_of_a_block_is_the_sum_of_its_units(kinds):
    values = [2.5, -1.0, 0.0, 7.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 4.0]
    table = scored(values, kinds)
    assert len(table.raw) == len(values) * len(kinds)
    assert list(table.by_block()) == [f"layers.{index}" for index in range(11)]  # in the model's order: 10 after 9
    assert list(table.by_block().values()) == pytest.approx(values)


def test_sums_follow_the_named_block_and_not_the_units_name():
    blocks = {"layers.1.a": "layers.1", "layers.10.a": "layers.10", "layers.1.b": "layers.1"}
    raw = dict(zip(blocks, (1.0, 10.0, 0.5), strict=True))
    table = SensitivityTable("pmpq", "loss", 1.0, raw, plan_of(blocks), {}, "")
    assert table.by_block() == {"layers.1": 1.5, "layers.10": 10.0}


# Pictures


def test_maps_have_a_row_for_each_kind_and_a_column_for_each_block(plan):
    (drawn,) = plan.maps()
    stack = BLOCK0.rpartition(".")[0]
    assert (drawn.stack, drawn.rows, drawn.columns) == (stack, ("attn", "fc"), ("0", "10"))
    assert drawn.cells == {("attn", "0"): (4,), ("fc", "0"): (8,), ("attn", "10"): (16,)}
    assert drawn.widths == (4, 8, 16)


def test_experts_share_a_row_and_equal_leaves_do_not():
    names = {"experts.0.up": 4, "experts.1.up": 8, "experts.10.up": 4, "shared.up": 8, "gate": 16}
    modules = tuple(
        ModulePlan(f"m.layers.3.{name}", "m.layers.3", f"m.layers.3.{name}", 8, 64, 2, LayerScheme(bits))
        for name, bits in names.items()
    )
    (drawn,) = BitPlan(modules).maps()
    assert drawn.rows == ("experts.*.up", "shared.up", "gate")
    assert drawn.cells["experts.*.up", "3"] == (4, 8)


def test_units_of_a_block_are_drawn_by_their_modules_and_stacks_apart():
    modules = tuple(
        ModulePlan(
            f"{stack}.block.{index}.{leaf}", f"{stack}.block.{index}", f"{stack}.block.{index}", 8, 64, 2, UNTOUCHED
        )
        for stack in ("encoder", "decoder")
        for index in range(2)
        for leaf in ("a", "b")
    )
    drawn = BitPlan(modules).maps()
    assert [(one.stack, one.rows, one.columns) for one in drawn] == [
        (f"{stack}.block", ("a", "b"), ("0", "1")) for stack in ("encoder", "decoder")
    ]


def test_a_notebook_shows_the_map_and_the_totals(plan):
    shown = ElementTree.fromstring(plan._repr_html_())
    rows = [[cell.text for cell in row] for row in shown.iter("tr")]
    assert rows == [[BLOCK0.rpartition(".")[0], "0", "10"], ["attn", "4", "16"], ["fc", "8", None]]
    coloured = [cell.attrib["style"] for cell in shown.iter("td") if cell.text == "8"]
    assert coloured[0].startswith(f"background:{COLOURS[8]};color:white")
    assert shown.find("p").text == plan.summary
    assert f"{plan.bits_per_weight:.3f} bits per weight" in plan.summary


def test_what_is_undecided_has_16_bits(plan):
    assert plan.undecided.bits_per_weight == 16
    assert [module.unit for module in plan.undecided.modules] == [module.unit for module in plan.modules]
    assert plan.undecided.nbytes == plan.original_bytes
