"""Sensitivity tables: what a method measured of every unit of a model, and what its rounding errors are.

A table is all that allocation needs, so that plans for any budget can be made from its file without the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import PlanError
from .plan import BitPlan, read_json


@dataclass(frozen=True)
class SensitivityTable:
    """What a method measured: unit → how much the model suffers when that unit is disturbed.

    Attributes:
        method: `"cmpq"`, `"pmpq"` or `"tdmpq"`.
        metric: what was measured: `"loss"` (mean negative log-likelihood, nats), `"perplexity"`, `"accuracy"`, or
            `"correlation"` with other units.
        base: the metric of the unchanged model (a unit's correlation with itself: 1).
        raw: unit → change of the metric for the worse, in the model's order.
        plan: the units, undecided, and what lies outside the transformer layers with its bits.
        settings: those of the method that decide the figures.
        fingerprint: identifies model, data and settings that the figures belong to.
        costs: unit → bit width → predicted rise of the loss (nats), if the method prices bit widths.
        correlations: unit → unit → mean canonical correlation, if the method compares units.
        errors: unit → bit width → ‖W − Q(W)‖² / ‖W‖² of rounding to nearest.
        group_size, symmetric: of the rounding that costs and errors are for.
    """

    method: str
    metric: str
    base: float
    raw: Mapping[str, float]
    plan: BitPlan
    settings: Mapping[str, Any]
    fingerprint: str
    costs: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    correlations: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    errors: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    group_size: int = 128
    symmetric: bool = True

    @property
    def blocks(self) -> dict[str, str]:
        """Unit → the transformer layer that it belongs to; what lies outside of them is not measured."""
        return {module.unit: module.block for module in self.plan.inside.modules}

    @property
    def scores(self) -> dict[str, float]:
        """Unit → score, higher = needs more bits: the measurements divided by the largest magnitude."""
        largest = max(map(abs, self.raw.values()), default=0.0)
        return {unit: value / largest if largest else 0.0 for unit, value in self.raw.items()}

    def by_block(self) -> dict[str, float]:
        """Block → sum of the measurements of its units, in the model's order."""
        sums: dict[str, float] = {}
        blocks = self.blocks
        for unit, value in self.raw.items():
            sums[blocks[unit]] = sums.get(blocks[unit], 0.0) + value
        return sums

    def deviations(self) -> tuple[float, float, float]:
        """Standard deviation from the mean sensitivity of all blocks, of the first 30 % of the blocks, of those in the
        middle, and of the last 30 % (the statistic of the paper's table 1), in units of `raw`."""
        values = list(self.by_block().values())
        centre, edge = math.fsum(values) / len(values), max(1, round(0.3 * len(values)))
        segments = values[:edge], values[edge:-edge], values[-edge:]
        first, middle, last = (
            math.sqrt(math.fsum((value - centre) ** 2 for value in part) / len(part)) if part else 0.0
            for part in segments
        )
        return first, middle, last

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with `"scores"`."""
        return {**asdict(self), "plan": self.plan.to_dict(), "scores": self.scores}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SensitivityTable:
        try:
            given = {entry.name: data[entry.name] for entry in fields(cls)}
            for name in ("costs", "errors"):
                given[name] = {unit: {int(b): figure for b, figure in row.items()} for unit, row in data[name].items()}
            rows = (*given["costs"].values(), *given["errors"].values())
            figures = [data["base"], *data["raw"].values(), *(figure for row in rows for figure in row.values())]
            given["plan"] = BitPlan.from_dict(data["plan"])
        except (KeyError, AttributeError, ValueError) as error:
            raise PlanError(f"the sensitivity table is incomplete: {error!r}") from error
        if not all(type(figure) in (int, float) for figure in figures):
            raise PlanError("the sensitivity table holds something that is not a number")
        table = cls(**given)
        if data["raw"].keys() != table.blocks.keys():
            unit = sorted(data["raw"].keys() ^ table.blocks.keys())[0]
            raise PlanError(f"the sensitivity table has {unit} either among its units or among its figures, not both")
        return table

    @classmethod
    def of_record(cls, data: Mapping[str, Any]) -> SensitivityTable | None:
        """The table in the JSON values of a record, whose units are those of its plan; None if it has none."""
        if data.get("sensitivity") is None:
            return None
        return cls.from_dict({**data["sensitivity"], "plan": BitPlan.from_dict(data).undecided.to_dict()})

    def save(self, path: str | Path) -> None:
        """Write the table as JSON; `"scores"` maps each unit to its number."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> SensitivityTable:
        """Read a table from its file, or from the record of a plan (`cptquant_plan.json`, its folder, or the file of
        `cptquant plan`).

        Raises:
            PlanError: not such a file, or a plan that was made without a table.
        """
        data = read_json(path)
        table = cls.of_record(data) if "sensitivity" in data else cls.from_dict(data)
        if table is None:
            raise PlanError(f"{path} is a plan without the scores that it came from")
        return table
