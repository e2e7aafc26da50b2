"""The values that flow between the steps: schemes, bit plans, sensitivity tables.

All of them are frozen and turn into JSON and back. A plan is complete before anything is quantized,
so it can be printed, saved, edited and shared; everything later (module swap, checkpoint, report,
card) is a function of it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .errors import PlanError, in_module

PLAN_FILE = "cptquant_plan.json"
PLAN_VERSION = 1
PACKED_BITS = (2, 3, 4, 5, 6, 8)
BITS = (*PACKED_BITS, 16)
PER_CHANNEL = -1


@dataclass(frozen=True, order=True)
class LayerScheme:
    """How the weight of one module is stored.

    Attributes:
        bits: 2, 3, 4, 5, 6 or 8 bits per integer; 16 leaves the weight as it came.
        group_size: consecutive input features that share a scale; -1 is one group per output channel.
        symmetric: without a zero point.
    """

    bits: int
    group_size: int = PER_CHANNEL
    symmetric: bool = True

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise PlanError(f"{self.bits!r} bits are not possible; choose from {', '.join(map(str, BITS))}")
        if type(self.group_size) is not int or (self.group_size != PER_CHANNEL and self.group_size < 1):
            raise PlanError(
                f"group size {self.group_size!r} is not possible; use -1 (per channel) or a positive number"
            )
        if type(self.symmetric) is not bool:
            raise PlanError(f"symmetric must be true or false, not {self.symmetric!r}")

    @property
    def packed(self) -> bool:
        """Whether the weight is stored as integers."""
        return self.bits < 16

    def groups(self, in_features: int) -> int:
        """Scales per output channel. Raises `PlanError` if the group size does not divide `in_features`."""
        if self.group_size == PER_CHANNEL:
            return 1
        if in_features % self.group_size:
            raise PlanError(f"group size {self.group_size} does not divide {in_features} input features")
        return in_features // self.group_size

    def nbytes(self, out_features: int, in_features: int, element_size: int) -> int:
        """Bytes of integers, scales and zero points; `element_size` is that of the model's dtype."""
        if not self.packed:
            return out_features * in_features * element_size
        groups = self.groups(in_features)
        integers = out_features * math.ceil(in_features * self.bits / 32) * 4
        scales = out_features * groups * element_size
        zero_points = 0 if self.symmetric else math.ceil(out_features * self.bits / 32) * 4 * groups
        return integers + scales + zero_points

    def __str__(self) -> str:
        if not self.packed:
            return "16"
        group = "channel" if self.group_size == PER_CHANNEL else f"g{self.group_size}"
        return f"{self.bits} {'sym' if self.symmetric else 'asym'} {group}"


UNTOUCHED = LayerScheme(16)


def scheme_for(bits: int, in_features: int, group_size: int = 128, symmetric: bool = True) -> LayerScheme:
    """The scheme that a module gets for a bit width.

    8 bits are per channel; fewer bits are in groups of `group_size`, or of the largest of 128, 64, 32 below it that
    divides `in_features`, or else per channel.
    """
    if bits == 16:
        return UNTOUCHED
    if bits == 8:
        return LayerScheme(8, PER_CHANNEL, symmetric)
    candidates = (group_size, *(size for size in (128, 64, 32) if size < group_size))
    fitting = [size for size in candidates if size > 0 and in_features % size == 0]
    return LayerScheme(bits, fitting[0] if fitting else PER_CHANNEL, symmetric)


@dataclass(frozen=True)
class ModulePlan:
    """The decision for one quantizable module.

    Attributes:
        name: dotted name in the model.
        block: name of the transformer layer that it belongs to.
        unit: the unit of decision (block, fused group, or the module itself).
        out_features, in_features: shape of the weight as a matrix that maps inputs to outputs.
        element_size: bytes of one weight in the model's own dtype.
        scheme: what it gets.
    """

    name: str
    block: str
    unit: str
    out_features: int
    in_features: int
    element_size: int
    scheme: LayerScheme

    def __post_init__(self) -> None:
        for size in (self.out_features, self.in_features, self.element_size):
            if type(size) is not int or size < 1:
                raise PlanError(f"{self.name}: a size must be a positive whole number, not {size!r}")

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def original_bytes(self) -> int:
        return self.weights * self.element_size

    @property
    def nbytes(self) -> int:
        return self.scheme.nbytes(self.out_features, self.in_features, self.element_size)


@dataclass(frozen=True)
class LeftAlone:
    """A module with a weight matrix that no plan touches, and why. Tied weights are counted once."""

    name: str
    reason: str
    weights: int


@dataclass(frozen=True)
class BitPlan:
    """Module name → scheme for a whole model.

    Attributes:
        modules: one entry per quantizable module, in the model's order.
        left: every other module that holds a matrix, with the reason.
        other_bytes: bytes of all tensors of the checkpoint that the plan does not decide on
            (embeddings, norms, biases, heads).
    """

    modules: tuple[ModulePlan, ...]
    left: tuple[LeftAlone, ...] = ()
    other_bytes: int = 0

    def __post_init__(self) -> None:
        if type(self.other_bytes) is not int or self.other_bytes < 0:
            raise PlanError(f"other_bytes must be a whole number of at least 0, not {self.other_bytes!r}")
        repeated = [name for name, count in Counter(module.name for module in self.modules).items() if count > 1]
        if repeated:
            raise PlanError(f"the plan names {repeated[0]} more than once")

    @property
    def packed(self) -> tuple[ModulePlan, ...]:
        """The modules that become integers."""
        return tuple(module for module in self.modules if module.scheme.packed)

    @property
    def weights(self) -> int:
        """Quantizable weights (a count)."""
        return sum(module.weights for module in self.modules)

    @property
    def bits_per_weight(self) -> float:
        """Bits per quantizable weight including scales and zero points."""
        return 8 * sum(module.nbytes for module in self.modules) / self.weights

    @property
    def original_bytes(self) -> int:
        """M_O: bytes of the whole checkpoint before."""
        return self.other_bytes + sum(module.original_bytes for module in self.modules)

    @property
    def nbytes(self) -> int:
        """M_Q: bytes of the whole checkpoint after (tensor data; file headers are not counted)."""
        return self.other_bytes + sum(module.nbytes for module in self.modules)

    @property
    def compression_ratio(self) -> float:
        """CR = M_O / M_Q over the whole checkpoint. Equation 3 of the paper prints the fraction upside
        down; its tables use this one."""
        return self.original_bytes / self.nbytes

    @property
    def final_reduction_percentage(self) -> float:
        """FPR = 100 · (1 − M_Q / M_O). Equation 2 of the paper prints the fraction upside down."""
        return 100 * (1 - self.nbytes / self.original_bytes)

    def by_block(self) -> dict[str, dict[str, ModulePlan]]:
        """Block name → module name within the block → decision, both in the model's order."""
        blocks: dict[str, dict[str, ModulePlan]] = {}
        for module in self.modules:
            blocks.setdefault(module.block, {})[module.name.removeprefix(module.block + ".")] = module
        return blocks

    def with_bits(self, bits: Mapping[str, int], group_size: int = 128, symmetric: bool = True) -> BitPlan:
        """The same modules with the bit width of their unit: unit name → bits."""
        decided = (
            replace(module, scheme=scheme_for(bits[module.unit], module.in_features, group_size, symmetric))
            for module in self.modules
        )
        return replace(self, modules=tuple(decided))

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": "cptquant-plan",
            "version": PLAN_VERSION,
            "modules": {
                module.name: {
                    "block": module.block,
                    "unit": module.unit,
                    "shape": [module.out_features, module.in_features],
                    "element_size": module.element_size,
                    **asdict(module.scheme),
                }
                for module in self.modules
            },
            "left": [asdict(module) for module in self.left],
            "other_bytes": self.other_bytes,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BitPlan:
        if data.get("format") != "cptquant-plan" or data.get("version") != PLAN_VERSION:
            raise PlanError(
                f"not a bit plan of version {PLAN_VERSION}: format {data.get('format')!r}, version"
                f" {data.get('version')!r}"
            )
        try:
            modules = tuple(_module_from_dict(name, entry) for name, entry in data["modules"].items())
            left = tuple(LeftAlone(**entry) for entry in data["left"])
            return cls(modules, left, data["other_bytes"])
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"the bit plan is incomplete: {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> BitPlan:
        """Read a plan from a JSON file, or from a folder that holds `cptquant_plan.json`."""
        return cls.from_dict(read_json(path))


@dataclass(frozen=True)
class SensitivityTable:
    """What a method measured: unit → how much the model suffers when that unit is disturbed.

    Attributes:
        method: `"cmpq"`, `"pmpq"` or `"tdmpq"`.
        metric: what was measured: `"loss"` (mean negative log-likelihood, nats), `"perplexity"`, `"accuracy"`, or
            `"correlation"` with other units.
        base: the metric of the unchanged model (a unit's correlation with itself: 1).
        raw: unit → change of the metric for the worse, in the model's order.
        blocks: unit → the transformer layer that it belongs to.
        settings: those of the method that decide the figures.
        fingerprint: identifies model, data and settings that the figures belong to.
        costs: unit → bit width → predicted rise of the loss (nats), if the method prices bit widths.
        correlations: unit → unit → mean canonical correlation, if the method compares units.
    """

    method: str
    metric: str
    base: float
    raw: Mapping[str, float]
    blocks: Mapping[str, str]
    settings: Mapping[str, Any]
    fingerprint: str
    costs: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    correlations: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, float]:
        """Unit → score, higher = needs more bits: the measurements divided by the largest magnitude."""
        largest = max(map(abs, self.raw.values()), default=0.0)
        return {unit: value / largest if largest else 0.0 for unit, value in self.raw.items()}

    def by_block(self) -> dict[str, float]:
        """Block → sum of the measurements of its units, in the model's order."""
        sums: dict[str, float] = {}
        for unit, value in self.raw.items():
            sums[self.blocks[unit]] = sums.get(self.blocks[unit], 0.0) + value
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
        return {**asdict(self), "scores": self.scores}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SensitivityTable:
        try:
            given = {entry.name: data[entry.name] for entry in fields(cls)}
            given["costs"] = {
                unit: {int(bits): cost for bits, cost in costs.items()} for unit, costs in data["costs"].items()
            }
            figures = [
                data["base"],
                *data["raw"].values(),
                *(c for costs in given["costs"].values() for c in costs.values()),
            ]
            unplaced = data["raw"].keys() - data["blocks"].keys()
        except (KeyError, AttributeError, ValueError) as error:
            raise PlanError(f"the sensitivity table is incomplete: {error!r}") from error
        if not all(type(figure) in (int, float) for figure in figures):
            raise PlanError("the sensitivity table holds something that is not a number")
        if unplaced:
            raise PlanError(f"the sensitivity table does not say to which block {sorted(unplaced)[0]} belongs")
        return cls(**given)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON; `"scores"` maps each unit to its number."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> SensitivityTable:
        """Read a table from its file, or from the record of a quantized model (`cptquant_plan.json` or its folder)."""
        data = read_json(path)
        return cls.from_dict(data.get("sensitivity", data))


def _module_from_dict(name: str, entry: Mapping[str, Any]) -> ModulePlan:
    with in_module(name):
        try:
            out_features, in_features = entry["shape"]
            scheme = LayerScheme(entry["bits"], entry["group_size"], entry["symmetric"])
            return ModulePlan(
                name, entry["block"], entry["unit"], out_features, in_features, entry["element_size"], scheme
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"its entry in the bit plan is wrong: {error}") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """Parse a JSON object from a file, or from `cptquant_plan.json` in a folder."""
    path = Path(path)
    path = path / PLAN_FILE if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PlanError(f"{path} does not exist") from error
    except ValueError as error:
        raise PlanError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise PlanError(f"{path} holds {type(data).__name__}, not a JSON object")
    return data
