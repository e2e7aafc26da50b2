"""A plan as `llama-quantize` takes it: the type of every tensor that the plan decides on.

llama.cpp then rounds the original model anew, in its own way, with the bits that our plan gives. This needs nothing
but the plan and the names of tensors, so it works for every architecture that the library `gguf` can name. Patterns are
regular expressions that `llama-quantize` searches for in a tensor's name, so they are anchored: none matches another's
tensor, whichever of two matches wins. The file may hold nothing else (no comments).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from gguf import MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map
from transformers import PretrainedConfig

from ..errors import ExportError
from ..model_view import read_config
from ..plan import BitPlan, ModulePlan
from .architectures import ARCHITECTURES, Architecture

SUPER_BLOCK = 256
# bits → type for rows that are multiples of 256, and type of about as many bits for others
TYPES = {
    2: ("q2_k", "iq4_nl"),
    3: ("q3_k", "iq4_nl"),
    4: ("q4_k", "iq4_nl"),
    5: ("q5_k", "q5_0"),
    6: ("q6_k", "q8_0"),
    8: ("q8_0", "q8_0"),
}
UNTOUCHED_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
EXPERT = re.compile(r"\.experts\.\d+\.")
# transformers' names of models that llama.cpp has under another name
ALIASES = {"mistral": "llama", "mixtral": "llama", "cohere": "commandr"}


def tensor_types(plan: BitPlan, config: PretrainedConfig) -> dict[str, str]:
    """Name of a tensor in GGUF → ggml type, for every module of a plan; that of most bits for the experts of a layer.

    Args:
        plan: of the model.
        config: of the model; says architecture, depth and dtype.

    Raises:
        ExportError: `gguf` does not know the architecture or one of its modules.
    """
    names, known = name_map(config), _entry(config)
    untouched = UNTOUCHED_TYPES[str(config.dtype or "float32").removeprefix("torch.")]
    tensors: dict[str, list[ModulePlan]] = {}
    for module in plan.modules:
        name = EXPERT.sub(".experts.", module.name)  # all of a layer are one tensor
        name = gguf_name(names, f"{name if known is None else known.known_as(name)}.weight")
        tensors.setdefault(name, []).append(module)
    return {
        name: _type(max(modules, key=lambda each: each.scheme.bits), untouched) for name, modules in tensors.items()
    }


def _entry(config: PretrainedConfig) -> Architecture | None:
    return ARCHITECTURES.get((config.architectures or [""])[0])


def _type(module: ModulePlan, untouched: str) -> str:
    if not module.scheme.packed:
        return untouched
    whole, other = TYPES[module.scheme.bits]
    return other if module.in_features % SUPER_BLOCK else whole


def write_tensor_types(folder: str | Path, path: str | Path) -> None:
    """Write the file for `llama-quantize --tensor-type-file` from the plan of a quantized model.

    Args:
        folder: of the quantized model.
        path: a new file; one `^name$=type` a line.

    Raises:
        PlanError: the folder has no plan.
        ExportError: as `tensor_types`, or the file exists.
    """
    refuse_existing(Path(path))
    types = tensor_types(BitPlan.load(folder), read_config(str(folder)))
    Path(path).write_text(as_lines(types), encoding="utf-8")


def as_lines(types: Mapping[str, str]) -> str:
    """One anchored pattern a line."""
    return "".join(f"^{re.escape(name)}$={kind}\n" for name, kind in types.items())


def name_map(config: PretrainedConfig) -> TensorNameMap:
    """The library's names for the tensors of a model.

    Raises:
        ExportError: it does not know the architecture.
    """
    layers = config.get_text_config().num_hidden_layers
    if (known := _entry(config)) is not None:
        return names_in(known.name, layers)
    plain = _plain(config.model_type.removesuffix("_text"))
    wanted = ALIASES.get(plain, plain)
    for name in MODEL_ARCH_NAMES.values():
        if _plain(name) == wanted:
            return names_in(name, layers)
    raise ExportError(
        f"the package gguf knows no architecture {config.model_type!r}, so llama.cpp cannot load the model"
    )


def _plain(name: str) -> str:
    return re.sub("[_-]", "", name)


def names_in(architecture: str, layers: int) -> TensorNameMap:
    """The library's names for the tensors of an architecture of llama.cpp with so many layers.

    Raises:
        ExportError: it does not know the architecture.
    """
    for arch, name in MODEL_ARCH_NAMES.items():
        if name == architecture:
            return get_tensor_name_map(arch, layers)
    raise ExportError(f"this version of the package gguf knows no architecture {architecture!r}: update it")


def gguf_name(names: TensorNameMap, parameter: str) -> str:
    """A parameter's name in GGUF. Some architectures are known by the names inside the model without its head.

    Raises:
        ExportError: the library has none.
    """
    for known in (parameter, parameter.partition(".")[2]):
        name = names.get_name(known, try_suffixes=(".weight", ".bias", ".scale"))
        if name is not None:
            return name
    raise ExportError(f"the package gguf has no name for {parameter} in this architecture")


def refuse_existing(path: Path) -> None:
    """Raise `ExportError` if a file would be overwritten, or its folder does not exist."""
    if path.exists():
        raise ExportError(f"{path} exists; give a new file")
    if not path.parent.is_dir():
        raise ExportError(f"the folder of {path} does not exist")
