"""Pictures of scores, plans and frontiers: PNG files. matplotlib is loaded only when one is drawn.

They lie on pages with a light or a dark theme, which a picture cannot know: so they have no background, and letters and
lines of the grey that is as far from white as from near-black.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .allocation import FrontierPoint
from .bitmap import COLOURS, BitMap, cell_text, letters_on
from .plan import BitPlan
from .table import SensitivityTable

MATRIX_WIDTH = 5.5  # inches
GREY = "#7a7a7a"  # contrast 4.3 on white, 4.4 on #0d1117
STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color"), GREY),
    **dict.fromkeys(("ytick.color", "legend.labelcolor", "grid.color"), GREY),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), "none"),
}
LABELS = 20  # of blocks, at most
LEGEND_COLUMNS = 4
CELL = 0.24  # inches
METRIC_LABELS = {
    "loss": "rise of the loss (nats)",
    "perplexity": "rise of the perplexity",
    "accuracy": "fall of the accuracy",
    "correlation": "1 − mean correlation with the others",
}


def plot_sensitivity(table: SensitivityTable, path: str | Path) -> None:
    """Draw the sensitivity of every block as bars, as in figures 2 to 4 of the paper (arXiv 2412.03599).

    Units smaller than a block are stacked, one colour for each kind. With correlations, their matrix stands beside.

    Args:
        table: of any method and granularity.
        path: PNG file to write.
    """
    blocks = list(table.by_block())
    width = max(6.0, 0.16 * len(blocks) + 2, _legend_width(table))
    ratios = [width, MATRIX_WIDTH] if table.correlations else [width]
    with _picture(path, (sum(ratios), 4)) as figure:
        axes = figure.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
        _draw_bars(axes[0], table, blocks)
        if table.correlations:
            _draw_matrix(axes[1], table)
        figure.suptitle(_title(table))


def plot_plan(plan: BitPlan, table: SensitivityTable | None, path: str | Path) -> None:
    """Draw the bits of every unit as a map, one stack of blocks below the other, and the scores of the blocks below.

    Args:
        plan: the decisions.
        table: the scores that they came from, if there are any.
        path: PNG file to write.
    """
    maps = plan.maps()
    columns = max(len(drawn.columns) for drawn in maps)
    heights = [0.9 + CELL * len(drawn.rows) for drawn in maps] + ([2.2] if table else [])
    margin = 0.09 * max(len(row) for drawn in maps for row in drawn.rows) + 1
    width = max(5.0, CELL * columns + margin, _legend_width(table) if table else 0.0)
    with _picture(path, (width, sum(heights))) as figure:
        axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axis, drawn in zip(axes, maps, strict=False):
            _draw_map(axis, drawn)
        if table:
            blocks = list(table.by_block())
            _draw_bars(axes[-1], table, blocks)
            axes[-1].set_xlim(-0.5, max(columns, len(blocks)) - 0.5)
        figure.suptitle(plan.summary.replace("; ", "\n"), fontsize="medium")


@contextmanager
def _picture(path: str | Path, inches: tuple[float, float]) -> Iterator[Any]:
    """A figure to draw on, which becomes a PNG file."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=inches, layout="constrained", dpi=150)
        yield figure
        figure.savefig(path, format="png")


def _draw_map(axes, drawn: BitMap) -> None:
    for x, column in enumerate(drawn.columns):
        for y, row in enumerate(drawn.rows):
            cell = drawn.cells.get((row, column), ())
            if cell:
                square = {"facecolor": COLOURS[cell[0]], "edgecolor": "white", "linewidth": 0.5}
                axes.add_patch(_rectangle(x, y, **square))
                axes.text(x, y, cell_text(cell), ha="center", va="center", fontsize=7, color=letters_on(cell[0]))
    axes.set_xlim(-0.5, len(drawn.columns) - 0.5)
    axes.set_ylim(len(drawn.rows) - 0.5, -0.5)
    axes.set_aspect("equal")
    step = math.ceil(len(drawn.columns) / LABELS)
    axes.set_xticks(range(0, len(drawn.columns), step), drawn.columns[::step])
    axes.set_yticks(range(len(drawn.rows)), drawn.rows)
    axes.set_title(drawn.stack, fontsize="small")


def _rectangle(x: int, y: int, **style):
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, **style)


def plot_frontier(points: Sequence[FrontierPoint], unit: str, path: str | Path) -> None:
    """Draw predicted and, where they are known, measured losses over bits per weight.

    Args:
        unit: of the predictions.
        path: PNG file to write.
    """
    bits = [point.plan.bits_per_weight for point in points]
    measured = {point.plan.bits_per_weight: point.measured for point in points if point.measured is not None}
    with _picture(path, (6.4, 4)) as figure:
        axes = figure.subplots()
        axes.plot(bits, [point.predicted for point in points], "o-", label=f"predicted ({unit})")
        if measured:
            axes.plot(list(measured), list(measured.values()), "s--", label="measured on held-out data (nats)")
        axes.set_xlabel("bits per weight")
        axes.set_ylabel("rise of the loss")
        axes.grid(alpha=0.3)
        axes.legend()


def _legend_width(table: SensitivityTable) -> float:
    """Inches that the legend of the bars takes, and the labels beside them."""
    kinds = {unit.removeprefix(table.blocks[unit]) for unit in table.raw}
    return min(LEGEND_COLUMNS, len(kinds)) * (0.075 * max(len(kind) for kind in kinds) + 0.4) + 1


def _title(table: SensitivityTable) -> str:
    estimator = f" ({table.settings['estimator']})" if "estimator" in table.settings else ""
    return f"{table.method.upper()}{estimator}: sensitivity of each block"


def _draw_bars(axes, table: SensitivityTable, blocks: list[str]) -> None:
    kinds: dict[str, dict[str, float]] = {}
    for unit, value in table.raw.items():
        block = table.blocks[unit]
        kinds.setdefault(unit.removeprefix(block).lstrip("."), {})[block] = value
    above, below = dict.fromkeys(blocks, 0.0), dict.fromkeys(blocks, 0.0)
    for kind, values in kinds.items():
        bottoms = []
        for block in blocks:
            level = below if values.get(block, 0.0) < 0 else above
            bottoms.append(level[block])
            level[block] += values.get(block, 0.0)
        axes.bar(range(len(blocks)), [values.get(block, 0.0) for block in blocks], bottom=bottoms, label=kind)
    if len(kinds) > 1:
        above_axes = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "frameon": False}
        axes.legend(fontsize="small", ncols=min(LEGEND_COLUMNS, len(kinds)), **above_axes)
    labels = [block.rpartition(".")[2] for block in blocks]
    step = math.ceil(len(blocks) / LABELS)
    axes.set_xticks(range(0, len(blocks), step), labels[::step])
    axes.set_xlabel("block")
    axes.set_ylabel(METRIC_LABELS[table.metric])
    axes.axhline(0, color=GREY, linewidth=0.5)


def _draw_matrix(axes, table: SensitivityTable) -> None:
    units = list(table.correlations)
    values = [[table.correlations[row].get(column, float("nan")) for column in units] for row in units]
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis")
    axes.set_xlabel("unit")
    axes.set_ylabel("unit")
    axes.figure.colorbar(image, ax=axes, label="mean canonical correlation")
