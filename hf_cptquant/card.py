"""The model card that is written beside a quantized model: (record, what is known of the model) → `README.md`.

Every figure comes from the record of the run; what was not measured is said not to have been. Our part stands between
two markers, so that it can be made anew without touching what somebody has written around it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .bitmap import cell_text
from .config import CPTQuantConfig
from .recipe import Recipe
from .record import QuantizationRecord

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
BEGIN, END = "<!-- hf-cptquant: begin -->", "<!-- hf-cptquant: end -->"
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
VLLM_TAG = re.compile(r"^\s*- vllm\n", re.MULTILINE)
PIPELINE_TAGS = {
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "sequence-classification": "text-classification",
    "seq2seq-lm": "text2text-generation",
}
AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}


@dataclass(frozen=True)
class CardFacts:
    """What the card says of the model besides the record.

    Attributes:
        name: title.
        task: see `model_view.TASKS`.
        portable: whether it is in the format of compressed-tensors.
        limits: where it does not load, in a sentence, or None if plain transformers loads it.
        vllm: whether it keeps vLLM's rules (`runtimes.py`).
    """

    name: str
    task: str
    portable: bool
    limits: str | None = None
    vllm: bool = False


def render_card(record: QuantizationRecord, facts: CardFacts, existing: str | None = None) -> str:
    """The text of `README.md`.

    Args:
        record: of the run.
        facts: of the model.
        existing: a card that is there already. Only our part of it is replaced, or put behind it; a tag `vllm` that is
            not true goes.
    """
    if existing is not None and not facts.vllm:
        existing = FRONT_MATTER.sub(lambda front: VLLM_TAG.sub("", front[0]), existing, count=1)
    widths = sorted({module.scheme.bits for module in record.plan.packed})
    data = ModelCardData(
        base_model=record.base_model,
        base_model_relation="quantized" if record.base_model else None,
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS[facts.task],
        tags=[
            "cptquant",
            "mixed-precision",
            *(["compressed-tensors"] if facts.portable else []),
            *(["vllm"] if facts.vllm else []),
        ]
        + [f"{bits}-bit" for bits in widths],
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
        plan=record.plan,
        table=record.table,
        maps=record.plan.maps(),
        cell_text=cell_text,
        code=_code(record.settings),
        held_out=dict(record.table.settings.get("held_out_losses", {})) if record.table else {},
    )
    if existing is None:
        return str(card)
    ours = str(card)[str(card).index(BEGIN) :].rstrip()
    if BEGIN in existing and END in existing:
        return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: ours, existing, count=1, flags=re.DOTALL)
    return f"{existing.rstrip()}\n\n{ours}\n"


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
