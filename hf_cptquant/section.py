"""The section of `config.json` that describes a quantized model, both ways, and its fit to a model.

It has the form of compressed-tensors, which plain transformers reads: `config_groups` with explicit, disjoint module
names (no class names, no regular expressions, nothing that depends on the order of keys). It bears the record of the
run under `"cptquant"`. Models that plain transformers cannot load (GPT-2's `Conv1D`) get the same section under our own
`quant_method`. Reading trusts nothing: names, bits, groups and shapes are checked against the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from .errors import CheckpointError, PlanError, in_module
from .model_view import view_model
from .plan import PACKED_BITS, PER_CHANNEL, BitPlan, LayerScheme, ModulePlan
from .record import QuantizationRecord
from .table import SensitivityTable

SECTION_VERSION = 1


def write_section(record: QuantizationRecord, portable: bool) -> dict[str, Any]:
    """The value of `quantization_config` in `config.json`.

    Args:
        record: of the finished run.
        portable: whether plain transformers can load every packed module; otherwise only this package reads it.
    """
    plan = record.plan
    schemes = sorted({module.scheme for module in plan.packed})
    untouched = [
        name for module in plan.modules if not module.scheme.packed for name in (module.name, *module.shared_with)
    ]
    tied = {module.name: list(module.shared_with) for module in plan.modules if module.shared_with}
    return {
        "quant_method": "compressed-tensors" if portable else "cptquant",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index:02d}": {
                "targets": [module.name for module in plan.packed if module.scheme == scheme],
                "weights": _weights_section(scheme),
            }
            for index, scheme in enumerate(schemes)
        },
        "ignore": untouched + [module.name for module in plan.left],
        "cptquant": {
            "version": SECTION_VERSION,
            "allocation": record.settings["allocation"],
            "bits_per_weight": round(plan.bits_per_weight, 4),
            "bit_plan": _write_bits(plan),
            **({"tied": tied} if tied else {}),
            **_scores_section(record.table),
            "settings": dict(record.settings),
            "calibration": dict(record.calibration),
            "measured": dict(record.measured),
            "base_model": record.base_model,
        },
    }


def _write_bits(plan: BitPlan) -> dict[str, Any]:
    """Block → module name within the block → bits; outside the blocks, module name → bits."""
    inside = {
        block: {name: module.scheme.bits for name, module in members.items()}
        for block, members in plan.inside.by_block().items()
    }
    return inside | {module.name: module.scheme.bits for module in plan.modules if module.outside}


def _scores_section(table: SensitivityTable | None) -> dict[str, Any]:
    if table is None:
        return {"method": None}
    return {
        "method": table.method,
        "sensitivity": table.scores,
        "sensitivity_raw": dict(table.raw),
        "sensitivity_settings": dict(table.settings),
        "metric": table.metric,
        "metric_before": table.base,
        "fingerprint": table.fingerprint,
    }


def _weights_section(scheme: LayerScheme) -> dict[str, Any]:
    per_channel = scheme.group_size == PER_CHANNEL
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if per_channel else "group",
        "group_size": None if per_channel else scheme.group_size,
        "dynamic": False,
    }


def read_section(section: Mapping[str, Any], model: PreTrainedModel) -> QuantizationRecord:
    """Parse a section and fit it to a dense model (weights are not read, the meta device is enough).

    Raises:
        CheckpointError: the section is incomplete, contradicts itself, or names modules, bits or groups that the
            model does not have.
    """
    try:
        own = section["cptquant"]
        if own["version"] != SECTION_VERSION:
            raise CheckpointError(
                f"the checkpoint has version {own['version']!r} of the format; this package reads {SECTION_VERSION}"
            )
        schemes = _read_schemes(section["config_groups"])
        settings = own["settings"]
        inside = {name: bits for name, bits in own["bit_plan"].items() if not isinstance(bits, int)}
        outside = {name: bits for name, bits in own["bit_plan"].items() if name not in inside}
        view = view_model(model, settings["modules_to_not_convert"], allow_skipped=True, outside=outside)
        plan = view.plan(settings["granularity"])
        bit_plan = {f"{block}.{name}": bits for block, members in inside.items() for name, bits in members.items()}
        bit_plan |= outside
        table = None if own["method"] is None else _read_scores(own, plan)
        tied = {name: tuple(others) for name, others in own.get("tied", {}).items()}
        others = own["calibration"], own["measured"], own.get("base_model")
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"quantization_config in config.json is incomplete: {error!r}") from error
    known_names = {name for name, _ in model.named_modules()}
    known = {module.name for module in plan.modules}
    for name in (*schemes, *bit_plan):
        if name not in known:
            raise CheckpointError(
                f"{name}: config.json quantizes it, but {type(model).__name__} has no such module to quantize"
            )
    modules = []
    for module in plan.modules:
        with in_module(module.name):
            if apart := known_names & set(tied.get(module.name, ())) - set(module.shared_with):
                raise CheckpointError(
                    f"{min(apart)} has no weight but this one, and is not tied to it; set tie_word_embeddings=true in"
                    " config.json"
                )
            modules.append(_decided(module, schemes.get(module.name), bit_plan.get(module.name)))
    plan = replace(plan, modules=tuple(modules))
    table = table and replace(table, plan=plan.undecided)
    return QuantizationRecord(plan, table, settings, *others)


def _read_scores(own: Mapping[str, Any], plan: BitPlan) -> SensitivityTable:
    return SensitivityTable(
        method=own["method"],
        metric=own["metric"],
        base=own["metric_before"],
        raw=own["sensitivity_raw"],
        plan=plan,
        settings=own["sensitivity_settings"],
        fingerprint=own["fingerprint"],
        group_size=own["settings"]["group_size"],
        symmetric=own["settings"]["symmetric"],
    )


def _read_schemes(groups: Mapping[str, Any]) -> dict[str, LayerScheme]:
    schemes: dict[str, LayerScheme] = {}
    for key, group in groups.items():
        weights = group["weights"]
        if weights["num_bits"] not in PACKED_BITS or weights["type"] != "int":
            raise CheckpointError(
                f"{key} in config.json has {weights['num_bits']!r} bits of type {weights['type']!r}; possible:"
                f" {PACKED_BITS} of 'int'"
            )
        size = {"channel": PER_CHANNEL, "group": weights["group_size"]}.get(weights["strategy"])
        if not isinstance(size, int):
            raise CheckpointError(
                f"{key} in config.json has strategy {weights['strategy']!r} and group size {weights['group_size']!r}"
            )
        try:
            scheme = LayerScheme(weights["num_bits"], size, bool(weights["symmetric"]))
        except PlanError as error:
            raise CheckpointError(f"{key} in config.json: {error}") from error
        for target in group["targets"]:
            if target in schemes:
                raise CheckpointError(f"{target}: config.json names it in two groups")
            schemes[target] = scheme
    return schemes


def _decided(module: ModulePlan, scheme: LayerScheme | None, bits: int | None) -> ModulePlan:
    found = 16 if scheme is None else scheme.bits
    if bits != found:
        raise CheckpointError(f"bit_plan in config.json says {bits} bits, config_groups {found}")
    if scheme is None:
        return module
    try:
        scheme.groups(module.in_features)
    except PlanError as error:
        raise CheckpointError(str(error)) from error
    return replace(module, scheme=scheme)
