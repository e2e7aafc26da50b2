"""Integers ↔ int32 words: the wire format.

The layout is that of compressed-tensors "pack-quantized": signed integers are stored as unsigned (plus 2^(bits−1)) in a
dense little-endian bit stream along one dimension, so that 32 values fill exactly `bits` words and values of 3, 5 or 6
bits may straddle two words. Packing is a codec of its own so that the file format and the kernels can change apart.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import CheckpointError

WORD = 32


def packed_length(count: int, bits: int) -> int:
    """int32 words that hold `count` integers."""
    return math.ceil(count * bits / WORD)


def pack(integers: Tensor, bits: int, dim: int = 1) -> Tensor:
    """Pack signed integers into words.

    Args:
        integers: int8 `[rows, columns]` in [−2^(bits−1), 2^(bits−1) − 1].
        bits: 2 to 8.
        dim: the dimension that shrinks: 1 for weights, 0 for zero points.

    Returns:
        int32, the size of `dim` being `packed_length(size, bits)`.
    """
    if dim == 0:
        return pack(integers.t(), bits).t().contiguous()
    rows, columns = integers.shape
    if bits in (4, 8):  # whole integers lie in each byte: no shifts across words, and a byte for each integer
        octets = integers.contiguous().view(torch.uint8) + 2 ** (bits - 1)
        octets = F.pad(octets, (0, -columns % (WORD // bits)))
        if bits == 4:
            octets = octets[:, ::2] | octets[:, 1::2] << 4
        return octets.reshape(-1).view(torch.int32).view(rows, packed_length(columns, bits))
    unsigned = integers.to(torch.int64) + 2 ** (bits - 1)
    stream = F.pad(unsigned, (0, -columns % WORD)).view(rows, -1, WORD)
    words = torch.zeros(rows, stream.shape[1], bits, dtype=torch.int64, device=integers.device)
    for index in range(WORD):
        word, offset = divmod(index * bits, WORD)
        shifted = stream[..., index] << offset
        words[..., word] |= shifted
        if offset + bits > WORD:
            words[..., word + 1] |= shifted >> WORD
    low = words & 0xFFFFFFFF
    signed = torch.where(low >= 2**31, low - 2**32, low).to(torch.int32)
    return signed.flatten(1)[:, : packed_length(columns, bits)].contiguous()


def unpack(words: Tensor, bits: int, count: int, dim: int = 1) -> Tensor:
    """Reverse of `pack`.

    Args:
        words: int32 `[rows, packed_length(count, bits)]` (transposed if `dim` is 0).
        bits: 2 to 8.
        count: integers along `dim`.

    Returns:
        int8 with `count` entries along `dim`.

    Raises:
        CheckpointError: the words are too few or too many for `count` integers.
    """
    if dim == 0:
        return unpack(words.t(), bits, count).t().contiguous()
    rows, length = words.shape
    if length != packed_length(count, bits):
        raise CheckpointError(f"{length} words of 32 bits cannot hold {count} integers of {bits} bits")
    octets = words.contiguous().view(-1).view(torch.uint8)
    if bits == 8:
        unsigned = octets.clone()
    elif WORD % bits == 0:  # 2 or 4 bits: each byte becomes a lane of as many bytes as it holds integers
        unsigned = spread(octets.to({2: torch.int32, 4: torch.int16}[bits]), bits)
    else:
        unsigned = spread(_eights(words, bits), bits)
    unsigned -= 2 ** (bits - 1)
    return unsigned.view(torch.int8).view(rows, -1)[:, :count].contiguous()


def unpack_rows(words: Tensor, bits: int, rows: Tensor) -> Tensor:
    """Some rows of what was packed along dim 0, without unpacking the others.

    Args:
        words: int32 `[packed_length(count, bits), columns]`.
        bits: 2 to 8.
        rows: their numbers `[n]`.

    Returns:
        int8 `[n, columns]`.
    """
    block, place = rows // WORD, rows % WORD  # so many rows fill exactly `bits` words
    wanted = block.unsqueeze(1) * bits + torch.arange(bits, device=rows.device)
    of_block = words[wanted.clamp(max=len(words) - 1)]  # beyond the end no row is asked for
    values = unpack(of_block.transpose(1, 2).reshape(-1, bits), bits, WORD).view(len(rows), -1, WORD)
    return values.gather(2, place.view(-1, 1, 1).expand(-1, words.shape[1], 1)).squeeze(2)


def _eights(words: Tensor, bits: int) -> Tensor:
    """Words `[rows, length]` → int64 lanes `[rows, n, 4]` that hold 8 integers each in their lowest bits."""
    rows, length = words.shape
    padded = F.pad(words, (0, -length % bits)).view(rows, -1, bits)
    stream = padded.permute(2, 0, 1).to(torch.int64, memory_format=torch.contiguous_format) & 0xFFFFFFFF
    lanes = torch.empty(*stream.shape[1:], WORD // 8, dtype=torch.int64, device=words.device)
    for index in range(WORD // 8):
        word, start = divmod(index * 8 * bits, WORD)
        lane = stream[word] >> start
        for following in range(1, math.ceil((start + 8 * bits) / WORD)):
            lane |= stream[word + following] << (WORD * following - start)
        lanes[..., index] = lane
    return lanes.bitwise_and_(2 ** (8 * bits) - 1)


def spread(lanes: Tensor, bits: int) -> Tensor:
    """Lanes of n bytes that hold n integers in their lowest bits → uint8, one integer in each byte, flat.

    The upper half of the bits that lie together moves to the upper half of their place, until each integer has a byte.
    `lanes` is written over.
    """
    size = width = lanes.element_size()
    while width > 1:
        width //= 2
        field, shift = width * bits, width * (8 - bits)
        lower = sum((2**field - 1) << (16 * width * place) for place in range(size // (2 * width)))
        upper = lower << field
        if shift >= field:  # the halves do not meet on their way
            lanes |= lanes << shift
            lanes &= lower | upper << shift
        else:
            moved = (lanes & upper) << shift
            lanes &= lower
            lanes |= moved
    return lanes.view(-1).view(torch.uint8)
