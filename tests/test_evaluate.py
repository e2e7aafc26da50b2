"""Figures of models on windows, each against a float64 computation from transformers' own logits."""

import datasets
import evaluate
import numpy as np
import pytest
import torch
from conftest import tiny_model
from transformers import AutoTokenizer

from hf_cptquant import CPTQuantConfig, evaluate_model
from hf_cptquant.errors import CalibrationError, EvaluationError, ModelError
from hf_cptquant.evaluate import METRIC_MODULES, evaluation_data, measure_windows
from hf_cptquant.predictions import kept_in_a_file, predictions


def config_for(dataset, **settings) -> CPTQuantConfig:
    return CPTQuantConfig(**{"dataset": dataset, "sequence_length": 32, "batch_size": 3, **settings})


def disturbed(kind: str, **changes):
    """A model that differs from `tiny_model(kind)` as much as a quantized one would."""
    model, generator = tiny_model(kind, **changes), torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.05 * parameter.data.std().nan_to_num() * torch.randn(parameter.shape, generator=generator)
    return model


def by_metric(results):
    return {result.metric: result for result in results}


@torch.no_grad()
def log_probabilities(model, tokens) -> torch.Tensor:
    """Of every next token: float64 `[windows, length − 1, vocabulary]`."""
    return model(tokens).logits[:, :-1].double().log_softmax(-1)


def losses(log, wanted) -> torch.Tensor:
    return -log.gather(-1, wanted[..., None])[..., 0].mean(1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_perplexity(kind, tokens):
    model = tiny_model(kind).train()
    (result,) = evaluate_model(model, config_for(tokens))
    assert model.training
    expected = losses(log_probabilities(model.eval(), tokens), tokens[:, 1:])
    assert result.value == pytest.approx(expected.mean().exp().item(), rel=1e-5)
    assert result.low < result.value < result.high
    assert (result.metric, result.dataset, result.against, result.base) == ("perplexity", "token tensors", None, None)
    assert (result.windows, result.sequence_length, result.tokens) == (8, 32, 8 * 31)


@torch.no_grad()
def test_perplexity_of_an_encoder_decoder(tokens):
    model = tiny_model("t5")
    (result,) = evaluate_model(model, config_for(tokens))
    source, target = tokens[:, :16].contiguous(), tokens[:, 16:].contiguous()
    log = model(input_ids=source, labels=target).logits.double().log_softmax(-1)
    assert result.value == pytest.approx(losses(log, target).mean().exp().item(), rel=1e-5)
    assert (result.sequence_length, result.tokens) == (16, 8 * 16)


@torch.no_grad()
def naive_pseudo_log_probabilities(model, tokenizer, row) -> torch.Tensor:
    """One token masked at a time, one sequence at a time: float64 `[length, vocabulary]`."""
    ids = torch.tensor([tokenizer.cls_token_id, *row.tolist(), tokenizer.sep_token_id])
    found = []
    for position in range(1, len(ids) - 1):
        masked = ids.clone()
        masked[position] = tokenizer.mask_token_id
        found.append(model(masked[None]).logits[0, position].double().log_softmax(-1))
    return torch.stack(found)


@torch.no_grad()
def test_pseudo_perplexity_and_divergence_of_a_masked_language_model(minilm):
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    rows = torch.randint(1000, 20000, (4, 9), generator=torch.Generator().manual_seed(0))
    original, model = tiny_model("bert-mlm"), disturbed("bert-mlm")
    found = by_metric(evaluate_model(model, config_for(rows, tokenizer=tokenizer), original))
    log_q, log_p = (
        torch.stack([naive_pseudo_log_probabilities(each, tokenizer, row) for row in rows])
        for each in (model, original)
    )
    assert found["pseudo_perplexity"].value == pytest.approx(losses(log_q, rows).mean().exp().item(), rel=1e-5)
    assert found["pseudo_perplexity"].base == pytest.approx(losses(log_p, rows).mean().exp().item(), rel=1e-5)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert found["kl_divergence"].value == pytest.approx(divergence, abs=1e-6)  # float32
    assert (found["kl_divergence"].sequence_length, found["kl_divergence"].tokens) == (11, 36)


@torch.no_grad()
def test_divergence_and_agreement(tokens):
    original, model = tiny_model("llama"), disturbed("llama")
    results = evaluate_model(model, config_for(tokens), original)
    found = by_metric(results)
    log_p, log_q = log_probabilities(original, tokens), log_probabilities(model, tokens)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean(1)
    base, own = losses(log_p, tokens[:, 1:]), losses(log_q, tokens[:, 1:])
    assert found["kl_divergence"].value == pytest.approx(divergence.mean().item(), rel=1e-5)
    assert found["top1_agreement"].value == pytest.approx(agreement.mean().item(), rel=1e-12)
    assert 0.1 < agreement.mean() < 0.99
    assert found["loss_increase"].value == pytest.approx((own - base).mean().item(), rel=1e-3)
    assert found["perplexity"].base == pytest.approx(base.mean().exp().item(), rel=1e-5)
    assert found["perplexity"].base_low < found["perplexity"].base < found["perplexity"].base_high
    assert {result.against for result in results} == {"LlamaForCausalLM"}
    one_by_one = by_metric(evaluate_model(model, config_for(tokens, batch_size=1), original))
    for metric, result in found.items():  # the interval is over windows, however they are batched
        for name in ("value", "low", "high"):
            assert getattr(one_by_one[metric], name) == pytest.approx(getattr(result, name), rel=1e-4)


def test_a_model_is_equal_to_itself(tokens):
    found = by_metric(evaluate_model(tiny_model("llama"), config_for(tokens), tiny_model("llama")))
    values = {metric: result.value for metric, result in found.items() if metric != "perplexity"}
    assert values == {"kl_divergence": 0.0, "top1_agreement": 1.0, "loss_increase": 0.0}


@torch.no_grad()
def test_impossible_classes_do_not_make_the_divergence_infinite(tokens):
    """Models pad their vocabulary and give the padding −∞."""
    pair = tiny_model("llama"), disturbed("llama")
    data = evaluation_data(pair[0], config_for(tokens).recipe(), compared=True)

    def padded(model):
        for logits in predictions(model, data.batches):
            logits[..., 500:] = -torch.inf
            yield logits

    labels = [{**batch, "labels": batch["labels"].clamp(max=499)} for batch in data.batches]
    figures = measure_windows(pair[1], labels, padded(pair[0]))
    log_p, log_q = (log_probabilities(model, tokens) for model in pair)
    p = log_p[..., :500].log_softmax(-1)
    expected = (p.exp() * (p - log_q[..., :500])).sum(-1).mean(1)
    np.testing.assert_allclose(figures["kl_divergence"], expected, rtol=1e-4)


@pytest.fixture
def labelled(texts) -> datasets.Dataset:
    lines = [line for line in "\n".join(texts[:8]).splitlines() if len(line.split()) > 3][:21]
    return datasets.Dataset.from_dict({"text": lines, "label": [index % 3 for index in range(21)]})


def test_accuracy_is_that_of_evaluates_own_evaluator(labelled, minilm):
    model, tokenizer = tiny_model("bert-classifier", num_labels=3), AutoTokenizer.from_pretrained(minilm)
    config = config_for(labelled, tokenizer=tokenizer, label_column="label")
    (result,) = evaluate_model(model, config)
    reference = evaluate.evaluator("text-classification").compute(
        model_or_pipeline=model,
        tokenizer=tokenizer,
        data=labelled,
        metric=str(METRIC_MODULES / "accuracy"),
        label_mapping=model.config.label2id,
    )
    assert (result.metric, result.windows, result.tokens) == ("accuracy", 21, 21)
    assert result.value == pytest.approx(reference["accuracy"], rel=1e-12)
    assert 0 < result.low < result.value < result.high < 1
    against = by_metric(evaluate_model(model, config, tiny_model("bert-classifier", num_labels=3)))
    assert against["accuracy"].base == result.value
    assert against["kl_divergence"].value == 0.0


def test_a_classifier_can_be_compared_without_labels(labelled, minilm):
    config = config_for(labelled["text"][:], tokenizer=str(minilm))
    pair = disturbed("bert-classifier", num_labels=3), tiny_model("bert-classifier", num_labels=3)
    found = by_metric(evaluate_model(pair[0], config, pair[1]))
    assert found.keys() == {"kl_divergence", "top1_agreement"}
    assert found["kl_divergence"].value > 0


@pytest.mark.parametrize(("kind", "metric"), [("llama", "perplexity"), ("bert-mlm", "pseudo_perplexity")])
def test_modules_of_evaluate_need_no_network(kind, metric, texts, minilm):
    changes = {"vocab_size": 30522} if kind == "llama" else {}
    model, data = tiny_model(kind, **changes), {"predictions": texts[:2], "tokenizer": str(minilm)}
    settings = {"num_samples": 4, "sequence_length": 12, "seed": 5}
    found = evaluate.load(str(METRIC_MODULES / metric)).compute(model=model, **data, **settings)
    (result,) = evaluate_model(model, CPTQuantConfig(dataset=texts[:2], tokenizer=str(minilm), **settings))
    assert found == {
        metric: result.value, "low": result.low, "high": result.high, "windows": 4, "tokens": result.tokens,
    }  # fmt: skip
    other = {"perplexity": "pseudo_perplexity", "pseudo_perplexity": "perplexity"}[metric]
    with pytest.raises(EvaluationError, match=rf"{other} is not for .*; models of this kind have {metric}"):
        evaluate.load(str(METRIC_MODULES / other)).compute(model=model, **data)


# Predictions that wait in a file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predictions_from_a_file_give_the_same_figures(dtype, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    original, model = tiny_model("llama").to(dtype), disturbed("llama").to(dtype)
    batches = evaluation_data(model, config_for(tokens).recipe(), compared=True).batches
    expected = measure_windows(model, batches, predictions(original, batches))
    exactly = 8 * 31 * 512 * dtype.itemsize
    with kept_in_a_file(predictions(original, batches), exactly) as kept:
        found = measure_windows(model, batches, kept)
    assert found.keys() == expected.keys() == {
        "loss", "base_loss", "accuracy", "base_accuracy", "kl_divergence", "top1_agreement",
    }  # fmt: skip
    for name, of_windows in expected.items():
        assert of_windows.shape == (8,)
        np.testing.assert_array_equal(found[name], of_windows)
    assert list(tmp_path.iterdir()) == []


def test_nothing_stays_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def broken():
        yield torch.ones(2, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), kept_in_a_file(broken(), 24):
        pytest.fail("the stream broke before")
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_told_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ran = []
    stream = (ran.append(each) for each in [torch.ones(1)])
    with pytest.raises(EvaluationError, match=r"need 1000000.0 GB in .* set TMPDIR"), kept_in_a_file(stream, 10**15):
        pytest.fail("there is not so much room")
    assert ran == []


# What cannot be measured


def test_an_original_of_another_kind_is_refused(tokens, minilm):
    model = tiny_model("llama")
    for other, message in (
        (tiny_model("llama", vocab_size=600), "the vocabulary is 600 there and 512 here"),
        (tiny_model("bert-mlm", vocab_size=512), "the task is masked-lm there and causal-lm here"),
    ):
        with pytest.raises(EvaluationError, match=message):
            evaluate_model(model, config_for(tokens), other)
    pair = (tiny_model("bert-classifier", num_labels=number) for number in (2, 3))
    with pytest.raises(EvaluationError, match="the number of classes is 3 there and 2 here"):
        evaluate_model(next(pair), config_for(["text"], tokenizer=str(minilm)), next(pair))


def test_models_and_data_that_give_no_figure_are_refused(tokens, minilm, texts):
    with pytest.raises(EvaluationError, match="LlamaModel has none of the heads that are evaluated: causal-lm"):
        evaluate_model(tiny_model("llama").model, config_for(tokens))
    with pytest.raises(EvaluationError, match="predicts no single class"):
        evaluate_model(tiny_model("bert-classifier", num_labels=1), config_for(texts[:1], tokenizer=str(minilm)))
    with pytest.raises(EvaluationError, match="1 texts has no labels, which accuracy needs; set label_column"):
        evaluate_model(tiny_model("bert-classifier"), config_for(texts[:1], tokenizer=str(minilm)))
    for nothing in (None, "self"):
        with pytest.raises(CalibrationError, match="no text to evaluate on: pass dataset="):
            evaluate_model(tiny_model("llama"), config_for(nothing))
    with pytest.raises(CalibrationError, match="the data hold 10 tokens, not even one sequence of 32"):
        evaluate_model(tiny_model("llama"), config_for([tokens[0, :10]]))


def test_what_is_not_finite_is_told(tokens):
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"the loss is nan: model.layers.1.mlp.down_proj.weight holds NaN"):
        evaluate_model(model, config_for(tokens))
    with pytest.raises(EvaluationError, match="the original predicts NaN on these data"):
        evaluate_model(tiny_model("llama"), config_for(tokens), model)


@pytest.mark.parametrize(("name", "split"), [("wikitext2", "test"), ("imdb", "test"), ("c4", "validation")])
def test_datasets_from_the_hub_give_their_text_for_tests(name, split, texts, minilm, monkeypatch):
    splits = []

    def load_dataset(*_, **options):
        splits.append(options["split"])
        return datasets.Dataset.from_dict({"text": texts[:3]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    model = tiny_model("llama", vocab_size=30522)
    (result,) = evaluate_model(model, config_for(name, tokenizer=str(minilm), num_samples=2))
    assert splits == [split]
    assert (result.dataset, result.split) == (name, split)
