"""The model card that is written beside a quantized model: (record, what is known of the model) → `README.md`.

Every figure comes from the record of the run; what was not measured is said not to have been. Our part stands between
two markers, so that it can be made anew without touching what somebody has written around it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from .base_card import INHERITED
from .bitmap import cell_text
from .config import CPTQuantConfig
from .errors import CheckpointError
from .plan import EMBEDDING, PLAN_PICTURE, SENSITIVITY_PICTURE
from .recipe import HUB_IDS, Recipe
from .record import QuantizationRecord
from .results import LABELS, EvaluationResult, tabulate

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
BEGIN, END = "<!-- hf-cptquant: begin -->", "<!-- hf-cptquant: end -->"
NAMED = (
    re.compile("^(# ).*$", re.MULTILINE),
    re.compile(r'(from_pretrained\(")[^"]*'),
    re.compile("^([$] vllm serve ).*$", re.MULTILINE),
)
VLLM_TAG = re.compile(r"^\s*- vllm\n", re.MULTILINE)
OUR_PART = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
GENERIC_DESCRIPTION = (  # of `transformers.utils.hub.create_and_tag_model_card`
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been"
    " automatically generated."
)
PIPELINE_TAGS = {
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "sequence-classification": "text-classification",
    "seq2seq-lm": "text2text-generation",
    "image-classification": "image-classification",
    "speech-seq2seq": "automatic-speech-recognition",
    "ctc": "automatic-speech-recognition",
    "audio-classification": "audio-classification",
    "image-text-to-text": "image-text-to-text",
}
AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
    "speech-seq2seq": "AutoModelForSpeechSeq2Seq",
    "ctc": "AutoModelForCTC",
    "audio-classification": "AutoModelForAudioClassification",
    "image-text-to-text": "AutoModelForImageTextToText",
}
MADE_BY = {"library": "hf-cptquant"}  # marks our results among others in the metadata


@dataclass(frozen=True)
class CardFacts:
    """What the card says of the model besides the record.

    Attributes:
        name: title.
        task: see `model_view.TASKS`, or `"image-text-to-text"`.
        portable: whether it is in the format of compressed-tensors.
        limits: where it does not load, in a sentence, or None if plain transformers loads it.
        vllm: whether it keeps vLLM's rules (`runtimes.py`).
    """

    name: str
    task: str
    portable: bool
    limits: str | None = None
    vllm: bool = False


def render_card(
    record: QuantizationRecord,
    facts: CardFacts,
    existing: str | None = None,
    before: QuantizationRecord | None = None,
) -> str:
    """The text of `README.md`.

    Args:
        record: of the run.
        facts: of the model.
        existing: a card that is there already. Only our part of it is replaced, or put behind it; a tag `vllm` that is
            not true goes.
        before: the record that the existing card was written from, if it is known. Metadata that nobody has touched
            since are replaced, too.
    """
    card = _new_card(record, facts)
    if existing is None:
        return card
    if before is not None and _front(existing) == _front(_new_card(before, facts)):
        existing = REGEX_YAML_BLOCK.sub(lambda _: _front(card), existing, count=1)
    elif not facts.vllm:
        existing = REGEX_YAML_BLOCK.sub(lambda front: VLLM_TAG.sub("", front[0]), existing, count=1)
    return with_our_part(existing, card)


def _front(card: str) -> str:
    """The metadata at the head of a card, as text."""
    found = REGEX_YAML_BLOCK.search(card)
    return "" if found is None else found[0]


def _new_card(record: QuantizationRecord, facts: CardFacts) -> str:
    results = _eval_results(record, facts)
    plan, table = record.plan, record.table
    widths = sorted({module.scheme.bits for module in plan.packed})
    source = HUB_IDS.get(record.calibration.get("source", ""))
    headings, rows = tabulate(record.evaluation) if record.evaluation else ((), ())
    data = ModelCardData(
        **{name: record.inherited[name] for name in INHERITED if name in record.inherited and name != "tags"},
        base_model=record.base_model,
        base_model_relation="quantized" if record.base_model else None,
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS[facts.task],
        datasets=source and [source[0]],
        tags=[
            "cptquant",
            "mixed-precision",
            *(["compressed-tensors"] if facts.portable else []),
            *(["vllm"] if facts.vllm else []),
            *(f"{bits}-bit" for bits in widths),
            *record.inherited.get("tags", ()),
        ],
        eval_results=results or None,
        model_name=facts.name if results else None,
        ignore_metadata_errors=True,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        begin=BEGIN,
        end=END,
        facts=facts,
        auto_class=AUTO_CLASSES[facts.task],
        record=record,
        plan=plan,
        table=table,
        maps=plan.maps(),
        plan_picture=PLAN_PICTURE,
        sensitivity_picture=SENSITIVITY_PICTURE,
        cell_text=cell_text,
        code=_code({**record.settings, **({"dataset": record.calibration["source"]} if source else {})}),
        compressed_tensors="0.18" if {3, 5, 6} & set(widths) else "0.17",
        kept_bytes=plan.nbytes - sum(module.nbytes for module in plan.packed),
        kept_layers=len(plan.packed) < len(plan.modules),
        kept_embeddings=all(module.kind != EMBEDDING for module in plan.packed),
        headings=headings,
        rows=rows,
        controls=_distinct(result.control_plan for result in record.evaluation),
        comparisons=_distinct(result.against for result in record.evaluation),
        calibrated_on=_distinct(result.dataset for result in record.evaluation if _calibrated_on(record, result)),
        held_out=dict(table.settings.get("held_out_losses", {})) if table else {},
    )
    return str(card)


def with_our_part(existing: str, card: str) -> str:
    """A card with our part of another one: in the place of its own, or behind the text if it has none.

    Results in the metadata go along; those of others stay.

    Raises:
        CheckpointError: there are some, and the metadata of a card cannot be read.
    """
    existing = _with_results(existing, card)
    ours = OUR_PART.search(card)
    assert ours is not None, "the card is one of ours"
    if OUR_PART.search(existing):
        return OUR_PART.sub(lambda _: ours[0], existing, count=1)
    return f"{existing.rstrip()}\n\n{ours[0]}\n"


def text_around(card: str) -> str:
    """What somebody wrote around our part of a card, without the metadata."""
    return OUR_PART.sub("", REGEX_YAML_BLOCK.sub("", card)).strip()


def for_repository(card: str, repo_id: str, tags: Sequence[str] = ()) -> str:
    """A card of ours with the name of a repository in title and code, and more tags in the metadata."""

    def renamed(part: re.Match[str]) -> str:
        named = part[0]
        for pattern in NAMED:
            named = pattern.sub(lambda found: f"{found[1]}{repo_id}", named, count=1)
        return named

    named = OUR_PART.sub(renamed, card, count=1)
    if not tags:
        return named
    tagged = ModelCard(named, ignore_metadata_errors=True)
    tagged.data["tags"] = list(dict.fromkeys([*(tagged.data.get("tags") or []), *tags]))
    return str(tagged)


def is_generic(card: str) -> bool:
    """Whether a card is the form that transformers pushes with a tokenizer or a dense model, not filled in."""
    form = ModelCard.from_template(ModelCardData(), model_description=GENERIC_DESCRIPTION)
    return REGEX_YAML_BLOCK.sub("", card).strip() == form.text.strip()


def _distinct(names: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(name for name in names if name is not None))


def _calibrated_on(record: QuantizationRecord, result: EvaluationResult) -> bool:
    """Whether a model was measured on the text that decided on it. Datasets from the Hub have other text for that."""
    return result.split is None and result.dataset == record.calibration.get("source")


def _eval_results(record: QuantizationRecord, facts: CardFacts) -> list[EvalResult]:
    """What the metadata say: the model's own figures on datasets that the Hub knows."""
    results = []
    for result in record.evaluation:
        if result.dataset in HUB_IDS:
            name, configuration = HUB_IDS[result.dataset]
            settings = {"windows": result.windows, "sequence_length": result.sequence_length, "seed": result.seed}
            results.append(
                EvalResult(
                    task_type=PIPELINE_TAGS[facts.task],
                    dataset_type=name,
                    dataset_name=result.dataset,
                    dataset_config=configuration,
                    dataset_split=result.split,
                    metric_type=result.metric,
                    metric_name=LABELS[result.metric],
                    metric_value=result.value,
                    metric_args={**MADE_BY, **settings},
                )
            )
    return results


def _with_results(existing: str, card: str) -> str:
    """A card whose metadata hold those results of ours that another one has, and no others of ours."""
    if not any("model-index:" in block[2] for text in (existing, card) if (block := REGEX_YAML_BLOCK.search(text))):
        return existing
    parsed, data = _parsed(existing)
    _, other = _parsed(card)
    theirs = [result for result in data.eval_results or () if not _is_ours(result)]
    ours = [result for result in other.eval_results or () if _is_ours(result)]
    data.eval_results = [*theirs, *ours] or None
    data.model_name = (data.model_name or other.model_name) if data.eval_results else None
    return str(parsed)


def _parsed(text: str) -> tuple[ModelCard, ModelCardData]:
    try:
        card = ModelCard(text)
    except (ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"the metadata at the head of README.md cannot be read: {error}; repair them") from error
    assert isinstance(card.data, ModelCardData)
    return card, card.data


def _is_ours(result: EvalResult) -> bool:
    return isinstance(result.metric_args, dict) and MADE_BY.items() <= result.metric_args.items()


def _code(settings: Mapping[str, Any]) -> str:
    """The shortest call that gives these settings."""
    # in the order of the recipe: JSON files come back sorted
    own = {field.name: settings[field.name] for field in fields(Recipe) if settings.get(field.name) is not None}
    recipe = CPTQuantConfig(**own).recipe()
    for name in tuple(own):
        shorter = {other: value for other, value in own.items() if other != name}
        if CPTQuantConfig(**shorter).recipe() == recipe:
            own = shorter
    return f"CPTQuantConfig({', '.join(f'{name}={value!r}' for name, value in own.items())})"
