"""Our integers as blocks of ggml's types, not rounded again.

ggml cuts the rows of a weight into blocks of 32 weights. A block begins with its scale d, and in Q4_1 a minimum m, both
float16; then come unsigned integers n, of 4 or 5 bits, or signed ones of 8 (ggml-common.h of llama.cpp):

| type | weight      | bytes of a block                                    | bits per weight |
|------|-------------|-----------------------------------------------------|-----------------|
| Q4_0 | (n − 8)·d   | d: 2, nibbles: 16                                   | 4.5             |
| Q4_1 | n·d + m     | d: 2, m: 2, nibbles: 16                             | 5.0             |
| Q5_0 | (n − 16)·d  | d: 2, fifth bits: 4 (little-endian), nibbles: 16    | 5.5             |
| Q8_0 | n·d         | d: 2, signed bytes: 32                              | 8.5             |

Byte i of the nibbles has the lower four bits of n of weight i in its lower half, and of weight i + 16 in its upper
half; bit i of the fifth bits belongs to weight i.

Ours are x̂ = (q − z)·s with groups of a multiple of 32, so every block of a group gets the group's scale, which may be
negative there too. What q − z can be decides on the type:

- Without zero points: up to 4 bits fit Q4_0, 5 bits Q5_0, 6 and 8 bits Q8_0.
- With zero points q − z spans twice the range: 2 and 3 bits fit Q4_0, 5 and 6 bits Q8_0; of 8 bits there is no type.
- 4 bits with zero points fit Q4_1 if the minimum is a float16. With k = z + 8, the number of steps from the minimum up
  to 0, that minimum is −k·s, or, read from the other end, (15 − k)·s with scale −s and integers 15 − n. One of k and
  15 − k is at most 7, and 7 times a bfloat16 (8 significant bits) has at most 11, as many as a float16. Scales with
  more significant bits may need Q5_0, which holds q − z itself.

Every scale must be a float16, too. A bfloat16 is one unless it is outside the range: above 65504 it is refused, below
2^-17 it may lose bits, which moves a weight by at most 2^-18. A float32 loses all but 11 bits. Both is told.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from ..errors import ExportError
from ..grid import QuantizedWeight
from ..plan import PER_CHANNEL

BLOCK = 32
OFFSETS = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 0}  # what 0 is stored as


def block_type(weight: QuantizedWeight) -> str:
    """The smallest of ggml's types that holds the integers of a weight: "Q4_0", "Q4_1", "Q5_0" or "Q8_0".

    Raises:
        ExportError: groups are no multiples of 32, zero points have 8 bits, or a scale is too large for float16.
    """
    bits, group_size, in_features = weight.scheme.bits, weight.scheme.group_size, weight.integers.shape[1]
    if (in_features if group_size == PER_CHANNEL else group_size) % BLOCK:
        what = f"{in_features} input features" if group_size == PER_CHANNEL else f"groups of {group_size}"
        fits = in_features % BLOCK == 0
        way_out = "quantize with group_size 32, 64 or 128" if fits else "leave it out with modules_to_not_convert"
        raise ExportError(f"{what} do not fit into ggml's blocks of 32; {way_out}")
    scale = float16_scale(weight)
    if weight.zero_point is None:
        return "Q4_0" if bits <= 4 else "Q5_0" if bits == 5 else "Q8_0"
    if bits == 8:
        raise ExportError("ggml has no type for zero points of 8 bits; quantize with symmetric=True, the default")
    if bits == 4:
        _, minimum = _towards_minimum(scale, weight.zero_point)
        return "Q4_1" if torch.equal(minimum.half().float(), minimum) else "Q5_0"
    return "Q4_0" if bits <= 3 else "Q8_0"


def shared_type(kinds: Collection[str]) -> str:
    """The smallest type that holds what some types hold, for weights that have to have one in common."""
    if len(set(kinds)) == 1:
        return next(iter(kinds))
    return "Q8_0" if "Q8_0" in kinds else "Q5_0"  # which has room for q − z of 4 bits with zero points, too


def encode(weight: QuantizedWeight, kind: str) -> np.ndarray:
    """A weight as blocks of the type that `block_type` names, or of one that holds more (`shared_type`).

    Returns:
        uint8 `[out_features, in_features / 32 · bytes of a block]`.
    """
    scale = float16_scale(weight)
    header = [scale]
    integers = weight.integers.to(torch.int16)
    if kind == "Q4_1":
        assert weight.zero_point is not None
        reverse, minimum = _towards_minimum(scale, weight.zero_point)
        stored = _blocks(integers + 8, per_block(reverse, weight))
        header = [torch.where(reverse, -scale, scale), minimum.half()]
    else:
        zero_point = 0 if weight.zero_point is None else per_block(weight.zero_point, weight).unsqueeze(-1)
        stored = integers.view(len(integers), -1, BLOCK) - zero_point + OFFSETS[kind]
    parts = [per_block(half, weight).unsqueeze(-1).contiguous().view(torch.uint8) for half in header]
    if kind == "Q8_0":
        parts.append(stored.to(torch.int8).view(torch.uint8))
    else:
        if kind == "Q5_0":
            fifth = (stored >> 4).view(*stored.shape[:2], 4, 8) << torch.arange(8)
            parts.append(fifth.sum(-1).to(torch.uint8))
        low = stored & 0xF
        parts.append((low[..., :16] | low[..., 16:] << 4).to(torch.uint8))
    return torch.cat(parts, -1).flatten(1).numpy()


def float16_scale(weight: QuantizedWeight) -> Tensor:
    """The scales as float16 `[out_features, groups]`, rounded if they do not fit.

    Raises:
        ExportError: a scale is above 65504.
    """
    half = weight.scale.half()
    if not bool(torch.isfinite(half).all()):
        largest = weight.scale.abs().max().item()
        raise ExportError(f"the scale {largest:.3g} is too large for float16, which ggml's blocks have (65504)")
    return half


def largest_difference(weight: QuantizedWeight) -> float:
    """How far a weight in ggml's blocks may be from ours, since scales are float16 there: 0 if all of them are."""
    off = (weight.scale.float() - weight.scale.half().float()).abs()
    if not bool(off.any()):
        return 0.0
    integers = weight.integers.to(torch.int16).view(*weight.scale.shape, -1)
    steps = integers if weight.zero_point is None else integers - weight.zero_point.unsqueeze(-1)
    return (steps.abs().amax(-1) * off).max().item()


def _towards_minimum(scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """Of a grid of 4 bits with zero points: whether to count from its other end, and the minimum m then, in float32."""
    steps = zero_point.to(torch.int16) + 8
    reverse = steps > 7
    return reverse, torch.where(reverse, 15 - steps, -steps) * scale.float()


def _blocks(stored: Tensor, reverse: Tensor) -> Tensor:
    """Unsigned integers of 4 bits as `[out, blocks, 32]`, counted from the other end where `reverse` says so."""
    blocks = stored.view(*reverse.shape, BLOCK)
    return torch.where(reverse.unsqueeze(-1), 15 - blocks, blocks)


def per_block(of_group: Tensor, weight: QuantizedWeight) -> Tensor:
    """`[out, groups]` → `[out, blocks]`."""
    return of_group.repeat_interleave(weight.integers.shape[1] // BLOCK // of_group.shape[1], dim=1)
