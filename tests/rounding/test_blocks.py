"""Rounding block by block: the very calls and targets of a literal walk, and what a user gets of it."""

import copy
import re
from functools import partial

import pytest
import torch
from conftest import TINY_CONFIGS, tiny_model
from sensitivity.test_tdmpq import calibration_for, recipe_for
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cptquant import CPTQuantConfig, pipeline
from hf_cptquant.errors import ModelError
from hf_cptquant.evaluate import perplexity
from hf_cptquant.model_view import view_model
from hf_cptquant.modules import PACKED_CLASSES, packed_modules, replace_module
from hf_cptquant.pipeline import prepare, quantize_model
from hf_cptquant.quantize import apply_plan, apply_plan_by_blocks
from hf_cptquant.recipe import Recipe
from hf_cptquant.rounding import BLOCK_ROUNDINGS, Tuning
from hf_cptquant.rounding.curvature import gradients_of_outputs
from hf_cptquant.sensitivity.metrics import forward
from hf_cptquant.sensitivity.prefix import running_order


def decided(model):
    """Mixed widths, some modules untouched."""
    undecided = view_model(model).plan("module")
    widths = (3, 4, 16, 8)
    return undecided.with_bits({m.unit: widths[index % 4] for index, m in enumerate(undecided.modules)}, 32)


def first(output):
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def literal(model, plan, batches, recipe):
    """Every call by a full forward pass of the model rounded so far, its original and target by one of the original."""
    original = copy.deepcopy(model.requires_grad_(False))
    order = running_order(model, batches[0], list(plan.by_block()))
    gradients = gradients_of_outputs(original, order, batches, recipe.seed)
    for name in order:
        block = model.get_submodule(name)
        calls, originals, targets = [], [], []

        def keep(calls, _, args, kwargs) -> None:
            calls.append((args, kwargs))

        def aim(_, args, output, targets=targets) -> None:
            targets.append(first(output))

        hooks = [
            block.register_forward_pre_hook(partial(keep, calls), with_kwargs=True),
            original.get_submodule(name).register_forward_pre_hook(partial(keep, originals), with_kwargs=True),
            original.get_submodule(name).register_forward_hook(aim),
        ]
        for batch in batches:
            forward(model, batch)  # without a cache, which would grow from call to call
            forward(original, batch)
        for hook in hooks:
            hook.remove()
        schemes = {m.name.removeprefix(name + "."): m.scheme for m in plan.packed if m.block == name}
        tuning = Tuning(model.dtype, recipe.iters, recipe.seed, originals, gradients[name])
        for layer, quantized in BLOCK_ROUNDINGS[recipe.rounding](block, schemes, calls, targets, tuning).items():
            dense = block.get_submodule(layer)
            packed = PACKED_CLASSES[type(dense)].from_quantized(quantized, dense.bias)
            replace_module(model, f"{name}.{layer}", packed)


@pytest.mark.parametrize("kind", TINY_CONFIGS)
@pytest.mark.parametrize("rounding", BLOCK_ROUNDINGS)
def test_blocks_are_rounded_behind_the_rounded_ones(rounding, kind, tokens, minilm):
    recipe = recipe_for(kind, tokens, rounding=rounding, iters=6)
    model, expected = tiny_model(kind), tiny_model(kind)
    plan = decided(model)
    batches = calibration_for(model, recipe, minilm).batches
    apply_plan_by_blocks(model, plan, batches, recipe)
    literal(expected, plan, batches, recipe)
    found, wanted = packed_modules(model), packed_modules(expected)
    assert list(found) == [module.name for module in plan.packed]
    for name, module in found.items():
        assert module.scheme == wanted[name].scheme
        assert torch.equal(module.weight_packed, wanted[name].weight_packed), name
        assert torch.equal(module.weight_scale, wanted[name].weight_scale), name


@pytest.mark.parametrize("rounding", BLOCK_ROUNDINGS)
def test_weights_in_a_file_are_rounded_as_those_in_memory(rounding, tokens, minilm, tmp_path):
    """A packed layer lets go of the pages that its weight had in the file, behind which the next block is rounded."""
    recipe = recipe_for("llama", tokens, rounding=rounding, iters=6)
    in_memory = tiny_model("llama", hidden_size=128, intermediate_size=256)  # layers of many pages
    in_memory.save_pretrained(tmp_path)
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    batches = calibration_for(in_memory, recipe, minilm).batches
    plan = decided(in_memory)
    held = in_memory.state_dict()
    for model in (in_memory, mapped):
        apply_plan_by_blocks(model, plan, batches, recipe)
    before = tiny_model("llama", hidden_size=128, intermediate_size=256).state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in before.items())  # nobody's weights were written to
    for name, module in packed_modules(in_memory).items():
        assert torch.equal(module.weight_packed, mapped.get_submodule(name).weight_packed), name
        assert torch.equal(module.weight_scale, mapped.get_submodule(name).weight_scale), name


@pytest.fixture(scope="module")
def windows(texts, smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return tokenizer("\n\n".join(texts[-15:]), return_tensors="pt", verbose=False)["input_ids"][0, :2048].view(8, 256)


def test_on_a_real_model_they_beat_rounding_to_nearest(smollm2, texts, windows, tmp_path):
    """Every fifth block at 3 bits, on text that they have not seen; and what is saved is what was measured."""
    undecided = view_model(AutoModelForCausalLM.from_pretrained(smollm2)).plan("group")
    rounded = list(undecided.by_block())[::5]
    plan = undecided.with_bits({m.unit: 3 if m.block in rounded else 16 for m in undecided.modules}, 64)
    data = {"dataset": texts[:-15], "num_samples": 16, "sequence_length": 128}
    found = {}
    for rounding in ("nearest", "clipped", "gptq", "signround"):
        config = CPTQuantConfig(plan=plan, rounding=rounding, iters=10, **data)
        model = AutoModelForCausalLM.from_pretrained(smollm2, quantization_config=config)
        assert model.hf_quantizer.record.settings["rounding"] == rounding
        found[rounding] = perplexity(model, windows, desc=None)
    assert found["gptq"] < found["clipped"] < found["nearest"], found
    assert found["signround"] < found["nearest"], found
    model.save_pretrained(tmp_path / "saved")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert perplexity(reloaded, windows, desc=None) == found["signround"]


@pytest.mark.parametrize("rounding", BLOCK_ROUNDINGS)
def test_same_seed_same_bytes_whatever_the_batch_size(rounding, tiny_folder, tokens, tmp_path):
    folder = tiny_folder("llama", torch.bfloat16)
    bytes_of = []
    for size in (1, 3, 8):
        config = CPTQuantConfig(
            bits=(3, 4), group_size=32, rounding=rounding, iters=4, dataset=tokens, sequence_length=32, batch_size=size
        )
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        model.save_pretrained(tmp_path / str(size))
        bytes_of.append((tmp_path / str(size) / "model.safetensors").read_bytes())
    assert bytes_of[0] == bytes_of[1] == bytes_of[2]


def test_a_given_plan_is_rounded_with_the_data(tiny_folder, tokens):
    folder = tiny_folder("llama", torch.bfloat16)
    data = {"dataset": tokens, "sequence_length": 32}
    at_once = CPTQuantConfig(target_bits=5, bits=(3, 4, 8), group_size=32, rounding="gptq", **data)
    first_model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=at_once)
    plan = first_model.hf_quantizer.record.plan
    by_plan = CPTQuantConfig(plan=plan, rounding="gptq", **data)
    second = AutoModelForCausalLM.from_pretrained(folder, quantization_config=by_plan)
    for name, module in packed_modules(first_model).items():
        assert torch.equal(module.weight_packed, second.get_submodule(name).weight_packed)


def test_an_offloaded_model_is_refused(tokens, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    device_map = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    device_map["model.rotary_emb"] = "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "llama", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    plan = view_model(model).plan("block")
    plan = plan.with_bits({module.unit: 4 for module in plan.modules}, 32)
    with pytest.raises(ModelError, match=r"q_proj is offloaded, .* use quality='fast'"):
        apply_plan_by_blocks(model, plan, [{"input_ids": tokens[:2]}], Recipe(rounding="gptq"))
    assert not packed_modules(model)


@pytest.mark.parametrize("rounding", BLOCK_ROUNDINGS)
def test_on_a_cpu_without_bfloat16_the_model_keeps_its_dtype(rounding, tokens, monkeypatch):
    """And comes out better than rounded to nearest, as everywhere."""
    monkeypatch.setattr("hf_cptquant.quantize.working_dtype", lambda *_: torch.float32)
    monkeypatch.setattr("hf_cptquant.arithmetic.working_dtype", lambda *_: torch.float32)
    batches = [{"input_ids": rows, "labels": rows} for rows in tokens.split(4)]
    wanted = tiny_model("llama").bfloat16()(tokens).logits.detach()
    errors = {}
    for chosen in ("nearest", rounding):
        model = tiny_model("llama").bfloat16()
        plan = view_model(model).plan("module")
        plan = plan.with_bits({module.unit: 3 for module in plan.modules}, 32)
        if chosen == "nearest":
            apply_plan(model, plan)
        else:
            apply_plan_by_blocks(model, plan, batches, Recipe(rounding=chosen, iters=20))
        assert {module.weight_scale.dtype for module in packed_modules(model).values()} == {torch.bfloat16}
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        errors[chosen] = (model(tokens).logits.detach() - wanted).float().square().mean().item()
    assert errors[rounding] < errors["nearest"]


def test_few_tokens_and_outputs_that_are_not_finite_are_told(tokens, logged):
    model = tiny_model("llama")
    plan = view_model(model).plan("block")
    plan = plan.with_bits({module.unit: 4 for module in plan.modules}, 32)
    model.model.layers[1].post_attention_layernorm.weight.data[3] = torch.inf
    with pytest.raises(ModelError, match=r"model\.layers\.1: its outputs hold NaN or infinity"):
        apply_plan_by_blocks(model, plan, [{"input_ids": tokens[:1], "labels": tokens[:1]}], Recipe(rounding="gptq"))
    assert re.search("32 calibration tokens are fewer than the 128 inputs of .*down_proj", logged.text)


@pytest.mark.parametrize(("rounding", "chosen"), [("signround", [0, 2, 5]), ("gptq", range(8))])
def test_tuning_carries_no_more_batches_than_it_takes_steps(rounding, chosen, tokens, monkeypatch):
    rounded_on = []
    monkeypatch.setattr(pipeline, "TOKENS_IN_A_STEP", tokens.shape[1])
    monkeypatch.setattr(pipeline, "apply_plan_by_blocks", lambda *args: rounded_on.extend(args[2]))
    settings = {"sequence_length": tokens.shape[1], "rounding": rounding, "iters": 3}
    model, recipe = tiny_model("llama"), recipe_for("llama", tokens, **settings)
    preparation = prepare(model, recipe)
    quantize_model(model, recipe, preparation)
    sequences = torch.cat([batch["input_ids"] for batch in preparation.data.batches])
    assert len(sequences) == len(tokens)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in rounded_on]), sequences[list(chosen)])


def test_a_plan_of_16_bits_changes_nothing(tokens):
    model = tiny_model("llama")
    apply_plan_by_blocks(model, view_model(model).plan("block"), [{"input_ids": tokens}], Recipe(rounding="signround"))
    assert not packed_modules(model)


@pytest.mark.parametrize("rounding", ["gptq", "signround"])
def test_a_regression_has_no_labels_to_draw_and_counts_plain_squares(rounding, tokens):
    model = tiny_model("bert-classifier", num_labels=1)
    undecided = view_model(model).plan("block")
    plan = undecided.with_bits({module.unit: 4 for module in undecided.modules}, 32)
    apply_plan_by_blocks(model, plan, [{"input_ids": tokens}], Recipe(rounding=rounding, iters=2))
    assert list(packed_modules(model)) == [module.name for module in plan.packed]
