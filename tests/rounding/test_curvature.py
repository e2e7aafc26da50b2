"""The curvature of the loss by the outputs of blocks, against plain automatic differentiation in float64."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from sensitivity.test_tdmpq import calibration_for, recipe_for

from hf_cptquant.errors import ModelError
from hf_cptquant.model_view import find_blocks
from hf_cptquant.rounding import curvature
from hf_cptquant.rounding.curvature import curvature_of_outputs
from hf_cptquant.sensitivity.taylor import uniform_numbers


def of_batches(kind, tokens, minilm, size):
    model = tiny_model(kind)
    batches = calibration_for(model, recipe_for(kind, tokens, batch_size=size), minilm).batches
    return curvature_of_outputs(model, find_blocks(model), batches, 3)


def test_it_is_the_second_moment_of_gradients_under_drawn_labels(tokens):
    model = tiny_model("llama").double()
    blocks = find_blocks(model)
    seen = {}
    for name in blocks:
        model.get_submodule(name).register_forward_hook(lambda *call, name=name: seen.update({name: call[2]}))
    logits = model(tokens, use_cache=False).logits[:, :-1]
    # inverse transform sampling, written out
    uniform = uniform_numbers(tokens, 3, range(len(tokens)))[:, :-1]
    cumulative = logits.detach().softmax(-1).cumsum(-1)
    drawn = (cumulative <= uniform.unsqueeze(-1) * cumulative[..., -1:]).sum(-1)
    loss = F.cross_entropy(logits.flatten(0, 1), drawn.flatten(), reduction="sum") / (tokens.shape[1] - 1)
    gradients = torch.autograd.grad(loss, [seen[name] for name in blocks])
    found = curvature_of_outputs(tiny_model("llama"), blocks, [{"input_ids": tokens, "labels": tokens}], 3)
    assert list(found) == list(blocks)
    for name, gradient in zip(blocks, gradients, strict=True):
        rows = gradient.flatten(0, 1)
        expected = rows.t() @ rows / len(rows)
        expected += torch.eye(len(expected)) * expected.diagonal().mean() * curvature.DAMPING
        assert (found[name] - expected).norm() < 1e-3 * expected.norm(), name


@pytest.mark.parametrize("kind", ["llama", "t5", "bert-mlm", "bert-classifier"])
def test_it_does_not_depend_on_the_size_of_batches(kind, tokens, minilm):
    one, all_at_once = (of_batches(kind, tokens, minilm, size) for size in (1, 8))
    assert one.keys() == all_at_once.keys()
    for name, matrix in one.items():
        assert (matrix - all_at_once[name]).norm() < 1e-3 * matrix.norm(), name


def test_enough_tokens_are_enough(tokens, monkeypatch):
    model = tiny_model("llama")
    batches = [{"input_ids": row[None], "labels": row[None]} for row in tokens]
    monkeypatch.setattr(curvature, "TOKENS", 2 * tokens.shape[1])
    some = curvature_of_outputs(model, find_blocks(model), batches, 0)
    first = curvature_of_outputs(model, find_blocks(model), batches[:2], 0)
    assert all(torch.equal(some[name], first[name]) for name in first)


def test_the_model_is_left_as_it_was(tokens):
    model = tiny_model("llama")
    model.lm_head.weight.requires_grad_(False)
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    curvature_of_outputs(model, find_blocks(model), [{"input_ids": tokens, "labels": tokens}], 0)
    assert wanted == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in model.modules())


def test_a_regression_has_no_classes_to_draw():
    model = tiny_model("bert-classifier", num_labels=1)
    batch = {"input_ids": torch.ones(2, 8, dtype=torch.long), "labels": torch.zeros(2)}
    with pytest.raises(ModelError, match="no classes"):
        curvature_of_outputs(model, find_blocks(model), [batch], 0)
