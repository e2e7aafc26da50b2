"""Plans and scores on a terminal."""

from __future__ import annotations

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from .plan import SensitivityTable
from .record import QuantizationRecord

console = Console()

BAR_WIDTH = 40


def show_sensitivity(table: SensitivityTable) -> None:
    """Print the scores of a table as a bar chart, and how far they spread."""
    scores = table.scores
    chart = Table("unit", "raw", "score", "", title=f"{table.method}, {table.metric} {table.base:.4f} before")
    for column in (1, 2):
        chart.columns[column].justify = "right"
    for unit, raw in table.raw.items():
        bar = Bar(1.0, 0.0, max(0.0, scores[unit]), width=BAR_WIDTH)
        chart.add_row(unit, f"{raw:.4g}", f"{scores[unit]:.3f}", bar)
    console.print(chart)
    first, middle, last = table.deviations()
    console.print(
        f"standard deviation from the mean sensitivity: first 30 % of the blocks {first:.3g}, middle {middle:.3g},"
        f" last 30 % {last:.3g}",
        highlight=False,
        soft_wrap=True,
    )


def show_plan(record: QuantizationRecord) -> None:
    """Print a plan as a table with totals."""
    plan, scores = record.plan, record.table.scores
    table = Table(
        "block", "modules", "bits", "MB", "score", title=f"{record.table.method}, {record.settings['allocation']}"
    )
    for column in (3, 4):
        table.columns[column].justify = "right"
    for block, members in plan.by_block().items():
        by_unit: dict[str, list[str]] = {}
        for name, module in members.items():
            by_unit.setdefault(module.unit, []).append(name)
        for index, (unit, names) in enumerate(by_unit.items()):
            modules = [members[name] for name in names]
            schemes = ", ".join(dict.fromkeys(str(module.scheme) for module in modules))
            label = f"all {len(names)}" if len(by_unit) == 1 else ", ".join(name.rpartition(".")[2] for name in names)
            megabytes = sum(module.nbytes for module in modules) / 1e6
            table.add_row("" if index else block, label, schemes, f"{megabytes:.2f}", f"{scores[unit]:.3f}")
    console.print(table)
    console.print(
        f"{plan.bits_per_weight:.3f} bits per weight; {plan.original_bytes / 1e6:.1f} → {plan.nbytes / 1e6:.1f} MB:"
        f" compression ratio {plan.compression_ratio:.2f}, reduction {plan.final_reduction_percentage:.1f} %",
        highlight=False,
        soft_wrap=True,
    )
