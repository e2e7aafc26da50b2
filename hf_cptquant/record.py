"""What one run leaves behind beside the weights: `cptquant_plan.json`.

The section in `config.json` is for other programs, which drop keys that they do not know when they write it again; this
file is ours and says everything: the plan, the scores it came from, the settings, the data, the figures taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import PlanError
from .plan import BitPlan, SensitivityTable, read_json


@dataclass(frozen=True)
class QuantizationRecord:
    """Everything that one run leaves behind beside the weights; `cptquant_plan.json` on disk.

    Attributes:
        plan: the plan that was executed.
        table: the scores it came from.
        settings: the recipe as plain JSON values.
        calibration: what the calibration data were (source, sizes, hash).
        measured: figures taken around the run (seconds, perplexities); may be empty.
    """

    plan: BitPlan
    table: SensitivityTable
    settings: Mapping[str, Any]
    calibration: Mapping[str, Any]
    measured: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.plan.to_dict(),
            "sensitivity": self.table.to_dict(),
            "settings": dict(self.settings),
            "calibration": dict(self.calibration),
            "measured": dict(self.measured),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantizationRecord:
        plan = BitPlan.from_dict(data)
        for part in ("sensitivity", "settings", "calibration", "measured"):
            if not isinstance(data.get(part), Mapping):
                raise PlanError(f"the record of the quantization has no {part!r}")
        table = SensitivityTable.from_dict(data["sensitivity"])
        return cls(plan, table, data["settings"], data["calibration"], data["measured"])

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> QuantizationRecord:
        return cls.from_dict(read_json(path))
