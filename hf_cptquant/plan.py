"""Schemes and bit plans: what every module of a model gets.

Frozen values that turn into JSON and back. A plan is complete before anything is quantized, so it can be printed,
saved, edited and shared; everything later (module swap, checkpoint, report, card) is a function of it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .bitmap import BitMap, as_html, bit_map
from .errors import PlanError, in_module

PLAN_FILE = "cptquant_plan.json"
PLAN_PICTURE, SENSITIVITY_PICTURE = "cptquant_plan.png", "cptquant_sensitivity.png"
PLAN_VERSION = 1
PACKED_BITS = (2, 3, 4, 5, 6, 8)
BITS = (*PACKED_BITS, 16)
PER_CHANNEL = -1
OUTSIDE = "outside the blocks"
LINEAR, EMBEDDING = "Linear", "Embedding"
LINEAR_KINDS = (LINEAR, "Conv1D")  # the second is GPT-2's, no convolution


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

    @property
    def in_words(self) -> str:
        """Such as `"4 bits in groups of 64"`."""
        grouped = "per channel" if self.group_size == PER_CHANNEL else f"in groups of {self.group_size}"
        return (
            f"{self.bits} bits {grouped}{'' if self.symmetric else ' with zero points'}" if self.packed else "16 bits"
        )

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
        block: name of the transformer layer that it belongs to; its own name if it lies outside of them.
        unit: the unit of decision (block, fused group, or the module itself).
        out_features, in_features: shape of the weight as a matrix that maps inputs to outputs.
        element_size: bytes of one weight in the model's own dtype.
        scheme: what it gets.
        kind: name of the module's class.
        shared_with: names of other modules that have the same weight. It is packed, written and counted once.
    """

    name: str
    block: str
    unit: str
    out_features: int
    in_features: int
    element_size: int
    scheme: LayerScheme
    kind: str = LINEAR
    shared_with: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for size in (self.out_features, self.in_features, self.element_size):
            if type(size) is not int or size < 1:
                raise PlanError(f"{self.name}: a size must be a positive whole number, not {size!r}")

    @property
    def linear(self) -> bool:
        """Whether its outputs are products of the rows of its inputs with the matrix."""
        return self.kind in LINEAR_KINDS

    @property
    def outside(self) -> bool:
        """Whether it lies outside the transformer layers. A setting then names its bits: no method decides on it."""
        return self.block == self.name

    @property
    def label(self) -> str:
        """Its name, and the last parts of the names of those that share its weight."""
        sharing = dict.fromkeys(name.rpartition(".")[2] for name in (self.name, *self.shared_with))
        return ", ".join((self.name, *tuple(sharing)[1:]))

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
        """Block name → module name within the block → decision, both in the model's order. What lies outside the
        transformer layers is a block, and its name within it is empty."""
        blocks: dict[str, dict[str, ModulePlan]] = {}
        for module in self.modules:
            blocks.setdefault(module.block, {})[module.name.removeprefix(module.block).lstrip(".")] = module
        return blocks

    @property
    def undecided(self) -> BitPlan:
        """The same units with 16 bits, except those outside the transformer layers, on which no method decides."""
        modules = (module if module.outside else replace(module, scheme=UNTOUCHED) for module in self.modules)
        return replace(self, modules=tuple(modules))

    @property
    def inside(self) -> BitPlan:
        """Of the modules those in transformer layers, which are what is measured and decided on."""
        return replace(self, modules=tuple(module for module in self.modules if not module.outside))

    @property
    def granularity(self) -> str:
        """`"block"`, `"module"`, or else `"group"`: what the units are."""
        if all(module.unit == module.block for module in self.modules):
            return "block"
        return "module" if all(module.unit == module.name for module in self.modules) else "group"

    @property
    def summary(self) -> str:
        """Bits per weight, sizes and ratios in a sentence."""
        return (
            f"{self.bits_per_weight:.3f} bits per weight; {self.original_bytes / 1e6:.1f} → {self.nbytes / 1e6:.1f} MB:"
            f" compression ratio {self.compression_ratio:.2f}, reduction {self.final_reduction_percentage:.1f} %"
        )

    def maps(self) -> tuple[BitMap, ...]:
        """The bits as pictures, one for each stack of blocks, and one for what lies outside of them. Units that differ
        by a number alone, such as experts, share a row."""
        stacks: dict[str, list[tuple[str, str, int]]] = {}
        for module in self.inside.modules:
            stack, _, index = module.block.rpartition(".")
            unit = module.name if module.unit == module.block else module.unit
            kind = _without_numbers(unit.removeprefix(module.block))
            stacks.setdefault(stack, []).append((kind.lstrip("."), index, module.scheme.bits))
        for module in self.modules:
            if module.outside:
                stacks.setdefault(OUTSIDE, []).append((_without_numbers(module.label), "", module.scheme.bits))
        return tuple(bit_map(stack, units) for stack, units in stacks.items())

    def _repr_html_(self) -> str:
        """The maps, in a notebook."""
        return as_html(self.maps(), self.summary)

    def applied_to(self, model: BitPlan) -> BitPlan:
        """This plan's decisions for another model of the same architecture.

        Args:
            model: the undecided plan of that model; sizes and units are taken from it.

        Raises:
            PlanError: the modules or their shapes differ, a group size does not fit, or modules of one unit have
                different bits.
        """
        known = {module.name: module for module in self.modules}
        wanted = {module.name: module for module in model.modules}
        differences = [
            _listed("decides on what the model lacks", known.keys() - wanted.keys()),
            _listed("says nothing of", wanted.keys() - known.keys()),
            _listed(
                "has other shapes for",
                {
                    f"{name} {_shape(known[name])} instead of {_shape(wanted[name])}"
                    for name in known.keys() & wanted.keys()
                    if _shape(known[name]) != _shape(wanted[name])
                },
            ),
        ]
        if any(differences):
            raise PlanError(f"the plan is for another model: it {'; it '.join(filter(None, differences))}")
        decided = []
        first: dict[str, ModulePlan] = {}
        for module in model.modules:
            with in_module(module.name):
                scheme = known[module.name].scheme
                scheme.groups(module.in_features)
                decided.append(replace(module, scheme=scheme))
                other = first.setdefault(module.unit, decided[-1])
                if other.scheme.bits != scheme.bits:
                    raise PlanError(
                        f"the plan has {scheme.bits} bits, and {other.scheme.bits} for {other.name}, which share the"
                        f" unit {module.unit}; give both the same"
                    )
        return replace(model, modules=tuple(decided))

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
                    **({} if module.kind == LINEAR else {"kind": module.kind}),
                    **({"shared_with": list(module.shared_with)} if module.shared_with else {}),
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


def _shape(module: ModulePlan) -> tuple[int, int]:
    return module.out_features, module.in_features


def _without_numbers(name: str) -> str:
    """`"experts.7.up_proj"` → `"experts.*.up_proj"`."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _listed(what: str, names: Collection[str]) -> str:
    """`"lacks a, b and 3 more"`, or nothing."""
    shown, more = sorted(names)[:2], len(names) - 2
    return f"{what} {', '.join(shown)}{f' and {more} more' if more > 0 else ''}" if names else ""


def _module_from_dict(name: str, entry: Mapping[str, Any]) -> ModulePlan:
    with in_module(name):
        try:
            out_features, in_features = entry["shape"]
            scheme = LayerScheme(entry["bits"], entry["group_size"], entry["symmetric"])
            sizes = out_features, in_features, entry["element_size"]
            of_module = entry.get("kind", LINEAR), tuple(entry.get("shared_with", ()))
            return ModulePlan(name, entry["block"], entry["unit"], *sizes, scheme, *of_module)
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"its entry in the bit plan is wrong: {error}") from error


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
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
