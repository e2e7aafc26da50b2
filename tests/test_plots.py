"""Pictures of scores: a PNG for every kind of table, wide enough for its blocks, with the measured figures."""

import itertools
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import plan_of
from matplotlib import image
from matplotlib.figure import Figure

from hf_cptquant.allocation import FrontierPoint
from hf_cptquant.plots import METRIC_LABELS, plot_frontier, plot_plan, plot_sensitivity
from hf_cptquant.table import SensitivityTable

KINDS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def table_of(blocks: int, granularity: str = "block", correlated: bool = False, **changes) -> SensitivityTable:
    """Made-up scores that rise towards the end, some of them negative."""
    kinds = KINDS if granularity == "group" else ("",)
    draw = np.random.default_rng(0)
    raw, block_of = {}, {}
    for index in range(blocks):
        for kind in kinds:
            unit = f"model.layers.{index}" + (f".{kind}" if kind else "")
            block_of[unit] = f"model.layers.{index}"
            raw[unit] = float(draw.normal(0.5 * index / blocks, 0.3))
    rows = {unit: {other: float(draw.uniform(0, 1)) for other in raw} for unit in raw} if correlated else {}
    settings = {"method": "tdmpq", "metric": "loss", "settings": {"estimator": "taylor"}, **changes}
    return SensitivityTable(base=2.5, raw=raw, plan=plan_of(block_of), fingerprint="", correlations=rows, **settings)


def size_of(path: Path) -> tuple[int, int]:
    """Width and height from the header of a PNG."""
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn."""
    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))[1])
    return figures


@pytest.mark.parametrize(
    ("blocks", "granularity", "correlated"),
    [(1, "block", False), (1, "group", True), (24, "block", True), (80, "block", False), (80, "group", True)],
)
def test_a_readable_picture_of_every_kind_of_table(blocks, granularity, correlated, tmp_path):
    path = tmp_path / "plot.png"
    plot_sensitivity(table_of(blocks, granularity, correlated), path)
    pixels = image.imread(path)
    assert pixels.shape[:2] == size_of(path)[::-1]
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 10  # something is drawn


def test_the_picture_grows_with_the_blocks_and_the_correlations(tmp_path):
    sizes = {}
    for blocks, correlated in ((3, False), (30, False), (80, False), (3, True), (30, True)):
        path = tmp_path / "plot.png"
        plot_sensitivity(table_of(blocks, correlated=correlated), path)
        sizes[blocks, correlated] = size_of(path)
    assert sizes[3, False][0] < sizes[30, False][0] < sizes[80, False][0]
    assert sizes[3, False][0] < sizes[3, True][0]
    assert sizes[30, False][0] < sizes[30, True][0]
    assert len({height for _, height in sizes.values()}) == 1


def test_bars_are_the_sensitivities_of_the_blocks(tmp_path, drawn):
    table = table_of(24)
    plot_sensitivity(table, str(tmp_path / "plot.png"))
    (axes,) = drawn[0].axes
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx(list(table.raw.values()))
    assert min(heights) < 0 < max(heights)
    low, high = axes.get_ylim()
    assert low <= min(heights)
    assert max(heights) <= high
    assert axes.get_ylabel() == METRIC_LABELS["loss"]
    assert "TDMPQ (taylor)" in drawn[0].get_suptitle()
    assert axes.get_legend() is None


def test_units_of_a_block_are_stacked_and_told_apart(tmp_path, drawn):
    table = table_of(5, "group")
    plot_sensitivity(table, tmp_path / "plot.png")
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(KINDS)
    assert len({bar.get_facecolor() for bar in axes.patches}) == len(KINDS)
    for index in range(5):
        bars = [bar for bar in axes.patches if bar.get_x() + bar.get_width() / 2 == pytest.approx(index)]
        values = [table.raw[f"model.layers.{index}.{kind}"] for kind in KINDS]
        assert [bar.get_height() for bar in bars] == pytest.approx(values)
        ends = [sorted((bar.get_y(), bar.get_y() + bar.get_height())) for bar in bars]
        assert max(end for _, end in ends) == pytest.approx(sum(value for value in values if value > 0))
        assert min(start for start, _ in ends) == pytest.approx(sum(value for value in values if value < 0))
        for first, second in zip(sorted(ends)[:-1], sorted(ends)[1:], strict=True):
            assert first[1] == pytest.approx(second[0])  # no bar hides another


@pytest.mark.parametrize("blocks", [3, 80])
def test_ticks_are_numbers_of_blocks_and_do_not_crowd(blocks, tmp_path, drawn):
    plot_sensitivity(table_of(blocks), tmp_path / "plot.png")
    ticks = drawn[0].axes[0].get_xticks()
    labels = [label.get_text() for label in drawn[0].axes[0].get_xticklabels()]
    assert labels == [str(int(tick)) for tick in ticks]
    assert ticks[0] == 0
    assert len(ticks) <= 32


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("blocks", [30, 80])
def test_labels_of_blocks_do_not_overlap(blocks, correlated, tmp_path, drawn):
    plot_sensitivity(table_of(blocks, correlated=correlated), tmp_path / "plot.png")
    boxes = [label.get_window_extent() for label in drawn[0].axes[0].get_xticklabels()]
    assert all(first.x1 < second.x0 for first, second in itertools.pairwise(boxes))


def test_the_matrix_takes_no_room_from_the_bars(tmp_path, drawn):
    for correlated in (False, True):
        plot_sensitivity(table_of(80, correlated=correlated), tmp_path / "plot.png")
    alone, beside = (figure.axes[0].get_window_extent().width for figure in drawn)
    assert beside > 0.9 * alone


def test_the_matrix_shows_the_correlations(tmp_path, drawn):
    table = table_of(6, correlated=True, method="cmpq", metric="correlation", settings={})
    plot_sensitivity(table, tmp_path / "plot.png")
    bars, matrix = drawn[0].axes[:2]
    assert bars.get_ylabel() == METRIC_LABELS["correlation"]
    shown = matrix.images[0].get_array()
    expected = [[table.correlations[row][column] for column in table.raw] for row in table.raw]
    assert np.asarray(shown) == pytest.approx(np.array(expected))


def test_stacks_that_were_not_compared_leave_gaps(tmp_path, drawn):
    correlations = {"a.0": {"a.0": 1.0, "a.1": 0.5}, "a.1": {"a.0": 0.5, "a.1": 1.0}, "b.0": {"b.0": 1.0}}
    blocks = {unit: unit for unit in correlations}
    table = SensitivityTable(
        "cmpq", "correlation", 1.0, dict.fromkeys(blocks, 0.5), plan_of(blocks), {}, "", correlations=correlations
    )
    plot_sensitivity(table, tmp_path / "plot.png")
    shown = np.ma.filled(drawn[0].axes[1].images[0].get_array(), np.nan)
    assert np.isnan(shown).tolist() == [[False, False, True], [False, False, True], [True, True, False]]


@pytest.mark.parametrize("metric", METRIC_LABELS)
def test_every_metric_has_its_label(metric, tmp_path, drawn):
    plot_sensitivity(table_of(3, metric=metric, settings={}), tmp_path / "plot.png")
    assert drawn[0].axes[0].get_ylabel() == METRIC_LABELS[metric]
    assert drawn[0].get_suptitle() == "TDMPQ: sensitivity of each block"


def test_scores_of_zero_can_be_drawn(tmp_path):
    table = table_of(3)
    plot_sensitivity(
        SensitivityTable("pmpq", "loss", 1.0, dict.fromkeys(table.raw, 0.0), table.plan, {}, ""),
        tmp_path / "plot.png",
    )
    assert size_of(tmp_path / "plot.png")[0] > 0


def test_an_unknown_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        plot_sensitivity(table_of(3), tmp_path / "nowhere" / "plot.png")


def test_pyplot_is_not_loaded_and_matplotlib_only_to_draw(tmp_path):
    script = """
import sys
from hf_cptquant import cli
from hf_cptquant.plan import UNTOUCHED, BitPlan, ModulePlan
from hf_cptquant.plots import plot_sensitivity
from hf_cptquant.table import SensitivityTable
assert "matplotlib" not in sys.modules, "loaded too early"
plan = BitPlan((ModulePlan("a.0.linear", "a.0", "a.0", 8, 64, 2, UNTOUCHED),))
plot_sensitivity(SensitivityTable("pmpq", "loss", 1.0, {"a.0": 1.0}, plan, {}, ""), sys.argv[1])
assert "matplotlib" in sys.modules
assert "matplotlib.pyplot" not in sys.modules, "pyplot holds figures for good, and may want a display"
"""
    path = tmp_path / "plot.png"
    process = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert size_of(path)[1] == 600


# Plans and frontiers


def plan_and_table(blocks: int):
    table = table_of(blocks, "group")
    widths = {unit: (4, 8, 16)[index % 3] for index, unit in enumerate(table.raw)}
    return table.plan.with_bits(widths), table, widths


@pytest.mark.parametrize("blocks", [1, 24, 80])
@pytest.mark.parametrize("scored", [True, False])
def test_a_plan_is_drawn_cell_by_cell_over_its_scores(blocks, scored, tmp_path, drawn):
    plan, table, widths = plan_and_table(blocks)
    plot_plan(plan, table if scored else None, tmp_path / "plan.png")
    axes = drawn[0].axes
    assert len(axes) == 1 + scored
    texts = {(text.get_position()[0], text.get_position()[1]): text.get_text() for text in axes[0].texts}
    for (block, kind), unit in zip(itertools.product(range(blocks), range(4)), table.raw, strict=True):
        assert texts[block, kind] == str(widths[unit])
    assert len(texts) == len(axes[0].patches) == blocks * 4
    assert [label.get_text() for label in axes[0].get_yticklabels()] == [kind.rpartition(".")[2] for kind in KINDS]
    assert len(axes[0].get_xticks()) <= 20
    assert plan.summary.split(";")[0] in drawn[0].get_suptitle()
    width, _ = size_of(tmp_path / "plan.png")
    assert width >= blocks * 30  # a cell of at least 30 pixels
    if scored:
        assert axes[0].get_xlim() == axes[1].get_xlim()  # bars stand below their columns
        heights = np.array([bar.get_height() for bar in axes[1].patches])
        assert heights == pytest.approx(np.array(list(table.raw.values())).reshape(blocks, 4).T.flatten())


def test_stacks_of_a_plan_are_drawn_one_below_the_other(tmp_path, drawn):
    blocks = {
        f"{stack}.{index}.fc": f"{stack}.{index}" for stack, count in (("a", 2), ("b", 5)) for index in range(count)
    }
    plot_plan(plan_of(blocks), None, tmp_path / "plan.png")
    assert [axes.get_title() for axes in drawn[0].axes] == ["a", "b"]


@pytest.mark.parametrize("measured", [True, False])
def test_a_frontier_is_drawn_over_bits_per_weight(measured, tmp_path, drawn):
    undecided = plan_of({"a.0": "a.0", "a.1": "a.1"})
    plans = [undecided.with_bits({"a.0": bits, "a.1": 4}, 64) for bits in (3, 4, 8)]
    points = [
        FrontierPoint(plan, 1 / (index + 1), 2 / (index + 1) if measured else None) for index, plan in enumerate(plans)
    ]
    plot_frontier(points, "nats", tmp_path / "frontier.png")
    curves = drawn[0].axes[0].lines
    assert [len(curve.get_xdata()) for curve in curves] == [3] * (1 + measured)
    for curve, factor in zip(curves, (1, 2), strict=False):
        assert list(curve.get_xdata()) == [plan.bits_per_weight for plan in plans]
        assert list(curve.get_ydata()) == pytest.approx([factor, factor / 2, factor / 3])
