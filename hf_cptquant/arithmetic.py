"""In which floating-point format a processor multiplies matrices fast.

CPUs without instructions for bfloat16 imitate it and take four times as long as for float32. Products with weights in
bfloat16 are then computed in float32 and rounded, which is at least as exact; layer by layer, so that the model is
never held twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forwards import computing

# Classes that transformers makes from `nn.Linear` and that compute the same, if not always with the same roundings: the
# product is rounded before the bias is added.
SAME_AS_LINEAR = frozenset({"FalconLinear"})


def is_linear(module: nn.Module) -> bool:
    """Whether a module is torch's dense linear layer, or computes the same."""
    return type(module) is nn.Linear or (isinstance(module, nn.Linear) and type(module).__name__ in SAME_AS_LINEAR)


def working_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What to compute in with weights of a dtype.

    The check reads the instruction sets of x86; other CPUs get float32, which is right if not always fastest.
    """
    if dtype != torch.bfloat16 or device.type != "cpu":
        return dtype
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


@contextmanager
def linears_in_working_dtype(model: nn.Module) -> Iterator[None]:
    """Let the linear layers of a model compute in the format that their device is fast in; inputs and outputs stay."""
    slow = [
        module
        for module in model.modules()
        if is_linear(module)
        and "forward" not in module.__dict__  # accelerate's, of an offloaded layer
        and working_dtype(module.weight.dtype, module.weight.device) != module.weight.dtype
    ]
    with computing({module: partial(_linear, module) for module in slow}):
        yield


def _linear(module: nn.Linear, inputs: Tensor) -> Tensor:
    dtype = working_dtype(module.weight.dtype, module.weight.device)
    bias = None if module.bias is None else module.bias.to(dtype)
    return F.linear(inputs.to(dtype), module.weight.to(dtype), bias).to(inputs.dtype)
