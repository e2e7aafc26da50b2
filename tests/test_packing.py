"""The wire format: packed words against compressed-tensors, round trips, wrong sizes."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from conftest import WIDTHS_OF_THEIRS
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cptquant.errors import CheckpointError
from hf_cptquant.packing import pack, packed_length, unpack, unpack_rows

BITS = (2, 3, 4, 5, 6, 8)


def random_integers(rows, columns, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), dtype=torch.int8, generator=generator)


@pytest.mark.parametrize(
    ("bits", "integers", "words"),
    [
        (4, [-7, -6, -5, -4, -3, -2, -1, 0], [0x87654321 - 2**32]),
        (8, [-127, -126, -125, -124], [0x04030201]),
        (8, [127], [0xFF]),
        (2, [-2, -1, 0, 1], [0b11100100]),
        # the eleventh value, 0b110, has its lower two bits in the first word and the upper one in the second
        (3, [-4] * 10 + [2], [0b10 << 30, 0b1]),
    ],
)
def test_words_by_hand(bits, integers, words):
    expected = torch.tensor(words, dtype=torch.int64).to(torch.int32)
    assert torch.equal(pack(torch.tensor([integers], dtype=torch.int8), bits), expected[None])


@pytest.mark.parametrize(
    ("count", "bits", "words"), [(32, 3, 3), (1, 2, 1), (33, 4, 5), (11, 3, 2), (10, 3, 1), (64, 8, 16), (0, 4, 0)]
)
def test_packed_length(count, bits, words):
    assert packed_length(count, bits) == words


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("bits", WIDTHS_OF_THEIRS)
def test_words_are_those_of_compressed_tensors(bits, length, dim):
    shape = (5, length) if dim == 1 else (length, 5)
    integers = random_integers(*shape, bits)
    before = integers.clone()
    words = pack(integers, bits, dim)
    theirs = pack_to_int32(integers, bits, packed_dim=dim)
    assert words.dtype == torch.int32
    assert words.is_contiguous()
    assert torch.equal(words, theirs)
    unpacked = unpack(theirs, bits, length, dim)
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, integers)
    assert torch.equal(unpack_from_int32(words, bits, integers.shape, packed_dim=dim), integers)
    assert torch.equal(integers, before)


@pytest.mark.parametrize("bits", BITS)
def test_non_contiguous_tensors(bits):
    integers = random_integers(40, 66, bits)
    assert torch.equal(pack(integers.t(), bits), pack(integers.t().contiguous(), bits))
    assert torch.equal(pack(integers[:, ::2], bits), pack(integers[:, ::2].contiguous(), bits))
    words = pack(integers, bits)
    assert torch.equal(unpack(words.t().contiguous().t(), bits, 66), integers)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("bits", BITS)
def test_a_single_word_for_each_row_out_of_a_wider_tensor(bits, rows):
    integers = random_integers(rows, 4, bits)
    wide = pack(integers, bits).repeat(1, 3)
    assert torch.equal(unpack(wide[:, :1], bits, 4), integers)


@pytest.mark.parametrize("bits", BITS)
def test_bits_beyond_the_last_integer_are_ignored(bits):
    integers = random_integers(3, 33, bits)
    words = pack(integers, bits)
    used = 33 * bits % 32
    words[:, -1] |= -(2**used)
    assert torch.equal(unpack(words, bits, 33), integers)


@settings(deadline=None)
@given(data=st.data(), bits=st.sampled_from(BITS), dim=st.sampled_from([0, 1]))
def test_round_trip(data, bits, dim):
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 70))
    value = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    values = data.draw(st.lists(value, min_size=rows * columns, max_size=rows * columns))
    integers = torch.tensor(values, dtype=torch.int8).view(rows, columns)
    words = pack(integers, bits, dim)
    assert words.shape[dim] == -(-integers.shape[dim] * bits // 32)
    assert torch.equal(unpack(words, bits, integers.shape[dim], dim), integers)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("difference", [-1, 1])
@pytest.mark.parametrize("bits", BITS)
def test_wrong_number_of_words_is_refused(bits, difference, dim):
    length = packed_length(64, bits)
    shape = (3, length + difference) if dim == 1 else (length + difference, 3)
    with pytest.raises(CheckpointError, match=f"{length + difference} words .* cannot hold 64 integers of {bits} bits"):
        unpack(torch.zeros(shape, dtype=torch.int32), bits, 64, dim)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 32, 45])
def test_some_rows_are_unpacked_without_the_others(bits, count):
    integers = random_integers(count, 3, bits)
    rows = torch.arange(count).flip(0).repeat(2)
    assert torch.equal(unpack_rows(pack(integers, bits, dim=0), bits, rows), integers[rows])
