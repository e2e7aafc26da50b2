"""A bit plan as a small picture: kinds of units × blocks, one coloured cell each.

Terminal, notebook and PNG draw the same `BitMap` in the same colours, so that a plan is recognized wherever it is seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

# From yellow (few bits) to violet (many), alike for all eyes (viridis).
COLOURS = {2: "#fde725", 3: "#b5de2b", 4: "#6ece58", 5: "#35b779", 6: "#1f9e89", 8: "#31688e", 16: "#440154"}
BRIGHT = 6  # cells of at most so many bits need dark letters


@dataclass(frozen=True)
class BitMap:
    """The bits of one stack of blocks.

    Attributes:
        stack: name of the list of blocks, such as `"model.layers"`.
        rows: kinds of units, such as `"qkv_proj"`.
        columns: the blocks' names within the stack.
        cells: (row, column) → the different bit widths there, ascending; where a block has no such unit, nothing.
    """

    stack: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[str, str], tuple[int, ...]]

    @property
    def widths(self) -> tuple[int, ...]:
        """The bit widths that occur, ascending."""
        return tuple(sorted({bits for cell in self.cells.values() for bits in cell}))


def bit_map(stack: str, units: Iterable[tuple[str, str, int]]) -> BitMap:
    """Arrange (kind, block, bits) in a map. Kinds are cut to their last part where that is unique."""
    entries = list(units)
    kinds = tuple(dict.fromkeys(kind for kind, _, _ in entries))
    leaves = [kind.rpartition(".")[2] for kind in kinds]
    names = {kind: leaf if leaves.count(leaf) == 1 else kind for kind, leaf in zip(kinds, leaves, strict=True)}
    cells: dict[tuple[str, str], tuple[int, ...]] = {}
    for kind, block, bits in entries:
        place = names[kind], block
        cells[place] = tuple(sorted({*cells.get(place, ()), bits}))
    return BitMap(stack, tuple(names.values()), tuple(dict.fromkeys(block for _, block, _ in entries)), cells)


def cell_text(cell: Sequence[int]) -> str:
    """What stands in a cell: its bits, or `~` for several."""
    return str(cell[0]) if len(cell) == 1 else "~"


def letters_on(bits: int) -> str:
    """Colour of letters that can be read on the colour of a bit width."""
    return "black" if bits <= BRIGHT else "white"


def as_html(maps: Sequence[BitMap], caption: str) -> str:
    """Tables for a notebook."""
    tables = []
    for drawn in maps:
        head = "".join(f"<th>{escape(column)}</th>" for column in drawn.columns)
        body = "".join(
            f"<tr><th style='text-align:left'>{escape(row)}</th>"
            + "".join(_html_cell(drawn.cells.get((row, column), ())) for column in drawn.columns)
            + "</tr>"
            for row in drawn.rows
        )
        tables.append(
            f"<table style='border-collapse:collapse;font-size:75%'><tr><th style='text-align:left'>"
            f"{escape(drawn.stack)}</th>{head}</tr>{body}</table>"
        )
    return f"<div>{''.join(tables)}<p>{escape(caption)}</p></div>"


def _html_cell(cell: Sequence[int]) -> str:
    if not cell:
        return "<td></td>"
    style = f"background:{COLOURS[cell[0]]};color:{letters_on(cell[0])};text-align:center;padding:1px 3px"
    return f"<td style='{style}'>{cell_text(cell)}</td>"
