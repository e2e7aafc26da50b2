"""Where a processor imitates a format, products are computed in one that it has, and nothing else changes."""

from contextlib import suppress

import pytest
import torch
from conftest import tiny_model

from hf_cptquant.arithmetic import linears_in_working_dtype, working_dtype

CPU = torch.device("cpu")


@pytest.fixture
def imitated(monkeypatch):
    """A CPU without instructions for bfloat16."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@pytest.mark.parametrize("instructions", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_bfloat16_stays_where_there_are_instructions_for_it(imitated, monkeypatch, instructions):
    assert working_dtype(torch.bfloat16, CPU) == torch.float32
    monkeypatch.setattr(torch.cpu, instructions, lambda: True)
    assert working_dtype(torch.bfloat16, CPU) == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_only_bfloat16_on_cpus_is_concerned(imitated, dtype):
    assert working_dtype(dtype, CPU) == dtype
    assert working_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16


def test_products_are_those_of_float32_rounded(imitated):
    model = tiny_model("opt").to(torch.bfloat16)  # with biases
    layer = model.model.decoder.layers[0].fc1
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    exact = x.double() @ layer.weight.double().t() + layer.bias.double()
    with linears_in_working_dtype(model):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.to(torch.bfloat16))


def test_the_model_is_left_as_it_was(imitated, tokens):
    model = tiny_model("llama").to(torch.bfloat16)
    before = model(tokens).logits
    changed = linears_in_working_dtype(model)
    with suppress(ZeroDivisionError), changed:
        assert any("forward" in module.__dict__ for module in model.modules())
        raise ZeroDivisionError
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(model(tokens).logits, before)


def test_other_forwards_are_kept(imitated):
    model = tiny_model("llama").to(torch.bfloat16)
    own = model.lm_head.forward = lambda x: x
    with linears_in_working_dtype(model):
        assert model.lm_head.forward is own
    assert model.lm_head.forward is own
