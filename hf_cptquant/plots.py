"""Pictures of scores: (table) → PNG. matplotlib is loaded only when one is drawn."""

from __future__ import annotations

import math
from pathlib import Path

from .plan import SensitivityTable

MATRIX_WIDTH = 5.5  # inches
LABELS = 20  # of blocks, at most
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
    from matplotlib.figure import Figure

    blocks = list(table.by_block())
    width = max(6.0, 0.16 * len(blocks) + 2)
    figure = Figure(figsize=(width + (MATRIX_WIDTH if table.correlations else 0), 4), layout="constrained", dpi=150)
    ratios = [width, MATRIX_WIDTH] if table.correlations else [width]
    axes = figure.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
    _draw_bars(axes[0], table, blocks)
    if table.correlations:
        _draw_matrix(axes[1], table)
    figure.suptitle(_title(table))
    figure.savefig(path, format="png")


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
        axes.legend(fontsize="small")
    labels = [block.rpartition(".")[2] for block in blocks]
    step = math.ceil(len(blocks) / LABELS)
    axes.set_xticks(range(0, len(blocks), step), labels[::step])
    axes.set_xlabel("block")
    axes.set_ylabel(METRIC_LABELS[table.metric])
    axes.axhline(0, color="black", linewidth=0.5)


def _draw_matrix(axes, table: SensitivityTable) -> None:
    units = list(table.correlations)
    values = [[table.correlations[row].get(column, float("nan")) for column in units] for row in units]
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis")
    axes.set_xlabel("unit")
    axes.set_ylabel("unit")
    axes.figure.colorbar(image, ax=axes, label="mean canonical correlation")
