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
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .card import CardFacts, render_card
from .errors import CheckpointError, PlanError
from .model_view import task_of
from .modules import PACKED_CLASSES, QuantConv1D, QuantLinear, packed_modules
from .plan import PLAN_FILE, ModulePlan
from .quantize import replace_module
from .record import QuantizationRecord
from .runtimes import RUNTIMES, SERVED_TASK, Problem, in_one_line, model_problems, problems
from .table import SensitivityTable

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it

SAFETENSORS_DTYPES = {
    "weight_packed": ("I32",),
    "weight_zero_point": ("I32",),
    "weight_shape": ("I64",),
    "weight_scale": ("F16", "BF16", "F32"),
}


def check_files(files: Sequence[str], record: QuantizationRecord) -> None:
    """Check the headers of safetensors files against a plan before transformers loads them.

    Raises:
        CheckpointError: a file is damaged, or a packed tensor has another dtype or shape than the plan needs.
    """
    modules = {module.name: module for module in record.plan.packed}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118, a safetensors file is not a dict
                    name, _, leaf = key.rpartition(".")
                    if leaf in SAFETENSORS_DTYPES:
                        _check_tensor(tensors.get_slice(key), name, leaf, modules.get(name))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged ({error}); fetch or write the checkpoint again") from error


def with_full_table(record: QuantizationRecord, files: Sequence[str]) -> QuantizationRecord:
    """The record with the costs, errors and correlations that stand in the plan file beside the weights, if it is
    there.

    `config.json` has only the scores, so that it stays small; nothing but saving again needs the rest.
    """
    path = Path(files[0]).parent / PLAN_FILE if files else None
    if path is None or not path.exists() or record.table is None:
        return record
    try:
        table = SensitivityTable.load(path)
    except PlanError as error:
        logger.warning(f"{path} is damaged and is not used: {error}")
        return record
    return replace(record, table=table) if table.fingerprint == record.table.fingerprint else record


def _check_tensor(tensor: Any, name: str, leaf: str, module: ModulePlan | None) -> None:
    if tensor.get_dtype() not in SAFETENSORS_DTYPES[leaf]:
        raise CheckpointError(
            f"{name}: {leaf} is stored as {tensor.get_dtype()}, not {' or '.join(SAFETENSORS_DTYPES[leaf])}"
        )
    if module is not None:  # None: transformers renames this model's weights on loading, and checks their shapes itself
        with torch.device("meta"):
            expected = QuantLinear(module.in_features, module.out_features, module.scheme).state_dict()
        shape = tuple(expected[leaf].shape) if leaf in expected else None
        if tuple(tensor.get_shape()) != shape:
            raise CheckpointError(
                f"{name}: {leaf} has shape {tuple(tensor.get_shape())}, the plan ({module.scheme}) needs {shape}"
            )


def build_skeleton(model: nn.Module, record: QuantizationRecord) -> None:
    """Swap the dense modules of a model whose weights are not loaded yet for empty packed ones."""
    for module in record.plan.packed:
        dense = model.get_submodule(module.name)
        packed = PACKED_CLASSES[type(dense)](
            module.in_features,
            module.out_features,
            module.scheme,
            dense.bias is not None,
            dense.weight.dtype,
            dense.weight.device,
        )
        replace_module(model, module.name, packed)


def finish_loading(model: PreTrainedModel) -> None:
    """After transformers has filled the skeleton: check that nothing is missing, and settle the kernels' layouts.

    Raises:
        CheckpointError: a packed tensor was not in the files, or does not belong to a weight of this shape.
    """
    for name, module in packed_modules(model).items():
        for leaf, tensor in module.named_buffers():
            if not getattr(tensor, "_is_hf_initialized", False):  # transformers marks what it has loaded
                raise CheckpointError(f"{name}: {leaf} is missing from the checkpoint")
        if module.weight_shape.tolist() != [module.out_features, module.in_features]:
            raise CheckpointError(
                f"{name}: weight_shape is {module.weight_shape.tolist()}, the model has"
                f" {[module.out_features, module.in_features]}"
            )
        if not bool(torch.isfinite(module.weight_scale).all()):
            raise CheckpointError(f"{name}: weight_scale holds NaN or infinity")
        module.settle()


def is_portable(model: nn.Module) -> bool:
    """Whether compressed-tensors can say every packed module."""
    return not any(isinstance(module, QuantConv1D) for module in packed_modules(model).values())


def save_checkpoint(
    model: PreTrainedModel,
    record: QuantizationRecord,
    save_directory: str | os.PathLike,
    *,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """`save_pretrained` of a quantized model: what transformers writes, `cptquant_plan.json` and a model card, all or
    nothing.

    Everything is written to a temporary folder beside the target and moved into place when it is complete.

    Args:
        model: quantized; its config holds the section that goes into `config.json`.
        record: what `cptquant_plan.json` says.
        save_directory: a new folder, an earlier checkpoint of this package (replaced), or one without a model.
        push_to_hub: also upload; `repo_id`, `token`, `private`, `create_pr`, `commit_message` as in transformers.
        kwargs: as for `PreTrainedModel.save_pretrained`.

    Raises:
        CheckpointError: the folder holds a model that is not ours.
    """
    target = Path(save_directory)
    hub = {name: kwargs.pop(name) for name in ("repo_id", "private", "create_pr", "commit_message") if name in kwargs}
    if kwargs.get("is_main_process", True):
        refuse_foreign(target)
        limits = limits_of(model)
        if limits is not None:
            logger.warning(limits)
        target_runtime = record.settings.get("target_runtime") or "vllm"
        if task_of(model) == SERVED_TASK and (unloadable := problems_of(model, record, target_runtime)):
            logger.warning(in_one_line(unloadable, RUNTIMES[target_runtime]))
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            type(model).save_pretrained(model, staging, **kwargs)
            record.save(staging / PLAN_FILE)
            _write_card(model, record, limits, target, staging)
            _move_into_place(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    if push_to_hub:
        model.push_to_hub(hub.pop("repo_id", target.name), token=kwargs.get("token"), **hub)


def _write_card(
    model: PreTrainedModel, record: QuantizationRecord, limits: str | None, target: Path, staging: Path
) -> None:
    """Write the model card, around which the text of a card that is there already is kept."""
    task = task_of(model)
    assert task is not None, "a model without a loss is not quantized"
    card = target / "README.md"
    existing = card.read_text(encoding="utf-8") if card.exists() else None
    served = not problems_of(model, record, "vllm")
    facts = CardFacts(target.name, task, is_portable(model), limits, served)
    (staging / "README.md").write_text(render_card(record, facts, existing), encoding="utf-8")


def problems_of(model: nn.Module, record: QuantizationRecord, runtime: str) -> tuple[Problem, ...]:
    """What a runtime (a name in `RUNTIMES`) would not load of a quantized model."""
    rules = RUNTIMES[runtime]
    return (*model_problems(task_of(model), is_portable(model), rules), *problems(record.plan, rules))


def limits_of(model: PreTrainedModel) -> str | None:
    """Where the checkpoint will not load, in a sentence, or None."""
    packed = packed_modules(model)
    if not is_portable(model):
        return "compressed-tensors cannot say Conv1D layers: reloading needs `import hf_cptquant`."
    if not _initializes_without_weights(model, packed):
        return (
            f"{type(model).__name__} reads the weights of its layers when built, which fails in plain transformers"
            " with any compressed-tensors checkpoint: reloading needs `import hf_cptquant`."
        )
    if any(not module.scheme.symmetric for module in packed.values()):
        return (
            "Zero points (symmetric=False): compressed-tensors 0.18 to 0.20 expect them unpacked, so plain transformers"
            " cannot load this checkpoint with them; reloading needs `import hf_cptquant`, or compressed-tensors 0.17."
        )
    return None


def _initializes_without_weights(model: PreTrainedModel, packed: Mapping[str, QuantLinear]) -> bool:
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
    if folder.is_dir() and not (folder / PLAN_FILE).exists():
        held = [
            path.name
            for path in sorted(folder.iterdir())
            if path.suffix in (".safetensors", ".bin", ".gguf") or path.name == "config.json"
        ]
        if held:
            raise CheckpointError(f"{folder} holds another model ({held[0]}); give a new folder")


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
