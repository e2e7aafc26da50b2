"""Plans and scores on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .allocation import FrontierPoint
from .bitmap import COLOURS, BitMap, cell_text, letters_on
from .doctor import Diagnosis
from .plan import BitPlan
from .record import QuantizationRecord
from .results import EvaluationResult, tabulate
from .table import SensitivityTable

if TYPE_CHECKING:  # it needs an optional library
    from .llama_cpp import GGUFReport

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
    say(
        f"standard deviation from the mean sensitivity: first 30 % of the blocks {first:.3g}, middle {middle:.3g},"
        f" last 30 % {last:.3g}"
    )


def show_plan(record: QuantizationRecord) -> None:
    """Print a plan as a map of its bits, with totals and where it came from."""
    table = record.table
    if table is not None:
        method = f"{table.method} ({table.settings['estimator']})" if "estimator" in table.settings else table.method
        console.print(f"{method}, {record.settings['allocation']}", style="italic", highlight=False)
    for drawn in record.plan.maps():
        show_map(drawn)
    say(record.plan.summary)
    if "predicted_loss_increase" in record.measured:
        say(f"predicted rise of the loss: {record.measured['predicted_loss_increase']:.4f} nats")
    if table is not None and "held_out_losses" in table.settings:
        losses = table.settings["held_out_losses"].items()
        say("loss on held-out calibration data: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses))
    if record.evaluation:
        show_evaluation(record.evaluation)


def show_map(drawn: BitMap) -> None:
    """Print the bits of one stack of blocks, two columns a block, in as many strips as the terminal needs."""
    margin = max(map(len, (*drawn.rows, drawn.stack)))
    per_strip = max(5, (console.width - margin - 1) // 10 * 5)
    for start in range(0, len(drawn.columns), per_strip):
        strip = drawn.columns[start : start + per_strip]
        marks = "".join(f"{column:<10}" for column in strip[::5])  # every fifth block has its number
        lines = [Text(f"{drawn.stack:<{margin}} {marks}".rstrip(), no_wrap=True, overflow="crop")]
        for row in drawn.rows:
            line = Text(f"{row:<{margin}} ", no_wrap=True, overflow="crop")
            for column in strip:
                cell = drawn.cells.get((row, column), ())
                style = f"{letters_on(cell[0])} on {COLOURS[cell[0]]}" if cell else ""
                line.append(f"{cell_text(cell) if cell else '':<2}", style=style)
            lines.append(line)
        console.print(*lines, sep="\n")


def show_units(record: QuantizationRecord) -> None:
    """Print bits, bytes and score of every unit."""
    plan, scores = record.plan, {} if record.table is None else record.table.scores
    table = Table("block", "modules", "bits", "MB", "score")
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
            if sharing := [name for module in modules for name in module.shared_with]:
                label = f"with {', '.join(sharing)}"
            megabytes = sum(module.nbytes for module in modules) / 1e6
            score = f"{scores[unit]:.3f}" if unit in scores else "–"
            table.add_row("" if index else block, label, schemes, f"{megabytes:.2f}", score)
    console.print(table)


def show_frontier(points: Sequence[FrontierPoint], unit: str) -> None:
    """Print the plans of a frontier, one a line.

    Args:
        unit: of the predictions.
    """
    table = Table("bits per weight", "MB", f"predicted ({unit})", "measured (nats)", title="frontier")
    for column in table.columns:
        column.justify = "right"
    for point in points:
        measured = "–" if point.measured is None else f"{point.measured:.4f}"
        size = f"{point.plan.nbytes / 1e6:.1f}"
        table.add_row(f"{point.plan.bits_per_weight:.3f}", size, f"{point.predicted:.4g}", measured)
    console.print(table)


def show_gguf(report: GGUFReport, plan: BitPlan) -> None:
    """Print how the modules of a plan are held in a GGUF file, and whether exactly."""
    table = Table("ours", "as GGUF", "modules")
    table.columns[2].justify = "right"
    for (scheme, kind), count in sorted(report.modules.items()):
        table.add_row(str(scheme), kind, str(count))
    console.print(table)
    largest = max(report.largest_difference.values(), default=0)
    same = f"weights differ by up to {largest:.2g}" if largest else "all integers and scales are the same"
    say(f"{plan.nbytes / 1e6:.1f} MB here, {report.nbytes / 1e6:.1f} MB as GGUF; {same}")


def show_evaluation(results: Sequence[EvaluationResult]) -> None:
    """Print what was measured of a model, one figure a line."""
    headings, rows = tabulate(results)
    table = Table(*headings, title="evaluation")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for control in sorted({result.control_plan for result in results if result.control_plan is not None}):
        say(f"Control: the original with the same bits for all quantizable weights, rounded to nearest ({control}).")


def show_diagnosis(diagnosis: Diagnosis) -> None:
    """Print versions, devices, and which kernel every scheme runs on."""
    say(", ".join(f"{name} {version}" for name, version in diagnosis.versions.items()))
    for device, description in diagnosis.devices.items():
        say(f"{device}: {description}")
    table = Table("scheme", "where", "decode", "prefill", "why not a faster one", title="kernels")
    table.columns[0].overflow = "fold"
    for report in diagnosis.kernels:
        which = f"{report.scheme}\n{report.modules} modules, e.g. {report.example}" if report.modules else report.scheme
        table.add_row(which, f"{report.device} {report.dtype}", report.decode, report.prefill, report.reason)
    console.print(table)


def say(text: str) -> None:
    """Print a sentence as it is."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)
