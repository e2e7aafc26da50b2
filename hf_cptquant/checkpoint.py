"""Model ↔ folder: checks of the files that are read, an empty packed model to load them into, atomic writing.

Reading trusts nothing: dtypes and shapes are checked against the plan before any kernel sees a tensor. Writing is all
or nothing, and never destroys a model that is not ours.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .card import CardFacts, render_card
from .errors import CheckpointError, PlanError, in_module
from .experts import fused_experts, has_linear_experts, take_apart
from .memory import mapped_ranges, release, trim
from .model_view import class_named_in, head_of, read_config
from .modules import PACKED_CLASSES, PackedLayer, QuantLinear, kind_of, packed_modules, replace_module
from .plan import LINEAR, PLAN_FILE, PLAN_PICTURE, SENSITIVITY_PICTURE, ModulePlan, read_json
from .plots import plot_plan, plot_sensitivity
from .record import QuantizationRecord
from .results import EvaluationResult, merge
from .runtimes import RUNTIMES, SERVED_TASK, Problem, in_one_line, model_problems, problems
from .section import read_section
from .tied import tie

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it

CARD_FILE = "README.md"
SAFETENSORS_DTYPES = {
    "weight_packed": ("I32",),
    "weight_zero_point": ("I32",),
    "weight_shape": ("I64",),
    "weight_scale": ("F16", "BF16", "F32"),
}


def check_files(files: Sequence[str], record: QuantizationRecord) -> None:
    """Check the headers of safetensors files against a plan before transformers loads them.

    Raises:
        CheckpointError: a file is damaged, or a packed tensor is missing or has another dtype or shape than the plan
            needs.
    """
    modules = {module.name: module for module in record.plan.packed}
    found: dict[str, set[str]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118, a safetensors file is not a dict
                    name, _, leaf = key.rpartition(".")
                    if leaf in SAFETENSORS_DTYPES:
                        _check_tensor(tensors.get_slice(key), name, leaf, modules.get(name))
                        found.setdefault(name, set()).add(leaf)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged ({error}); fetch or write the checkpoint again") from error
    if found.keys() <= modules.keys():  # otherwise transformers renames some of this model's weights on loading
        for name, module in modules.items():
            for leaf in sorted(_expected_shapes(module).keys() - found.get(name, set())):
                raise CheckpointError(f"{name}: {leaf} is missing from the checkpoint")


def with_plan_file(record: QuantizationRecord, files: Sequence[str]) -> QuantizationRecord:
    """The record with what stands in the plan file beside the weights alone, if it is there: the costs, errors and
    correlations of the table, the results of evaluations, the base model and the run.

    `config.json` has only the scores, so that it stays small; nothing but saving again needs the rest.
    """
    path = Path(files[0]).parent / PLAN_FILE if files else None
    if path is None or not path.exists():
        return record
    try:
        beside = QuantizationRecord.load(path)
    except PlanError as error:
        logger.warning(f"{path} is damaged and is not used: {error}")
        return record
    if beside.plan == record.plan:
        own = ("base_model", "evaluation", "inherited", "run")
        record = replace(record, **{name: getattr(beside, name) for name in own})
    if record.table is None or beside.table is None or record.table.fingerprint != beside.table.fingerprint:
        return record
    return replace(record, table=beside.table)


def _check_tensor(tensor: Any, name: str, leaf: str, module: ModulePlan | None) -> None:
    if tensor.get_dtype() not in SAFETENSORS_DTYPES[leaf]:
        raise CheckpointError(
            f"{name}: {leaf} is stored as {tensor.get_dtype()}, not {' or '.join(SAFETENSORS_DTYPES[leaf])}"
        )
    if module is not None:  # None: transformers renames this model's weights on loading, and checks their shapes itself
        shape = _expected_shapes(module).get(leaf)
        if tuple(tensor.get_shape()) != shape:
            raise CheckpointError(
                f"{name}: {leaf} has shape {tuple(tensor.get_shape())}, the plan ({module.scheme}) needs {shape}"
            )


def _expected_shapes(module: ModulePlan) -> dict[str, tuple[int, ...]]:
    """Packed tensors of a module and their shapes."""
    empty = QuantLinear(module.in_features, module.out_features, module.scheme, bias=False, device="meta")
    return {leaf: tuple(tensor.shape) for leaf, tensor in empty.state_dict().items()}


def build_skeleton(model: PreTrainedModel, record: QuantizationRecord) -> None:
    """Swap the dense modules of a model whose weights are not loaded yet for empty packed ones, and fused experts for
    linear layers if any are."""
    names = tuple(f"{name}." for name in fused_experts(model))
    if any(module.name.startswith(names) for module in record.plan.packed):
        take_apart(model)
    for module in record.plan.packed:
        dense = model.get_submodule(module.name)
        packed = PACKED_CLASSES[kind_of(dense)](
            module.in_features,
            module.out_features,
            module.scheme,
            dense._parameters.get("bias") is not None,
            dense.weight.dtype,
            dense.weight.device,
        )
        replace_module(model, module.name, packed.like(dense))
        if module.shared_with:
            tie(model, module.name, module.shared_with)


def finish_loading(model: PreTrainedModel) -> None:
    """After transformers has filled the skeleton: check that nothing is missing, and settle the kernels' layouts.

    Weights that accelerate has offloaded stay in the wire format, in which they lie on disk.

    Raises:
        CheckpointError: a packed tensor was not in the files, or does not belong to a weight of this shape.
    """
    mapped = mapped_ranges()
    for name, module in packed_modules(model).items():
        with in_module(name):
            if not has_offloaded_params(module):  # accelerate moves tensors, and the mark does not come with them
                _check_marks(module)
            with align_module_device(module):
                _check_values(module)
        module.weight_shape = module.weight_shape.clone()  # or these bytes alone would keep the whole file mapped
        loaded = module.tensors
        settled = module.settle().tensors
        for before, after in ((loaded.weight, settled.weight), (loaded.scale, settled.scale)):
            if after is not before:
                release(before, mapped)
    trim()


def _check_marks(module: PackedLayer) -> None:
    for leaf, tensor in module.named_buffers():
        if not getattr(tensor, "_is_hf_initialized", False):  # transformers marks what it has loaded
            raise CheckpointError(f"{leaf} is missing from the checkpoint")


def _check_values(module: PackedLayer) -> None:
    shape = [module.out_features, module.in_features]
    if module.weight_shape.tolist() != shape:
        raise CheckpointError(f"weight_shape is {module.weight_shape.tolist()}, the model has {shape}")
    if not bool(torch.isfinite(module.weight_scale).all()):
        raise CheckpointError("weight_scale holds NaN or infinity")


def is_portable(model: nn.Module) -> bool:
    """Whether plain transformers can load every packed module: linear layers. compressed-tensors has no name for the
    others, but for embeddings, whose weights transformers reads before they are there."""
    return all(isinstance(module, QuantLinear) for module in packed_modules(model).values())


def save_checkpoint(
    model: PreTrainedModel,
    record: QuantizationRecord,
    save_directory: str | os.PathLike,
    **kwargs: Any,
) -> None:
    """Write a quantized model: what transformers writes, `cptquant_plan.json` and a model card with pictures of
    plan and scores, all or nothing.

    Everything is written to a temporary folder beside the target and moved into place when it is complete.

    Args:
        model: quantized; its config holds the section that goes into `config.json`.
        record: what `cptquant_plan.json` says.
        save_directory: a new folder, an earlier checkpoint of this package (replaced), or one without a model.
        kwargs: as for `PreTrainedModel.save_pretrained`.

    Raises:
        CheckpointError: the folder holds a model that is not ours.
    """
    target = Path(save_directory)
    if kwargs.get("is_main_process", True):
        refuse_foreign(target)
        limits = limits_of(model)
        if limits is not None:
            logger.warning(limits)
        target_runtime = record.settings.get("target_runtime") or "vllm"
        if head_of(model) == SERVED_TASK and (unloadable := problems_of(model, record, target_runtime)):
            logger.warning(in_one_line(unloadable, RUNTIMES[target_runtime]))
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            type(model).save_pretrained(model, staging, **kwargs)
            record.save(staging / PLAN_FILE)
            _draw_missing_pictures(record, staging)
            (staging / CARD_FILE).write_text(
                _card(record, _facts(model, record, target, limits), target), encoding="utf-8"
            )
            _move_into_place(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            trim()


def describe(folder: Path) -> CardFacts:
    """What a card says of the quantized model in a folder, without reading its weights.

    Raises:
        ModelError: there is no model.
        CheckpointError: it was not quantized by this package, or its config is damaged.
    """
    config = read_config(str(folder))
    model_class, section = class_named_in(config), getattr(config, "quantization_config", None)
    if model_class is None or not isinstance(section, Mapping) or "cptquant" not in section:
        raise CheckpointError(f"{folder} holds no model that cptquant has quantized")
    with torch.device("meta"):
        model = model_class(config)
    record = read_section(section, model)
    build_skeleton(model, record)
    return _facts(model, record, folder, limits_of(model))


def rewrite_record(folder: Path, record: QuantizationRecord) -> None:
    """Write the plan file and the card of a quantized model anew, and the pictures on it that are missing. Each file is
    replaced when it is complete, and the weights are not touched.

    Raises:
        ModelError, CheckpointError: as `describe`, or the metadata of the card cannot be read; nothing is written.
    """
    card = _card(record, describe(folder), folder)
    for path, text in ((folder / PLAN_FILE, record.to_json()), (folder / CARD_FILE, card)):
        complete = path.with_name(f".{path.name}.new")
        try:
            complete.write_text(text, encoding="utf-8")
            complete.replace(path)
        finally:
            complete.unlink(missing_ok=True)
    _draw_missing_pictures(record, folder)


def _draw_missing_pictures(record: QuantizationRecord, folder: Path) -> None:
    if not (folder / PLAN_PICTURE).exists():
        plot_plan(record.plan, None, folder / PLAN_PICTURE)
    if record.table is not None and not (folder / SENSITIVITY_PICTURE).exists():
        plot_sensitivity(record.table, folder / SENSITIVITY_PICTURE)


def add_results(folder: Path, results: Sequence[EvaluationResult]) -> None:
    """Put results into the plan file and the card of a quantized model, in the place of earlier ones of the same data.

    Raises:
        PlanError: the plan file is damaged.
        ModelError, CheckpointError: as `rewrite_record`.
    """
    record = QuantizationRecord.load(folder)
    rewrite_record(folder, replace(record, evaluation=merge(record.evaluation, results)))


def _facts(model: PreTrainedModel, record: QuantizationRecord, folder: Path, limits: str | None) -> CardFacts:
    task = head_of(model)
    assert task is not None, "a model without a loss is not quantized"
    served = not problems_of(model, record, "vllm")
    return CardFacts(folder.absolute().name, task, is_portable(model), limits, served)


def _card(record: QuantizationRecord, facts: CardFacts, folder: Path) -> str:
    """The text of the card, with what others wrote into the one that is in the folder already."""
    card = folder / CARD_FILE
    if not card.exists():
        return render_card(record, facts)
    try:
        before = QuantizationRecord.load(folder)
    except PlanError:  # nothing is known of who wrote what
        before = None
    return render_card(record, facts, card.read_text(encoding="utf-8"), before)


def problems_of(model: nn.Module, record: QuantizationRecord, runtime: str) -> tuple[Problem, ...]:
    """What a runtime (a name in `RUNTIMES`) would not load of a quantized model."""
    rules = RUNTIMES[runtime]
    return (
        *model_problems(head_of(model), is_portable(model), rules),
        *problems(record.plan, rules),
    )


def limits_of(model: PreTrainedModel) -> str | None:
    """Where the checkpoint will not load, in a sentence, or None."""
    packed = packed_modules(model)
    if not is_portable(model):
        kinds = sorted({type(module).__name__.removeprefix("Quant") for module in packed.values()} - {LINEAR})
        return f"Plain transformers cannot load packed {', '.join(kinds)} layers: reloading needs `import hf_cptquant`."
    if has_linear_experts(model):
        return (
            "Packed experts: transformers by itself keeps experts fused and cannot load them; reloading needs"
            " `import hf_cptquant`, or an inference engine."
        )
    if not _initializes_without_weights(model, packed):
        return (
            f"{type(model).__name__} reads the weights of its layers when built, which fails in plain transformers"
            " with any compressed-tensors checkpoint: reloading needs `import hf_cptquant`."
        )
    if any(not module.scheme.symmetric for module in packed.values()):
        return (
            "Zero points (symmetric=False): plain transformers 5.23 and 5.24 expect them unpacked with"
            " compressed-tensors 0.18 to 0.20, and cannot load this checkpoint; reloading needs `import hf_cptquant`,"
            " or an older version of either."
        )
    return None


def _initializes_without_weights(model: PreTrainedModel, packed: Mapping[str, PackedLayer]) -> bool:
    """Whether the model's class can initialize itself where layers have lost their `weight`, as they do on loading in
    plain transformers. Tried on an empty model, since the class alone knows."""
    with torch.device("meta"):
        empty = type(model)(model.config)
    for name in packed:
        del empty.get_submodule(name).weight
    try:
        empty.initialize_weights()
    except AttributeError:
        return False
    return True


def refuse_foreign(folder: Path) -> None:
    """Raise `CheckpointError` if writing a checkpoint into the folder would destroy a model that is not ours."""
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; give a folder")
    if folder.is_dir() and not _is_ours(folder):
        held = [
            path.name
            for path in sorted(folder.iterdir())
            if path.suffix in (".safetensors", ".bin", ".gguf") or path.name == "config.json"
        ]
        if held:
            raise CheckpointError(f"{folder} holds another model ({held[0]}); give a new folder")


def _is_ours(folder: Path) -> bool:
    """Whether this package wrote the model in a folder. The plan file alone does not tell: it stays where others save
    the model again as a dense one."""
    config = folder / "config.json"
    return config.exists() and "cptquant" in (read_json(config).get("quantization_config") or {})


def _move_into_place(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.chmod(0o777 & ~_umask())
        staging.rename(target)
        return
    written = sorted(
        staging.iterdir(), key=lambda path: path.name == "config.json"
    )  # the config last: it makes the rest valid
    stale = set(target.glob("model*.safetensors*")) - {target / path.name for path in written}
    for path in written:
        path.replace(target / path.name)
    for path in stale:
        path.unlink()


def _umask() -> int:
    """The process's umask, which `mkdtemp` ignores. It can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
