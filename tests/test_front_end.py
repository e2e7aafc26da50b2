"""What leads to the blocks, or from one stack of them to the next, packed where `quantize_front_end` asks for it: patch
embeddings, the stem and the downsampling of a convolutional network, a projector."""

import copy

import pytest
import torch
from conftest import tiny_model
from test_convolutions import nearest
from test_image_text import tiny_llava, with_image
from test_images import SETTINGS
from transformers import (
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from hf_cptquant import CPTQuantConfig, make_plan
from hf_cptquant.errors import ConfigError, ModelError
from hf_cptquant.model_view import find_blocks, front_end
from hf_cptquant.modules import packed_modules

STAGES = [1, 1, 4]


def convnext() -> PreTrainedModel:
    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[16, 32, 64], depths=STAGES, num_stages=3, image_size=32, num_labels=5)
    model = ConvNextForImageClassification(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        elif name.endswith("layer_scale_parameter"):  # 1e-6, so that blocks do nothing
            torch.nn.init.ones_(parameter)
    return model.eval()


FRONT_ENDS = {
    "vit": (lambda: tiny_model("vit"), ["vit.embeddings.patch_embeddings.projection"]),
    "convnext": (
        convnext,
        ["convnext.embeddings.patch_embeddings"]
        + [f"convnext.encoder.stages.{stage}.downsampling_layer.1" for stage in (1, 2)],
    ),
    "llava": (
        tiny_llava,
        ["model.vision_tower.embeddings.patch_embedding"]
        + [f"model.multi_modal_projector.linear_{number}" for number in (1, 2)],
    ),
}


def test_every_stage_of_a_network_has_blocks():
    names = [f"convnext.encoder.stages.{stage}.layers.{layer}" for stage in range(3) for layer in range(STAGES[stage])]
    assert find_blocks(convnext()) == tuple(names)


@pytest.mark.parametrize(("kind", "bits"), [("vit", 8), ("convnext", 4), ("llava", 4)])
@torch.no_grad()
def test_quantized_saved_and_reloaded(kind, bits, tmp_path):
    build, names = FRONT_ENDS[kind]
    original = build()
    original.save_pretrained(tmp_path / "dense")
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, 500, (8, 16), generator=generator)
    given = with_image(text) if kind == "llava" else {"pixel_values": torch.rand(8, 3, 32, 32, generator=generator)}
    data = text if kind == "llava" else given["pixel_values"]
    auto_class = AutoModelForImageTextToText if kind == "llava" else AutoModelForImageClassification
    config = CPTQuantConfig(**{**SETTINGS, "group_size": -1}, dataset=data, sequence_length=16, quantize_front_end=bits)
    model = auto_class.from_pretrained(tmp_path / "dense", quantization_config=config)
    plan = model.hf_quantizer.record.plan
    assert [module.name for module in plan.modules if module.outside] == names == list(front_end(original))
    for name in names:
        assert model.get_submodule(name).scheme.bits == bits
        assert torch.equal(model.get_submodule(name).weight, nearest(original.get_submodule(name).weight, bits))

    expected = copy.deepcopy(original)
    for name in packed_modules(model):
        expected.get_submodule(name).weight.copy_(model.get_submodule(name).weight)
    logits = model(**given).logits
    torch.testing.assert_close(logits, expected(**given).logits, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "packed")
    again = auto_class.from_pretrained(tmp_path / "packed")
    assert packed_modules(again).keys() == packed_modules(model).keys()
    assert torch.equal(again(**given).logits, logits)
    assert again.hf_quantizer.record.plan == plan
    replanned = auto_class.from_pretrained(
        tmp_path / "dense", quantization_config=CPTQuantConfig(plan=tmp_path / "packed", quality="fast")
    )
    assert torch.equal(replanned(**given).logits, logits)
    dense = again.dequantize()
    assert {name: type(dense.get_submodule(name)) for name in names} == {
        name: type(original.get_submodule(name)) for name in names
    }
    torch.testing.assert_close(dense(**given).logits, logits, atol=1e-4, rtol=1e-4)


def test_it_counts_for_the_budget():
    config = CPTQuantConfig(
        **SETTINGS, dataset=torch.rand(8, 3, 32, 32), bits=(3, 4, 8), quantize_front_end=8, target_bits=6
    )
    plan = make_plan(tiny_model("vit"), config).plan
    assert plan.bits_per_weight <= 6 < plan.bits_per_weight + 0.5
    assert plan.inside.bits_per_weight < plan.bits_per_weight


def test_nothing_to_pack_is_said_before_any_work():
    tokens = torch.randint(1, 500, (8, 16))
    with pytest.raises(ModelError, match="no linear layers or convolutions in front of its blocks; leave quantize_fro"):
        make_plan(tiny_model("llama"), CPTQuantConfig(dataset=tokens, quantize_front_end=8))
    config = CPTQuantConfig(
        dataset=torch.rand(8, 3, 32, 32), quantize_front_end=8, modules_to_not_convert=["vit.embeddings"]
    )
    told = r"quantize_front_end=8 finds nothing .* e\.g\. vit\.embeddings\.patch.*: named in modules_to_not_convert"
    with pytest.raises(ConfigError, match=told):
        make_plan(tiny_model("vit"), config)


def test_convolutions_that_cannot_be_packed_are_left_with_a_reason():
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**shape, "num_key_value_heads": 2, "vocab_size": 512}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))
    settings = {"dataset": torch.randint(1, 100, (8, 16)), "quantize_front_end": 8, "group_size": 32}
    plan = make_plan(model, CPTQuantConfig(**{**SETTINGS, **settings})).plan
    outside = {module.name.rpartition("visual.")[2] for module in plan.modules if module.outside}
    assert outside == {"merger.mlp.0", "merger.mlp.2"}
    (patches,) = (module for module in plan.left if module.name == "model.visual.patch_embed.proj")
    assert patches.reason == "Conv3d is not supported"
