"""What runs where: versions, devices, and for every scheme the kernel of decoding and of prefill, with the reason.

It asks the very functions that modules and the op ask, so it cannot say anything else than what happens.
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from .arithmetic import working_dtype
from .errors import CheckpointError
from .kernels import REFERENCE, choose_layout, kernel_of
from .plan import PER_CHANNEL, BitPlan, LayerScheme

LIBRARIES = ("hf-cptquant", "torch", "transformers", "accelerate", "compressed-tensors")
DECODE_ROWS, PREFILL_ROWS = 1, 512
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Without a model: what a plan can hold, for a weight of common size
SCHEMES = tuple(
    LayerScheme(bits, group_size, symmetric)
    for bits, group_size in ((2, 128), (3, 128), (4, 128), (4, PER_CHANNEL), (5, 128), (6, 128), (8, PER_CHANNEL))
    for symmetric in (True, False)
)
SHAPE = (4096, 4096)
NOT_LINEAR = "there are kernels for linear layers only; others are dequantized at each call"


@dataclass(frozen=True)
class KernelReport:
    """What a scheme runs on.

    Attributes:
        scheme: bits, symmetry, group, as plans print it.
        device, dtype: where, and of which model.
        decode, prefill: the kernel for 1 row and for 512 rows.
        reason: why this one and not a faster one.
        modules: how many modules of the model this is true of, and the name of the first; 0 and None without a model.
    """

    scheme: str
    device: str
    dtype: str
    decode: str
    prefill: str
    reason: str
    modules: int = 0
    example: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Library → version; device → what it is; one report for each scheme, device and dtype."""

    versions: dict[str, str]
    devices: dict[str, str]
    kernels: tuple[KernelReport, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def diagnose(folder: Path | None = None) -> Diagnosis:
    """Look at this machine, and at the schemes of a quantized model or else at all kinds of schemes.

    Raises:
        PlanError, CheckpointError: the folder holds no model of this package.
    """
    devices = describe_devices()
    if folder is None:
        kernels = tuple(
            _report(scheme, *SHAPE, torch.device(device), dtype)
            for device in devices
            for dtype in DTYPES
            for scheme in SCHEMES
        )
    else:
        kernels = tuple(report for device in devices for report in _of_model(folder, torch.device(device)))
    return Diagnosis(library_versions(), devices, kernels)


def library_versions() -> dict[str, str]:
    """Python and the libraries that figures depend on → version."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def describe_devices() -> dict[str, str]:
    """Device of this machine → what it is."""
    native = working_dtype(torch.bfloat16, torch.device("cpu")) == torch.bfloat16
    found = {
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, bfloat16"
        f" {'native' if native else 'computed in float32'}"
    }
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        for index in range(torch.accelerator.device_count()):
            device = f"{accelerator.type}:{index}"
            name = torch.cuda.get_device_name(index) if accelerator.type == "cuda" else accelerator.type
            capability = (
                f", capability {'.'.join(map(str, torch.cuda.get_device_capability(index)))}"
                if accelerator.type == "cuda"
                else ""
            )
            found[device] = name + capability
    return found


def _report(
    scheme: LayerScheme, out_features: int, in_features: int, device: torch.device, dtype: torch.dtype
) -> KernelReport:
    choice = choose_layout(scheme, out_features, in_features, device, dtype)
    shape = (out_features, in_features)
    decode, prefill = (kernel_of(choice.layout, shape, rows, dtype, device) for rows in (DECODE_ROWS, PREFILL_ROWS))
    return KernelReport(str(scheme), str(device), _name(dtype), decode, prefill, choice.reason)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _of_model(folder: Path, device: torch.device) -> tuple[KernelReport, ...]:
    plan = BitPlan.load(folder)
    try:
        dtype = AutoConfig.from_pretrained(folder).dtype or torch.float32
    except OSError as error:
        raise CheckpointError(f"{folder} holds a plan, but no model: {error}") from error
    names: dict[KernelReport, list[str]] = {}
    for module in plan.packed:
        if module.linear or module.shared_with:  # by the head that multiplies by the weight of an embedding
            report = _report(module.scheme, module.out_features, module.in_features, device, dtype)
        else:
            report = KernelReport(str(module.scheme), str(device), _name(dtype), REFERENCE, REFERENCE, NOT_LINEAR)
        names.setdefault(report, []).append(module.name)
    return tuple(
        KernelReport(**{**asdict(report), "modules": len(members), "example": members[0]})
        for report, members in names.items()
    )
