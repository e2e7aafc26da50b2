"""The curvature of the loss by the outputs of blocks and layers, against plain automatic differentiation in float64."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from sensitivity.test_tdmpq import calibration_for, recipe_for

from hf_cptquant.errors import ModelError
from hf_cptquant.model_view import find_blocks, view_model
from hf_cptquant.rounding import curvature
from hf_cptquant.rounding.curvature import curvature_of, curvatures_of_layers, gradients_of_outputs, with_plain_squares
from hf_cptquant.sensitivity.metrics import forward
from hf_cptquant.sensitivity.taylor import uniform_numbers


def of_batches(kind, tokens, minilm, size):
    model = tiny_model(kind)
    batches = calibration_for(model, recipe_for(kind, tokens, batch_size=size), minilm).batches
    return gradients_of_outputs(model, find_blocks(model), batches, 3)


def second_moment(gradient):
    rows = gradient.flatten(0, -2)
    return rows.t() @ rows / len(rows)


def test_it_is_the_second_moment_of_gradients_under_drawn_labels(tokens):
    """Of blocks, and of the layers in them by a backward pass through each block alone."""
    model = tiny_model("llama").double()
    blocks = find_blocks(model)
    layers = [module.name for module in view_model(model).modules]
    seen = {}
    for name in (*blocks, *layers):
        model.get_submodule(name).register_forward_hook(lambda *call, name=name: seen.update({name: call[2]}))
    logits = model(tokens, use_cache=False).logits[:, :-1]
    # inverse transform sampling, written out
    uniform = uniform_numbers(tokens, 3, range(len(tokens)))[:, :-1]
    cumulative = logits.detach().softmax(-1).cumsum(-1)
    drawn = (cumulative <= uniform.unsqueeze(-1) * cumulative[..., -1:]).sum(-1)
    loss = F.cross_entropy(logits.flatten(0, 1), drawn.flatten(), reduction="sum") / (tokens.shape[1] - 1)
    wanted = dict(zip(seen, torch.autograd.grad(loss, list(seen.values())), strict=True))

    model = tiny_model("llama").requires_grad_(False)
    batch = {"input_ids": tokens, "labels": tokens}
    found = gradients_of_outputs(model, blocks, [batch], 3)
    assert sorted(found) == sorted(blocks)
    for name in blocks:
        expected = second_moment(wanted[name])
        assert (curvature_of(found[name]) - expected).norm() < 1e-3 * expected.norm(), name
        block, calls = model.get_submodule(name), []
        hook = block.register_forward_pre_hook(lambda *call, calls=calls: calls.append(call[1:]), with_kwargs=True)
        forward(model, batch)
        hook.remove()
        inside = [layer.removeprefix(name + ".") for layer in layers if layer.startswith(name + ".")]
        for layer, of_layer in curvatures_of_layers(block, inside, calls, found[name]).items():
            expected = second_moment(wanted[f"{name}.{layer}"])
            of_layer = of_layer / of_layer.trace() * expected.trace()  # up to a factor
            assert (of_layer - expected).norm() < 1e-3 * expected.norm(), layer
            inside.remove(layer)
        assert not inside
        assert not any(module._forward_hooks for module in block.modules())


@pytest.mark.parametrize("kind", ["llama", "t5", "bert-mlm", "bert-classifier"])
def test_it_does_not_depend_on_the_size_of_batches(kind, tokens, minilm):
    one, all_at_once = (of_batches(kind, tokens, minilm, size) for size in (1, 8))
    assert one.keys() == all_at_once.keys()
    for name, gradients in one.items():
        several, whole = curvature_of(gradients), curvature_of(all_at_once[name])
        assert (several - whole).norm() < 1e-3 * whole.norm(), name


def test_plain_squares_are_mixed_in_equally():
    mixed = with_plain_squares(torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
    assert mixed.tolist() == [[5.0, 1.0], [1.0, 3.0]]


def test_layers_that_the_output_does_not_depend_on_are_left_out():
    class Idle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4).requires_grad_(False)

        def forward(self, inputs):
            self.layer(inputs)
            return inputs

    inputs = torch.ones(1, 3, 4)
    assert curvatures_of_layers(Idle(), ["layer"], [((inputs,), {})], [inputs]) == {}


def test_enough_tokens_are_enough(tokens, monkeypatch):
    model = tiny_model("llama")
    batches = [{"input_ids": row[None], "labels": row[None]} for row in tokens]
    monkeypatch.setattr(curvature, "TOKENS", 2 * tokens.shape[1])
    some = gradients_of_outputs(model, find_blocks(model), batches, 0)
    first = gradients_of_outputs(model, find_blocks(model), batches[:2], 0)
    assert all(len(each) == 2 for each in some.values())
    assert all(map(torch.equal, some[name], each) for name, each in first.items())


def test_the_model_is_left_as_it_was(tokens):
    model = tiny_model("llama")
    model.lm_head.weight.requires_grad_(False)
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    gradients_of_outputs(model, find_blocks(model), [{"input_ids": tokens, "labels": tokens}], 0)
    assert wanted == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in model.modules())


def test_a_regression_has_no_classes_to_draw():
    model = tiny_model("bert-classifier", num_labels=1)
    batch = {"input_ids": torch.ones(2, 8, dtype=torch.long), "labels": torch.zeros(2)}
    with pytest.raises(ModelError, match="no classes"):
        gradients_of_outputs(model, find_blocks(model), [batch], 0)
