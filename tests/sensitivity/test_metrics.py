"""Loss, perplexity and accuracy against hand-written loops; the loss in chunks against transformers' own; labels."""

import math

import datasets
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_CONFIGS, tiny_model
from transformers import AutoTokenizer
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_cptquant.calibration import ModelFacts, load_calibration
from hf_cptquant.errors import CalibrationError
from hf_cptquant.model_view import task_of, view_model
from hf_cptquant.recipe import Recipe
from hf_cptquant.sensitivity import METHODS, metrics
from hf_cptquant.sensitivity.metrics import (
    METRICS,
    batch_accuracy,
    batch_loss,
    chunked_causal_loss,
    forward,
    mean_loss,
)
from hf_cptquant.sensitivity.pmpq import pruned
from sensitivity.test_tdmpq import calibration_for, recipe_for

LEVELS = (0.25, 0.6)


def random_logits(*shape, dtype=torch.float32) -> torch.Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))).to(dtype)


def random_labels(*shape, classes) -> torch.Tensor:
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(1))


def labelled_films(stars=(0, 1, 1, 0)) -> datasets.Dataset:
    texts = ["a good film", "what a bad film, and long", "tea or coffee", "neither of them"] * 2
    return datasets.Dataset.from_dict({"text": texts, "stars": list(stars) * (8 // len(stars))})


def classifier_calibration(model, minilm, dataset, **settings):
    data = {"dataset": dataset, "num_samples": 8, "batch_size": 3, "label_column": "stars"}
    recipe = Recipe(**{"estimator": "perturbation", **data, **settings})
    facts = ModelFacts(task_of(model), model.config.vocab_size, 64, str(minilm), model.config.num_labels)
    return load_calibration(recipe, facts), recipe


# The loss in chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocabulary", "chunk"), [(50, 2**21), (50, 120), (7, 50), (50, 1), (64, 64 * 4)])
@pytest.mark.parametrize("ignored", [False, True])
def test_loss_in_chunks_equals_that_of_transformers(dtype, vocabulary, chunk, ignored, monkeypatch):
    monkeypatch.setattr(metrics, "LOSS_CHUNK", chunk)
    logits = random_logits(3, 11, vocabulary, dtype=dtype)
    labels = random_labels(3, 11, classes=vocabulary)
    if ignored:
        labels[:, :4] = -100
        labels[2, 6:] = -100
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = chunked_causal_loss(ours, labels, vocabulary)
    expected = ForCausalLMLoss(theirs, labels, vocabulary)
    terms = [
        -logits[row, position].double().log_softmax(-1)[labels[row, position + 1]]
        for row in range(3)
        for position in range(10)
        if labels[row, position + 1] != -100
    ]
    assert loss.dtype == expected.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.item() == pytest.approx((sum(terms) / len(terms)).item(), rel=1e-6)
    loss.backward()
    expected.backward()
    assert ours.grad.dtype == dtype
    assert theirs.grad.abs().max() > 1e-3
    precision = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(ours.grad, theirs.grad, rtol=precision, atol=1e-7)


def test_loss_in_chunks_takes_a_chunk_of_logits_at_a_time(monkeypatch):
    monkeypatch.setattr(metrics, "LOSS_CHUNK", 100)
    sizes, original = [], F.cross_entropy

    def watched(logits, *args, **kwargs):
        sizes.append(logits.numel())
        return original(logits, *args, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", watched)
    chunked_causal_loss(random_logits(2, 9, 30), random_labels(2, 9, classes=30), 30)
    assert sum(sizes) == 2 * 9 * 30
    assert max(sizes) <= 100


def test_loss_in_chunks_keeps_no_float32_copy_of_logits():
    logits, kept = random_logits(2, 9, 30, dtype=torch.bfloat16).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss = chunked_causal_loss(logits, random_labels(2, 9, classes=30), 30)
    assert loss.requires_grad
    assert not any(tensor.dtype == torch.float32 and tensor.numel() > 1 for tensor in kept)


@torch.no_grad()
@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_the_loss_of_a_model_is_its_own(kind, tokens, minilm, monkeypatch):
    monkeypatch.setattr(metrics, "LOSS_CHUNK", 3000)
    model = tiny_model(kind)
    batch = dict(calibration_for(model, recipe_for(kind, tokens), minilm).batches[0])
    batch.setdefault("labels", torch.tensor([0, 1, 1]))
    outputs = model(**batch)
    assert batch_loss(model, batch) == pytest.approx(outputs.loss.item(), rel=1e-6)
    assert torch.equal(forward(model, batch).logits, outputs.logits)


def test_only_causal_losses_are_replaced_and_only_for_the_time_being(tokens):
    model = tiny_model("llama")
    batch = {"input_ids": tokens, "labels": tokens}
    used = []
    model.lm_head.register_forward_hook(lambda *_: used.append(model.loss_function))
    batch_loss(model, batch)
    assert used == [chunked_causal_loss]
    assert "_loss_function" not in model.__dict__
    assert model.loss_function is ForCausalLMLoss


def test_a_causal_loss_that_the_user_has_set_is_put_back(tokens):
    model = tiny_model("llama")
    model.loss_function = ForCausalLMLoss
    batch_loss(model, {"input_ids": tokens, "labels": tokens})
    assert model.__dict__["_loss_function"] is ForCausalLMLoss


def test_a_loss_of_the_users_is_used_and_left_alone(tokens):
    model = tiny_model("llama")

    def own(logits, labels, vocab_size, **_):
        return logits.new_tensor(4.25)

    model.loss_function = own
    assert batch_loss(model, {"input_ids": tokens, "labels": tokens}) == 4.25
    assert model.__dict__["_loss_function"] is own


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_loss_is_put_back_after_an_error(error, tokens):
    model = tiny_model("llama")

    def fail(*_args):
        raise error

    model.lm_head.register_forward_hook(fail)
    with pytest.raises(error):
        batch_loss(model, {"input_ids": tokens, "labels": tokens})
    assert "_loss_function" not in model.__dict__


# Accuracy


@torch.no_grad()
def literal_accuracy(model, batch, task) -> float:
    """Correct predictions over labels, one by one (equation 8)."""
    logits = model(**batch).logits
    correct = count = 0
    for row, labels in enumerate(batch["labels"]):
        if task == "sequence-classification":
            count += 1
            correct += int(logits[row].argmax()) == int(labels)
            continue
        for position, label in enumerate(labels.tolist()):
            where = position - 1 if task == "causal-lm" else position
            if label != -100 and where >= 0:
                count += 1
                correct += int(logits[row, where].argmax()) == label
    return correct / count


@torch.no_grad()
def partly_right(model, batch) -> dict[str, torch.Tensor]:
    """Labels of which about half are what the model predicts there, and some of each sequence are not counted."""
    task = task_of(model)
    if task == "seq2seq-lm":  # the predictions depend on the labels before, which the model shifts into its decoder
        labels = batch["labels"].clone()
        for position in range(0, labels.shape[1], 2):
            labels[:, position] = model(**{**batch, "labels": labels}).logits[:, position].argmax(-1)
    else:
        labels = model(**batch).logits.argmax(-1)
        if task == "causal-lm":
            labels = torch.cat((labels[:, :1], labels[:, :-1]), 1)
        labels = torch.where(torch.arange(len(labels.flatten())).view_as(labels) % 2 == 0, labels, 1 - labels % 2)
    if labels.dim() > 1:
        labels = labels.clone()
        labels[:, 3:5] = -100
    return {**batch, "labels": labels}


@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_accuracy_equals_a_count_by_hand(kind, tokens, minilm):
    model = tiny_model(kind)
    recipe = recipe_for(kind, tokens, batch_size=8)
    (given,) = calibration_for(model, recipe, minilm).batches
    batch = partly_right(model, given)
    expected = literal_accuracy(model, batch, task_of(model))
    assert 0.2 < expected < 0.8
    assert batch_accuracy(model, batch) == pytest.approx(expected, abs=1e-12)


def test_accuracy_of_a_causal_model_is_of_the_next_token(tokens):
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda *seen: 100 * F.one_hot(seen[1][0].argmax(-1) * 0 + 9, 512).float())
    ids = tokens.clone()
    ids[:, 0] = 9  # nothing predicts the first token
    ids[:, 1:] = 8
    ids[:2, 5] = 9
    assert batch_accuracy(model, {"input_ids": ids, "labels": ids}) == pytest.approx(2 / (8 * 31))


# Figures of a method


@torch.no_grad()
def literal_figures(model, batches, metric) -> float:
    """The metric over all sequences, one at a time through the whole model."""
    losses, accuracies = [], []
    for batch in batches:
        for index in range(len(batch["input_ids"])):
            sequence = {name: tensor[index : index + 1] for name, tensor in batch.items()}
            losses.append(model(**sequence).loss.item())
            accuracies.append(literal_accuracy(model, sequence, task_of(model)))
    loss = sum(losses) / len(losses)
    return {"loss": loss, "perplexity": math.exp(loss), "accuracy": sum(accuracies) / len(accuracies)}[metric]


@torch.no_grad()
def literal_scores(model, plan, batches, metric) -> tuple[float, dict[str, float]]:
    """Base figure, and how much each unit's pruning makes it worse, by full forward passes."""
    base, sign = literal_figures(model, batches, metric), -1 if metric == "accuracy" else 1
    scores = {}
    for unit in dict.fromkeys(module.unit for module in plan.modules):
        modules = {module.name: model.get_submodule(module.name) for module in plan.modules if module.unit == unit}
        found = []
        for level in LEVELS:
            with pruned(modules, level):
                found.append(sign * (literal_figures(model, batches, metric) - base))
        scores[unit] = sum(found) / len(found)
    return base, scores


def with_right_labels(model, calibration):
    """Calibration data on which the model is about half right, so that its accuracy can fall."""
    batches = tuple(partly_right(model, batch) for batch in calibration.batches)
    return type(calibration)(batches, {**calibration.description, "sha256": "changed"})


@pytest.mark.parametrize("metric", ["loss", "perplexity", "accuracy"])
@pytest.mark.parametrize("kind", ["llama", "bert-mlm", "t5"])
def test_scores_are_changes_for_the_worse(kind, metric, tokens, minilm):
    model = tiny_model(kind)
    recipe = recipe_for(kind, tokens, method="pmpq", metric=metric, sparsity_levels=LEVELS)
    calibration = with_right_labels(model, calibration_for(model, recipe, minilm))
    plan = view_model(model).plan("block")
    table = METHODS["pmpq"](model, plan, calibration, recipe)
    base, expected = literal_scores(model, plan, calibration.batches, metric)
    assert table.metric == metric
    assert table.base == pytest.approx(base, rel=1e-5)
    # a score is the difference of two figures, each as exact as float32 makes it
    assert table.raw == pytest.approx(expected, rel=1e-4, abs=max(1e-5, 1e-6 * base))
    assert max(expected.values()) > 0.01  # pruning harms a model that is half right, in every metric


@pytest.mark.parametrize("metric", ["perplexity", "accuracy"])
def test_noise_is_measured_by_the_same_metrics(metric, tokens, minilm):
    model = tiny_model("llama")
    recipe = recipe_for("llama", tokens, metric=metric)
    calibration = with_right_labels(model, calibration_for(model, recipe, minilm))
    plan = view_model(model).plan("block")
    table = METHODS["tdmpq"](model, plan, calibration, recipe)
    assert table.base == pytest.approx(literal_figures(model, calibration.batches, metric), rel=1e-5)
    assert min(table.raw.values()) > 0


@pytest.mark.parametrize("metric", ["loss", "perplexity", "accuracy"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_ragged_last_batch_counts_by_its_sequences(kind, metric, tokens, minilm):
    model = tiny_model(kind)
    plan = view_model(model).plan("block")
    tables = {}
    for size in (3, 8):
        recipe = recipe_for(kind, tokens, method="pmpq", metric=metric, sparsity_levels=LEVELS, batch_size=8)
        calibration = with_right_labels(model, calibration_for(model, recipe, minilm))
        (batch,) = calibration.batches
        batch["labels"][6:] = batch["input_ids"][6:, : batch["labels"].shape[1]]  # the last two are of another kind
        batch["labels"][6:, 3:5] = -100  # with as many labels as the others
        parts = zip(*(tensor.split(size) for tensor in batch.values()), strict=True)
        batches = tuple(dict(zip(batch, part, strict=True)) for part in parts)
        tables[size] = METHODS["pmpq"](model, plan, type(calibration)(batches, calibration.description), recipe)
        if size == 3:
            figures = [METRICS[metric].of_batch(model, part) for part in batches]
    assert tables[3].base == pytest.approx(tables[8].base, rel=1e-5)
    assert tables[3].raw == pytest.approx(tables[8].raw, rel=1e-4, abs=2e-6 * tables[8].base + 1e-6)
    by_batches = METRICS[metric].of_mean(sum(figures) / len(figures))
    assert abs(by_batches - tables[8].base) > 1e-3  # the mean over batches would be another figure


def test_the_mean_over_batches_would_be_another(tokens):
    model = tiny_model("llama")
    batches = [{"input_ids": tokens[:7], "labels": tokens[:7]}, {"input_ids": tokens[7:], "labels": tokens[7:]}]
    losses = [batch_loss(model, batch) for batch in batches]
    assert abs(losses[0] - losses[1]) > 0.01
    assert mean_loss(model, batches) == pytest.approx((7 * losses[0] + losses[1]) / 8, rel=1e-6)


# Labels


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_a_classifier_is_measured_against_the_labels_of_its_data(metric, minilm):
    model = tiny_model("bert-classifier", num_labels=3)
    tables = {}
    for stars in ((0, 1, 2, 1), (2, 0, 1, 1)):
        calibration, recipe = classifier_calibration(
            model, minilm, labelled_films(stars), method="pmpq", metric=metric, sparsity_levels=LEVELS
        )
        labels = torch.cat([batch["labels"] for batch in calibration.batches])
        assert labels.tolist() == list(stars) * 2
        plan = view_model(model).plan("block")
        tables[stars] = METHODS["pmpq"](model, plan, calibration, recipe)
        base, expected = literal_scores(model, plan, calibration.batches, metric)
        assert tables[stars].base == pytest.approx(base, rel=1e-5)
        assert tables[stars].raw == pytest.approx(expected, rel=1e-4, abs=1e-5)
    first, second = tables.values()
    assert first.base != second.base
    assert first.fingerprint != second.fingerprint


def test_labels_stay_with_their_texts_when_only_some_are_drawn(minilm):
    model = tiny_model("bert-classifier", num_labels=8)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    dataset = datasets.Dataset.from_dict({"text": words, "stars": list(range(8))})
    calibration, _ = classifier_calibration(model, minilm, dataset, num_samples=5, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    rows = [row for batch in calibration.batches for row in zip(batch["input_ids"], batch["labels"], strict=True)]
    assert len(rows) == 5
    for ids, label in rows:
        assert tokenizer.decode(ids, skip_special_tokens=True) == words[label]


# Bad input


@pytest.mark.parametrize("dataset", [["a good film", "a bad one"] * 4, labelled_films(), "films.txt"])
def test_accuracy_of_a_classifier_needs_labels(dataset, minilm, tmp_path):
    if dataset == "films.txt":
        dataset = tmp_path / dataset
        dataset.write_text("a good film\n")
    model = tiny_model("bert-classifier")
    with pytest.raises(CalibrationError, match=r"metric='accuracy' needs labels.*set label_column"):
        classifier_calibration(model, minilm, dataset, metric="accuracy", label_column=None)


def test_accuracy_of_a_classifier_cannot_be_had_from_token_tensors(tokens, minilm):
    model = tiny_model("bert-classifier")
    with pytest.raises(CalibrationError, match="metric='accuracy' needs labels, which token tensors don't have"):
        classifier_calibration(model, minilm, tokens, metric="accuracy", sequence_length=16)


def test_texts_without_labels_are_enough_for_the_loss(minilm):
    model = tiny_model("bert-classifier")
    calibration, _ = classifier_calibration(model, minilm, labelled_films(), label_column=None)
    assert all("labels" not in batch for batch in calibration.batches)


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
@pytest.mark.parametrize("stars", [(0, 7), (-1, 0), ("good", "bad"), (0.5, 1.0), (None, 1)])
def test_labels_that_are_no_classes_are_refused_by_name(stars, metric, minilm):
    wrong = next(label for label in stars if label not in (0, 1) or type(label) is not int)
    with pytest.raises(
        CalibrationError, match=rf"the label {wrong!r} is not one of the model's 2 classes.*label_column"
    ):
        classifier_calibration(tiny_model("bert-classifier"), minilm, labelled_films(stars), metric=metric)


def test_a_label_column_that_is_not_there_is_named(minilm):
    with pytest.raises(CalibrationError, match=r"no label column 'rating'; its columns are \['text', 'stars'\]"):
        classifier_calibration(tiny_model("bert-classifier"), minilm, labelled_films(), label_column="rating")
