"""Recovery: the divergence and its gradients against float64 and plain autograd, and what a user gets of it."""

import math
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_CONFIGS, tiny_model
from sensitivity.test_tdmpq import calibration_for, recipe_for
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cptquant import CPTQuantConfig, pipeline
from hf_cptquant.errors import CalibrationError, ConfigError, ModelError
from hf_cptquant.evaluate import perplexity
from hf_cptquant.grid import dequantize
from hf_cptquant.model_view import view_model
from hf_cptquant.modules import packed_modules
from hf_cptquant.pipeline import prepare, quantize_model
from hf_cptquant.quantize import apply_plan
from hf_cptquant.recovery import CLASSES, Example, _Student, divergence, recover, remember


def rounded(kind):
    """A tiny model whose modules have 3, 4, 16 and 8 bits, and its plan."""
    model = tiny_model(kind)
    undecided = view_model(model).plan("module")
    widths = (3, 4, 16, 8)
    plan = undecided.with_bits({m.unit: widths[index % 4] for index, m in enumerate(undecided.modules)}, 32)
    apply_plan(model, plan)
    return model, plan


def batches_for(kind, tokens, minilm):
    model = tiny_model(kind)
    return calibration_for(model, recipe_for(kind, tokens), minilm).batches


@pytest.mark.parametrize("classes", [8, CLASSES, 3 * CLASSES])
@pytest.mark.parametrize("shape", [(3,), (2, 5)])
def test_divergence_is_that_of_the_distributions_with_the_rest_as_one_class(shape, classes):
    generator = torch.Generator().manual_seed(0)
    original, found = (2 * torch.randn(*shape, classes, generator=generator) for _ in range(2))
    values, indices = original.log_softmax(-1).topk(min(CLASSES, classes), -1)
    value, gradient = divergence(found, Example({}, indices.int(), values))

    logits = found.double().requires_grad_()
    p, q = original.double().softmax(-1), logits.softmax(-1)
    kept = torch.zeros_like(p).scatter(-1, indices, 1.0)
    p, q = ((torch.cat([each * kept, (each * (1 - kept)).sum(-1, keepdim=True)], -1)) for each in (p, q))
    expected = torch.special.xlogy(p, p).sum() - (p * q.clamp(min=1e-300).log()).sum()
    expected.backward()
    assert value == pytest.approx(expected.item() / math.prod(shape), rel=1e-4)
    torch.testing.assert_close(gradient.double(), logits.grad, atol=1e-5, rtol=1e-4)
    if classes <= CLASSES:
        whole = F.kl_div(found.double().log_softmax(-1), original.double().softmax(-1), reduction="sum")
        assert value == pytest.approx(whole.item() / math.prod(shape), rel=1e-4)


@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_gradients_are_those_of_plain_autograd(kind, tokens, minilm):
    """Through dense weights, without checkpoints, by the divergence that torch computes."""
    model, plan = rounded(kind)
    (example,) = remember(tiny_model(kind), batches_for(kind, tokens, minilm)[:1])
    student = _Student(model)
    with student.in_use():
        student.learn(plan, example)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())

    literal = tiny_model(kind)
    factors = {name: torch.ones_like(factor, requires_grad=True) for name, factor in student.factors.items()}
    weights = {}
    for name, factor in factors.items():
        module = model.get_submodule(name)
        if name in packed_modules(model):
            quantized = module.quantized()
            weight = dequantize(quantized.integers, quantized.scale * factor, quantized.zero_point)
            weights[f"{name}.weight"] = weight.t() if kind == "gpt2" else weight
        else:
            weights[f"{name}.weight"] = module.weight.detach() * factor
    norms = {name for name, parameter in literal.named_parameters() if parameter.dim() == 1 and "bias" not in name}
    assert weights.keys() == norms | {f"{module.name}.weight" for module in plan.packed}
    logits = functional_call(literal, weights, (), {**example.batch})["logits"]
    wanted = tiny_model(kind)(**example.batch).logits.detach()
    if wanted.shape[-1] > CLASSES:  # the same coarse distributions
        log_p, log_q = wanted.log_softmax(-1), logits.log_softmax(-1)
        top = log_p.topk(CLASSES, -1).indices
        p, q = log_p.gather(-1, top).exp(), log_q.gather(-1, top).exp()
        p, q = (torch.cat([each, 1 - each.sum(-1, keepdim=True)], -1) for each in (p, q))
        loss = (p * (p.log() - q.log())).sum()
    else:
        loss = F.kl_div(logits.log_softmax(-1), wanted.softmax(-1), reduction="sum")
    loss.backward()
    for name, factor in student.factors.items():
        scale = max(factors[name].grad.abs().max().item(), 1e-6)
        torch.testing.assert_close(factor.grad, factors[name].grad, atol=2e-3 * scale, rtol=1e-3, msg=name)
    assert sum(factor.grad.abs().sum().item() for factor in student.factors.values()) > 0


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_only_scales_and_norms_change_for_the_better_and_the_same_at_every_run(kind, tokens, minilm, monkeypatch):
    monkeypatch.setattr("hf_cptquant.recovery.STEPS", 16)
    batches = batches_for(kind, tokens, minilm)
    examples = remember(tiny_model(kind), batches)
    states, figures = [], []
    for _ in range(2):
        model, plan = rounded(kind)
        before = state_of(model)
        figures.append(recover(model, plan, examples[:-1], examples[-1:], seed=3))
        states.append(state_of(model))
        with torch.no_grad():
            (again,) = [divergence(model(**e.batch).logits, e)[0] for e in examples[-1:]]
        assert figures[-1]["kl_after_recovery"] == pytest.approx(again, rel=1e-3)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, states[0][name])}
    assert any(name.endswith("weight_scale") for name in changed)
    norms = {name for name in changed if not name.endswith("weight_scale")}
    assert norms
    assert all(before[name].dim() == 1 and name.endswith("weight") for name in norms)
    assert figures[0]["kl_after_recovery"] < figures[0]["kl_before_recovery"]
    assert figures[0] == figures[1]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_what_is_worse_is_not_kept(tokens, minilm, monkeypatch):
    """Steps that are far too long leave the model as it was, bit for bit."""
    monkeypatch.setattr("hf_cptquant.recovery.STEPS", 16)
    monkeypatch.setattr("hf_cptquant.recovery.RATE", 10.0)
    examples = remember(tiny_model("llama"), batches_for("llama", tokens, minilm))
    model, plan = rounded("llama")
    before = state_of(model)
    found = recover(model, plan, examples[:-1], examples[-1:], seed=0)
    assert found["kl_after_recovery"] == found["kl_before_recovery"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_too_little_memory_is_said_before_the_first_prediction(tokens, minilm, monkeypatch):
    memory = namedtuple("memory", "available")(100_000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    batches = batches_for("llama", tokens, minilm)
    predictions = sum(batch["input_ids"].numel() for batch in batches)
    with pytest.raises(CalibrationError, match=rf"for {predictions} tokens, up to .* of memory are free; lower"):
        remember(tiny_model("llama"), batches)


def test_a_real_model_comes_nearer_to_the_original(smollm2, texts, tmp_path, monkeypatch):
    """At 3 bits, on text that it has not seen, with the same integers; and what is saved is what was measured."""
    for name in ("STEPS", "JUDGE_EVERY"):
        monkeypatch.setattr(f"hf_cptquant.recovery.{name}", 8)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    windows = tokenizer("\n\n".join(texts[-15:]), return_tensors="pt", verbose=False)["input_ids"][0, :512].view(2, 256)
    plan = view_model(AutoModelForCausalLM.from_pretrained(smollm2)).plan("group")
    plan = plan.with_bits({module.unit: 3 for module in plan.modules}, 64)
    data = {"dataset": texts[:-15], "num_samples": 8, "sequence_length": 64}
    models = {}
    for recovered in (None, "scales"):
        config = CPTQuantConfig(plan=plan, quality="fast", recover=recovered, **data)
        models[recovered] = AutoModelForCausalLM.from_pretrained(smollm2, quantization_config=config)
    found = {recovered: perplexity(model, windows, desc=None) for recovered, model in models.items()}
    assert found["scales"] < found[None]
    for name, module in packed_modules(models[None]).items():
        assert torch.equal(module.quantized().integers, models["scales"].get_submodule(name).quantized().integers)
    record = models["scales"].hf_quantizer.record
    assert record.settings["recover"] == "scales"
    assert record.measured["kl_after_recovery"] < record.measured["kl_before_recovery"]
    models["scales"].save_pretrained(tmp_path / "saved")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert perplexity(reloaded, windows, desc=None) == found["scales"]
    assert "kl" not in str(models[None].hf_quantizer.record.measured)


def test_rounding_is_not_tuned_on_what_recovery_is_judged_by(tokens, monkeypatch):
    """There it would look better than it is, and no step of recovery would be kept."""
    rows = {}

    def watch(name, batches_of):
        original = getattr(pipeline, name)

        def watched(*args):
            rows[name] = {tuple(row) for batch in batches_of(args) for row in batch["input_ids"].tolist()}
            return original(*args)

        monkeypatch.setattr(pipeline, name, watched)

    watch("apply_plan_by_blocks", lambda args: args[2])
    watch("recover", lambda args: [example.batch for example in args[3]])
    recipe = recipe_for("llama", tokens, rounding="signround", iters=1, recover="scales")
    model = tiny_model("llama")
    quantize_model(model, recipe, prepare(model, recipe))
    assert rows["recover"]
    assert not rows["recover"] & rows["apply_plan_by_blocks"]


def test_bad_input(tiny_folder, tokens, tmp_path):
    with pytest.raises(ConfigError, match=r"recover='norms' is not one of None, 'scales'"):
        CPTQuantConfig(recover="norms")
    folder = tiny_folder("llama")
    settings = {"quality": "fast", "recover": "scales", "group_size": 32, "sequence_length": 32}
    with pytest.raises(CalibrationError, match="only one sequence; raise num_samples"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=CPTQuantConfig(dataset=tokens[:1], **settings))
    with pytest.raises(CalibrationError, match="only one sequence"):  # of text that it would write itself
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=CPTQuantConfig(num_samples=1, **settings))
    regression = tiny_model("bert-classifier", num_labels=1)
    batch = {"input_ids": tokens[:2], "labels": torch.zeros(2)}
    with pytest.raises(ModelError, match=r"predicts \(2, 1\), no classes that recover='scales' could learn from"):
        remember(regression, [batch])
    device_map = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map={**device_map, "model.rotary_emb": "cpu"}, offload_folder=tmp_path / "offload"
    )
    recipe = CPTQuantConfig(dataset=tokens, **settings).recipe()
    with pytest.raises(ModelError, match=r"q_proj is offloaded, .* use quality='fast' without recover"):
        quantize_model(offloaded, recipe, prepare(offloaded, recipe))
    assert not packed_modules(offloaded)
