"""A plan with where it came from: `cptquant_plan.json` beside the weights, and the file of `cptquant plan`.

The section in `config.json` is for other programs, which drop keys that they do not know when they write it again; this
file is ours and says everything: the plan, the scores it came from, the settings, the data, the figures taken. It is a
plan's file with more keys, so that what reads a plan reads a record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from .errors import PlanError
from .plan import BitPlan, read_json
from .results import EvaluationResult
from .table import SensitivityTable


@dataclass(frozen=True)
class QuantizationRecord:
    """A plan and where it came from.

    Attributes:
        plan: the decisions.
        table: the scores they came from, or None if they came from elsewhere.
        settings: the recipe as plain JSON values.
        calibration: what the calibration data were (source, sizes, hash); empty without a table.
        measured: figures that the run gave (losses); may be empty.
        base_model: name on the Hub of the model that was quantized, if it came from there.
        evaluation: what was measured of the finished model afterwards (`cptquant evaluate`).
        inherited: what the card of the base model says that is true of this one, too (see `base_card.py`).
        run: seconds, bytes, machine, versions and command of the run, none of which comes out alike again; only this
            file has them.
    """

    plan: BitPlan
    table: SensitivityTable | None
    settings: Mapping[str, Any]
    calibration: Mapping[str, Any]
    measured: Mapping[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    evaluation: tuple[EvaluationResult, ...] = ()
    inherited: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        table = None if self.table is None else self.table.to_dict()
        if table is not None:
            del table["plan"]  # the units are those of the plan
        return {
            **self.plan.to_dict(),
            "sensitivity": table,
            "settings": dict(self.settings),
            "calibration": dict(self.calibration),
            "measured": dict(self.measured),
            "base_model": self.base_model,
            "evaluation": [result.to_dict() for result in self.evaluation],
            "inherited": dict(self.inherited),
            "run": dict(self.run),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantizationRecord:
        plan = BitPlan.from_dict(data)
        data = {"inherited": {}, "run": {}, **data}  # which not every plan has
        for part in ("settings", "calibration", "measured", "inherited", "run"):
            if not isinstance(data.get(part), Mapping):
                raise PlanError(f"the record of the quantization has no {part!r}")
        if not isinstance(data.get("sensitivity", 0), (Mapping, NoneType)):
            raise PlanError("the record of the quantization has no 'sensitivity'")
        results = data.get("evaluation", [])
        if not isinstance(results, list) or not all(isinstance(result, Mapping) for result in results):
            raise PlanError("'evaluation' in the record of the quantization is no list of results")
        evaluation = tuple(EvaluationResult.from_dict(result) for result in results)
        parts = (data["settings"], data["calibration"], data["measured"], data.get("base_model"), evaluation)
        return cls(plan, SensitivityTable.of_record(data), *parts, data["inherited"], data["run"])

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> QuantizationRecord:
        return cls.from_dict(read_json(path))
