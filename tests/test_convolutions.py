"""Convolutions in blocks: packed, scored, rounded to nearest, saved and reloaded."""

import copy
import json
import pickle

import pytest
import torch
from conftest import SMALL_SETTINGS
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    ConvBertConfig,
    ConvBertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_cptquant import CPTQuantConfig, measure_sensitivity
from hf_cptquant.errors import ModelError
from hf_cptquant.model_view import view_model
from hf_cptquant.modules import QuantConv1d, QuantConv2d, packed_modules
from hf_cptquant.plan import LayerScheme
from hf_cptquant.quantize import apply_plan, dequantize_model
from hf_cptquant.rounding import round_nearest
from hf_cptquant.sensitivity.taylor import gradient_of_matrix

SETTINGS = {"stride": 2, "padding": 1, "dilation": 2, "groups": 4}
POINTWISE = "convbert.encoder.layer.{}.attention.self.key_conv_attn_layer.pointwise"


def nearest(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """A weight rounded to nearest per output channel, without zero points, in float64."""
    exact = weight.detach().double().flatten(1)
    largest = exact.gather(1, exact.abs().argmax(1, keepdim=True))
    scale = (-largest / 2 ** (bits - 1)).to(weight.dtype).double()
    integers = (exact / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (integers * scale).to(weight.dtype).view_as(weight)


def convbert(folder) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "embedding_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = ConvBertConfig(**shape, num_attention_heads=4, vocab_size=512, max_position_embeddings=64, num_labels=3)
    model = ConvBertForSequenceClassification(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)


def resnet() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=4)).eval()


@pytest.mark.parametrize("settings", [SETTINGS, {"padding": "same", "dilation": 2}])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dense_class", "packed_class"), [(nn.Conv1d, QuantConv1d), (nn.Conv2d, QuantConv2d)])
@torch.no_grad()
def test_a_packed_convolution_is_the_dense_one_with_rounded_weights(dense_class, packed_class, bias, settings):
    torch.manual_seed(0)
    dense = dense_class(16, 24, 3, bias=bias, **settings)
    x = torch.randn(2, 16, *(20,) * (dense.weight.dim() - 2))
    found = round_nearest(dense.weight.flatten(1), LayerScheme(4))
    packed = packed_class.from_quantized(found, dense.bias).like(dense)
    assert isinstance(packed, dense_class)
    assert not list(packed.parameters())
    assert (packed.in_features, packed.weight_packed.shape) == (
        dense.weight[0].numel(),
        (24, -(-packed.in_features // 8)),
    )
    expected = copy.deepcopy(dense)
    expected.weight.copy_(nearest(dense.weight, 4))
    assert torch.equal(packed.weight, expected.weight)
    read = packed_class(packed.in_features, 24, LayerScheme(4), bias).like(dense)
    read.load_state_dict(packed.state_dict())
    compiled = torch.compile(packed, fullgraph=True, backend="eager")
    same = [packed, read, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed.dense(), compiled]
    for module in same:
        assert torch.equal(module(x), expected(x))
    assert str(packed.dense()) == str(dense)
    assert copy.deepcopy(packed).to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_gradients_reach_the_inputs():
    dense = nn.Conv2d(8, 8, 3)
    packed = QuantConv2d.from_quantized(round_nearest(dense.weight.detach().flatten(1), LayerScheme(8)), None).like(
        dense
    )
    x = torch.randn(1, 8, 5, 5, requires_grad=True)
    packed(x).sum().backward()
    expected = torch.nn.functional.conv_transpose2d(torch.ones(1, 8, 3, 3), packed.weight)
    torch.testing.assert_close(x.grad, expected)


@torch.no_grad()
def test_a_residual_network_is_packed_and_made_dense_again():
    model, images = resnet(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    view = view_model(model)
    assert {module.name for module in view.modules} == {
        name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and ".stages." in name
    }
    assert [module.reason for module in view.left if "embedder" in module.name] == ["outside the blocks"]
    plan = view.plan("module")
    plan = plan.with_bits({module.unit: (4, 8)[index % 2] for index, module in enumerate(plan.modules)}, -1)
    reference = copy.deepcopy(model)
    for module in plan.modules:
        weight = reference.get_submodule(module.name).weight
        weight.copy_(nearest(weight, module.scheme.bits))
    apply_plan(model, plan)
    assert {type(module) for module in packed_modules(model).values()} == {QuantConv2d}
    expected = reference(images).logits
    assert torch.equal(model(images).logits, expected)
    assert not torch.equal(resnet()(images).logits, expected)
    held = sum(tensor.nbytes for tensor in model.state_dict().values()) - 16 * len(plan.packed)
    assert held == plan.nbytes
    dequantize_model(model)
    assert type(model.get_submodule(plan.modules[0].name)) is nn.Conv2d
    assert torch.equal(model(images).logits, expected)


def test_depthwise_and_oddly_padded_convolutions_are_left_alone():
    config = ConvNextConfig(hidden_sizes=[16, 32, 32, 32], depths=[1, 1, 1, 1], image_size=32)
    view = view_model(ConvNextForImageClassification(config))
    left = {module.name.rpartition(".")[2] for module in view.left if module.reason == "a depthwise convolution"}
    assert left == {"dwconv"}
    assert {module.kind for module in view.modules} == {"Linear", "Conv2d"}
    small = MambaConfig(hidden_size=64, num_hidden_layers=2, state_size=8, vocab_size=512)
    assert {module.kind for module in view_model(MambaForCausalLM(small)).modules} == {"Linear"}
    model = resnet()
    padded = (name for name, module in model.named_modules() if getattr(module, "padding", None) == (1, 1))
    name = next(name for name in padded if ".stages." in name)
    model.get_submodule(name).padding_mode = "circular"
    (odd,) = (module for module in view_model(model).left if module.name == name)
    assert odd.reason == "Conv2d with padding=(1, 1) of circular is not supported"
    parent, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    for kernel, supported in ((3, True), (4, False)):  # more zeros on one side than on the other
        setattr(parent, leaf, nn.Conv2d(32, 32, kernel, padding="same"))
        assert (name in {module.name for module in view_model(model).modules}) == supported


@pytest.mark.parametrize("padding", [1, "same", "valid"])
@pytest.mark.parametrize("dense_class", [nn.Conv1d, nn.Conv2d])
def test_the_gradient_of_the_matrix_is_that_of_autograd(dense_class, padding):
    torch.manual_seed(0)
    layer = dense_class(16, 24, 3, **{**SETTINGS, "padding": padding, "stride": 1 if padding == "same" else 2})
    x = torch.randn(3, 16, *(20,) * (layer.weight.dim() - 2))
    outputs = layer(x)
    delta = torch.randn_like(outputs)
    outputs.backward(delta)
    torch.testing.assert_close(gradient_of_matrix(layer, x, delta), layer.weight.grad.flatten(1))


@pytest.mark.parametrize("method", [{"estimator": "taylor"}, {"estimator": "perturbation"}, {"method": "pmpq"}])
def test_they_are_scored(method, tokens, tmp_path):
    convbert(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    table = measure_sensitivity(model, CPTQuantConfig(**SMALL_SETTINGS, **method, dataset=tokens, bits=(3,)))
    assert all(table.raw[POINTWISE.format(block)] != 0 for block in (0, 1))
    assert all(0 < table.errors[POINTWISE.format(block)][3] < 1 for block in (0, 1))


def test_outputs_that_are_no_rows_of_tokens_cannot_be_correlated(tokens, tmp_path):
    convbert(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"pointwise gives .*, not one row for each token; use a coarser granularity"):
        measure_sensitivity(model, CPTQuantConfig(**SMALL_SETTINGS, method="cmpq", dataset=tokens))


@pytest.mark.parametrize("settings", [{"quality": "balanced", "iters": 1}, {"quality": "fast", "recover": "scales"}])
@torch.no_grad()
def test_quantized_saved_and_reloaded(settings, tokens, tmp_path, logged):
    convbert(tmp_path / "dense")
    config = CPTQuantConfig(**{**SMALL_SETTINGS, **settings}, dataset=tokens, bits=(4,))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense", quantization_config=config)
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    name, told = POINTWISE.format(0), "2 convolutions are rounded to nearest: rounding='signround' is for linear layers"
    assert (told in logged.text) == ("iters" in settings)
    packed = model.get_submodule(name)
    integers = round_nearest(dense.get_submodule(name).weight.flatten(1), LayerScheme(4, 32)).integers
    assert torch.equal(packed.quantized().integers, integers)
    model.save_pretrained(tmp_path / "packed")
    assert "cannot load packed Conv1d layers" in logged.text
    section = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "cptquant"
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    assert type(again.get_submodule(name)) is QuantConv1d
    logits = model(tokens).logits
    assert torch.equal(again(tokens).logits, logits)
    torch.testing.assert_close(again.dequantize()(tokens).logits, logits)
