"""The card of the base model → what of it is true of the quantized model, too: its licence, languages and tags.

A folder has its own README.md. A model on the Hub is asked for once, when it is quantized; what is not known, or not
reached, stays out. What is found goes into the record, so that a card can be written again without a network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HTTPError
from transformers.utils import logging

from .model_view import HUB_NAME

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it

INHERITED = ("license", "license_name", "license_link", "language", "tags")
FORMATS = ("safetensors", "pytorch", "tf", "jax", "flax", "rust", "onnx", "gguf", "ggml", "mlx", "coreml", "openvino")
# what a repository's files are, and what runs them
NOT_INHERITED = frozenset((*FORMATS, "tflite", "transformers", "transformers.js", "vllm", "tensorboard"))
SECONDS = 5.0  # that the Hub may take


def inherited_from(source: str) -> dict[str, Any]:
    """Metadata of a base model that a model made from it has, too; nothing where they are not known.

    Args:
        source: folder, or name on the Hub, which is not asked if HF_HUB_OFFLINE is set.
    """
    try:
        data = _metadata(source)
    except (ValueError, yaml.YAMLError, HTTPError, OSError) as error:
        logger.info(f"The card of {source} could not be read, so licence and languages are not inherited: {error}")
        return {}
    found = {name: data[name] for name in INHERITED if data.get(name)}
    tags = found.pop("tags", ())
    kept = [tag for tag in ([tags] if isinstance(tags, str) else tags) if tag not in NOT_INHERITED]
    return {**found, "tags": kept} if kept else found


def _metadata(source: str) -> dict[str, Any]:
    card = Path(source) / "README.md"
    if source and card.is_file():
        return ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    if Path(source).exists() or not HUB_NAME.fullmatch(source):
        return {}
    found = HfApi().model_info(source, timeout=SECONDS).card_data
    return {} if found is None else found.to_dict()
