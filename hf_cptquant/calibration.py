"""Calibration data: whatever the user has → batches of keyword arguments for `model.forward`, labels included.

Three steps, each deterministic under the seed: read documents (or tokens), cut them into equal windows, arrange the
windows for the model's task. Equal windows with equally many labels make the mean over batches independent of the batch
size. Data are never replaced by other data: what cannot be used is an error that says what would work.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .errors import CalibrationError
from .images import image_fields, tokens_of
from .model_view import CLASSIFIERS, HEARING, max_length_of, task_of
from .recipe import HUB_DATASETS, IMAGE_DATASETS, WAYS_WITH_IMAGES, WAYS_WITH_SOUND, WAYS_WITHOUT_NETWORK, Recipe
from .sound import SOUND_INPUTS, sound_fields, tokens_of_sound
from .sources import EVALUATION_SPLITS, POOL, TRAINING_SPLITS, Documents, chosen_labels, draw, read_documents

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it

MASKED_SHARE = 0.15  # of the tokens of a window, as BERT was trained
LOGIT_BYTES = 2**28  # in float32; passes that derive by them hold a few times as much
HELD_OUT_SHARE = 0.25
SMALLEST_VOCABULARY_SHARE = 0.9  # models pad their embeddings, but by little
POSITIONS = 4096  # in a batch of images or sound; see `images.tokens_of`, `sound.tokens_of_sound`


@dataclass(frozen=True)
class ModelFacts:
    """What the data must fit.

    Attributes:
        task: see `model_view.TASKS`.
        vocabulary: rows of the token embedding; 0 for a model that reads images or sound.
        max_length: positions that the model can take, or None if unlimited.
        name_or_path: where its own tokenizer or image processor is.
        classes: outputs of a classifier.
        inputs: what `forward` takes, that which the model is made for first.
    """

    task: str
    vocabulary: int
    max_length: int | None
    name_or_path: str
    classes: int = 0
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class CalibrationSet:
    """Batches and their description.

    Attributes:
        batches: keyword arguments for `model.forward`, on the CPU: `input_ids` and masks `[batch, length]`, or
            `pixel_values` `[batch, channels, height, width]`, or features of sound, in float32.
        description: JSON values: source, sequences, length, tokens, SHA-256 of the tokens; `image_size` of images,
            whose tokens are counted by `images.tokens_of`; of sound `features`, the size of those of a clip, whose
            tokens are counted by `sound.tokens_of_sound`.
    """

    batches: tuple[Mapping[str, Tensor], ...]
    description: Mapping[str, Any]


def facts_of(model: PreTrainedModel) -> ModelFacts:
    """What the data for a model with a task must fit; the weights are not read."""
    task = task_of(model)
    assert task is not None, "the caller has checked that the model computes a loss"
    reads_text = task not in ("image-classification", *HEARING)
    vocabulary = model.get_input_embeddings().num_embeddings if reads_text else 0
    inputs = tuple(dict.fromkeys((model.main_input_name, *inspect.signature(model.forward).parameters)))
    classes = model.config.num_labels if task in CLASSIFIERS else 0
    return ModelFacts(task, vocabulary, max_length_of(model), model.name_or_path, classes, inputs)


def load_calibration(recipe: Recipe, facts: ModelFacts) -> CalibrationSet:
    """Read, tokenize and batch the calibration data of a recipe.

    Raises:
        CalibrationError: no data, too little text, an unreachable dataset, a missing tokenizer or one of another
            vocabulary.
    """
    if recipe.names_no_data:
        reason = "no calibration data" if recipe.dataset is None else "only causal language models write their own text"
        raise _no_data(reason, facts)
    return _load(recipe, facts, TRAINING_SPLITS, MASKED_SHARE)


def load_evaluation(recipe: Recipe, facts: ModelFacts) -> CalibrationSet:
    """The data of a recipe to evaluate a model on: datasets from the Hub give their text for tests.

    For a masked language model every token is masked (special ones are not): `input_ids` tell what a masked position
    looks like, `labels` what stood there.

    Raises:
        CalibrationError: as `load_calibration`.
    """
    if recipe.names_no_data:
        raise _no_data(f"no {'images' if facts.task == 'image-classification' else 'text'} to evaluate on", facts)
    return _load(recipe, facts, EVALUATION_SPLITS, 1.0)


def _no_data(reason: str, facts: ModelFacts) -> CalibrationError:
    if facts.task in HEARING:
        return CalibrationError(f"{reason}: pass dataset=, {WAYS_WITH_SOUND}")
    images = facts.task == "image-classification"
    named = [name for name in HUB_DATASETS if (name in IMAGE_DATASETS) == images]
    return CalibrationError(
        f"{reason}: pass dataset=, one of {', '.join(named)} from the Hub, or without a network"
        f" {WAYS_WITH_IMAGES if images else WAYS_WITHOUT_NETWORK}"
    )


def _load(recipe: Recipe, facts: ModelFacts, splits: Mapping[str, str], masked_share: float) -> CalibrationSet:
    if facts.task == "image-classification":
        fields, source = image_fields(recipe, facts.classes, facts.name_or_path, splits)
        batch_size = max(1, POSITIONS * sequences_in(fields) // tokens_in(fields))
    elif facts.task in HEARING:
        fields, source = sound_fields(recipe, facts.task, facts.inputs, facts.classes)
        batch_size = max(1, POSITIONS * sequences_in(fields) // tokens_in(fields))
    else:
        fields, source = _text_fields(recipe, facts, splits, masked_share)
        _check_ids(fields["input_ids"], facts)
        batch_size = max(1, LOGIT_BYTES // (4 * fields["input_ids"].shape[1] * facts.vocabulary))
    if sequences_in(fields) < recipe.num_samples:
        logger.info(f"The data give {sequences_in(fields)} sequences, fewer than num_samples={recipe.num_samples}.")
    return _calibration_set(fields, source, recipe.batch_size or batch_size)


def _text_fields(
    recipe: Recipe, facts: ModelFacts, splits: Mapping[str, str], masked_share: float
) -> tuple[dict[str, Tensor], str]:
    """Inputs and labels, each `[sequences, …]`, and where the text comes from."""
    length = min(recipe.sequence_length, facts.max_length or recipe.sequence_length)
    if _is_tokens(recipe.dataset):
        if facts.task == "sequence-classification" and recipe.metric == "accuracy":
            raise CalibrationError(
                "metric='accuracy' needs labels, which token tensors don't have; give labelled texts"
            )
        rows = _token_rows(recipe.dataset, length, recipe)
        return _arrange(rows, facts, recipe, masked_share, lambda: load_tokenizer(recipe, facts)), "token tensors"
    tokenizer = load_tokenizer(recipe, facts)
    length = min(length, tokenizer.model_max_length)
    documents = read_documents(recipe, facts.task == "sequence-classification", splits)
    if facts.task == "sequence-classification":
        return _classification_fields(documents, tokenizer, length, recipe, facts), documents.source
    stream = _token_stream(documents.texts, tokenizer, POOL * recipe.num_samples * length)
    rows = _windows(stream, length - _special_tokens(tokenizer, facts.task), recipe)
    return _arrange(rows, facts, recipe, masked_share, lambda: tokenizer), documents.source


def hold_out(calibration: CalibrationSet) -> tuple[CalibrationSet, CalibrationSet]:
    """The first three quarters of the sequences, to measure on, and the rest, to judge by.

    Raises:
        CalibrationError: there is only one sequence.
    """
    sequences, source = calibration.description["sequences"], calibration.description["source"]
    if sequences < 2:
        raise CalibrationError(
            "a part of the calibration data is kept to judge by, and there is only one sequence; raise num_samples, or"
            " shorten sequence_length"
        )
    fields = _joined(calibration.batches)
    kept = sequences - max(1, round(HELD_OUT_SHARE * sequences))
    parts = ({name: tensor[rows] for name, tensor in fields.items()} for rows in (slice(kept), slice(kept, None)))
    size = sequences_in(calibration.batches[0])
    measured, judged = (_calibration_set(part, source, size) for part in parts)
    return measured, judged


def spread_evenly(calibration: CalibrationSet, tokens: int) -> tuple[dict[str, Tensor], ...]:
    """So many sequences that they hold about so many tokens (at least one sequence, at most all), evenly chosen."""
    fields = _joined(calibration.batches)
    sequences = sequences_in(fields)
    count = min(sequences, max(1, round(tokens * sequences / tokens_in(fields))))
    rows = torch.arange(count) * sequences // count
    chosen = {name: tensor[rows] for name, tensor in fields.items()}
    return in_batches([chosen], sequences_in(calibration.batches[0]))


def in_batches(batches: Sequence[Mapping[str, Tensor]], size: int) -> tuple[dict[str, Tensor], ...]:
    """The same sequences in batches of another size."""
    fields = _joined(batches)
    starts = range(0, sequences_in(fields), size)
    return tuple({name: tensor[start : start + size] for name, tensor in fields.items()} for start in starts)


def sequences_in(batch: Mapping[str, Tensor]) -> int:
    """How many sequences of tokens, images or clips a batch has: the size of all its fields."""
    return len(next(iter(batch.values())))


def seen_or_heard(batch: Mapping[str, Tensor]) -> str | None:
    """Name of the images or the sound in a batch; None for one of text."""
    return next((name for name in ("pixel_values", *SOUND_INPUTS) if name in batch), None)


def tokens_in(batch: Mapping[str, Tensor]) -> int:
    """How many tokens a batch has; images and sound count by their size."""
    name = seen_or_heard(batch)
    if name is None:
        return batch["input_ids"].numel()
    return tokens_of(batch[name]) if name == "pixel_values" else tokens_of_sound(batch[name])


def _joined(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _calibration_set(fields: Mapping[str, Tensor], source: str, batch_size: int) -> CalibrationSet:
    sequences, tokens = sequences_in(fields), tokens_in(fields)
    name = seen_or_heard(fields)
    size: dict[str, Any] = {}
    if name == "pixel_values":
        size["image_size"] = list(fields[name].shape[2:])  # empty where a processor has cut patches
    elif name is not None:
        size["features"] = list(fields[name].shape[1:])
    description = {
        "source": source,
        "sequences": sequences,
        **size,
        "sequence_length": tokens // sequences,
        "tokens": tokens,
        "sha256": hashlib.sha256(b"".join(fields[name].numpy().tobytes() for name in sorted(fields))).hexdigest(),
    }
    return CalibrationSet(in_batches([fields], batch_size), description)


def load_tokenizer(recipe: Recipe, facts: ModelFacts) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer (object, name or path), by default the model's own, checked against its vocabulary."""
    return find_tokenizer(facts.name_or_path if recipe.tokenizer is None else recipe.tokenizer, facts.vocabulary)


def find_tokenizer(tokenizer: Any, vocabulary: int, token: str | bool | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer that fits a model.

    Args:
        tokenizer: name, path or object.
        vocabulary: rows of the model's token embedding.
        token: for the Hub; by default that of `hf auth login`.

    Raises:
        CalibrationError: there is none, or it is one for another model (transformers makes an empty tokenizer for a
            model without files of one).
    """
    if isinstance(tokenizer, (str, os.PathLike)):
        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer, token=token)
        except (OSError, ValueError, KeyError) as error:
            raise CalibrationError(
                f"no tokenizer at {os.fspath(tokenizer)!r}: pass tokenizer= (a name, a path or an object), or token"
                f" tensors as dataset="
            ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise CalibrationError(
            f"tokenizer= is {type(tokenizer).__name__}; pass a name, a path or a transformers tokenizer"
        )
    if not SMALLEST_VOCABULARY_SHARE * vocabulary <= len(tokenizer) <= vocabulary:
        raise CalibrationError(
            f"the tokenizer {tokenizer.name_or_path!r} has {len(tokenizer)} tokens and the model {vocabulary}: it"
            " belongs to another model; pass the right one as tokenizer=, or token tensors as dataset="
        )
    return tokenizer


def _is_tokens(dataset: Any) -> bool:
    return isinstance(dataset, Tensor) or (
        isinstance(dataset, (list, tuple)) and len(dataset) > 0 and all(isinstance(item, Tensor) for item in dataset)
    )


def _token_rows(tokens: Any, length: int, recipe: Recipe) -> Tensor:
    """Token tensors → int64 `[sequences, length]`. Rows of a matrix stay windows; a list of vectors is one stream."""
    given = (tokens,) if isinstance(tokens, Tensor) else tuple(tokens)
    if any(item.is_floating_point() or item.dim() not in (1, 2) for item in given):
        shapes = [(tuple(item.shape), str(item.dtype)) for item in given[:3]]
        raise CalibrationError(f"token tensors must be integers of shape [length] or [sequences, length], not {shapes}")
    matrices = [item.long().cpu() for item in given if item.dim() == 2]
    if (
        len(matrices) == len(given)
        and len({item.shape[1] for item in matrices}) == 1
        and matrices[0].shape[1] <= length
    ):
        rows = torch.cat(matrices)
        return rows[draw(len(rows), recipe)]
    return _windows(torch.cat([item.long().cpu().flatten() for item in given]), length, recipe)


def _token_stream(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, enough: int) -> Tensor:
    """Tokens of the documents, one after the other with a blank line between, until there are `enough`."""
    ids: list[int] = []
    with logging.tqdm(total=enough, desc="Tokenizing", unit="token") as bar:
        for text in texts:
            if text.strip():
                piece = tokenizer(text + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
                ids += piece
                bar.update(len(piece))
            if len(ids) >= enough:
                break
    return torch.tensor(ids[:enough], dtype=torch.long)


def _windows(stream: Tensor, length: int, recipe: Recipe) -> Tensor:
    """Non-overlapping windows of a stream, drawn at random under the seed: `[sequences, length]`."""
    if len(stream) < length:
        raise CalibrationError(
            f"the data hold {len(stream)} tokens, not even one sequence of {length}: give more text or set"
            f" sequence_length to at most {len(stream)}"
            if len(stream)
            else "the data hold no text"
        )
    rows = stream[: len(stream) // length * length].view(-1, length)
    return rows[draw(len(rows), recipe)]


def _special_tokens(tokenizer: PreTrainedTokenizerBase, task: str) -> int:
    return 2 if task == "masked-lm" and tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None else 0


def _arrange(
    rows: Tensor,
    facts: ModelFacts,
    recipe: Recipe,
    masked_share: float,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
) -> dict[str, Tensor]:
    """Windows → inputs and labels of the task, each `[sequences, …]`. `tokenizer` is called only if one is needed."""
    if facts.task == "masked-lm":
        return _masked_fields(rows, tokenizer(), recipe, masked_share)
    if facts.task == "seq2seq-lm":  # continue the first half of a window by the second
        source, target = rows.tensor_split(2, dim=1)
        return {
            "input_ids": source.contiguous(),
            "attention_mask": torch.ones_like(source),
            "labels": target.contiguous(),
        }
    fields = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    return {**fields, "labels": rows} if facts.task == "causal-lm" else fields


def _masked_fields(rows: Tensor, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, share: float) -> dict[str, Tensor]:
    """Replace the same number of tokens in every window by the mask token; the labels are what stood there."""
    if tokenizer.mask_token_id is None:
        raise CalibrationError(
            f"the tokenizer {tokenizer.name_or_path!r} has no mask token, which a masked language model needs"
        )
    generator = torch.Generator().manual_seed(recipe.seed)
    count = max(1, round(share * rows.shape[1]))
    positions = torch.rand(rows.shape, generator=generator).argsort(1)[:, :count]
    labels = torch.full_like(rows, -100).scatter(1, positions, rows.gather(1, positions))
    inputs = rows.scatter(1, positions, tokenizer.mask_token_id)
    if _special_tokens(tokenizer, "masked-lm"):
        edge = rows.new_ones(len(rows), 1)
        inputs = torch.cat((edge * tokenizer.cls_token_id, inputs, edge * tokenizer.sep_token_id), 1)
        labels = torch.cat((edge * -100, labels, edge * -100), 1)
    return {"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "labels": labels}


def _classification_fields(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, length: int, recipe: Recipe, facts: ModelFacts
) -> dict[str, Tensor]:
    """One row a text, cut at `length` and padded to the longest."""
    filled = [index for index, text in enumerate(documents.texts) if text.strip()]
    if not filled:
        raise CalibrationError("the data hold no text")
    chosen = [filled[index] for index in draw(len(filled), recipe).tolist()]
    texts = list(documents.texts)
    if tokenizer.pad_token is None:
        raise CalibrationError(
            f"the tokenizer {tokenizer.name_or_path!r} has no padding token; set tokenizer.pad_token"
        )
    encoded = tokenizer(
        [texts[index] for index in chosen], truncation=True, max_length=length, padding=True, return_tensors="pt"
    )
    fields = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
    return {**fields, **chosen_labels(documents, chosen, recipe, facts.classes)}


def _check_ids(input_ids: Tensor, facts: ModelFacts) -> None:
    least, most = int(input_ids.min()), int(input_ids.max())
    if least < 0 or most >= facts.vocabulary:
        raise CalibrationError(
            f"token ids from {least} to {most} do not fit the model's vocabulary of {facts.vocabulary}"
        )


def batches_on(batches: Iterable[Mapping[str, Tensor]], model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """The batches, one at a time, on a model's device, pixel values in its dtype.

    The device of a model whose embeddings are offloaded is `meta`; accelerate then moves its inputs to where they are
    needed.
    """
    place = torch.device("cpu") if model.device.type == "meta" else model.device
    for batch in batches:
        yield {
            name: tensor.to(place, model.dtype if tensor.is_floating_point() else None)
            for name, tensor in batch.items()
        }
