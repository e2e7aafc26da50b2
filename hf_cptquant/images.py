"""Images → what a vision model reads: float pixel values, by the model's own image processor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer, ProcessorMixin
from transformers.utils import logging

from .errors import CalibrationError
from .recipe import WAYS_WITH_IMAGES, Recipe
from .sources import Images, chosen_labels, draw, read_images

PATCH = 16  # pixels along the side of what counts as one token: most of these models see patches of about that size
IMAGES_AT_A_TIME = 64  # opened and prepared together


def image_fields(
    recipe: Recipe, classes: int, name_or_path: str, splits: Mapping[str, str]
) -> tuple[dict[str, Tensor], str]:
    """Inputs of an image classifier, each `[images, …]`, labels if there are some, and where the images come from.

    Args:
        recipe: `dataset`, `tokenizer` (the image processor), `image_column`, `label_column`, `num_samples`, `seed`.
        classes: outputs of the model.
        name_or_path: where the model's own image processor is.
        splits: of datasets from the Hub.

    Raises:
        CalibrationError: no images, a missing image processor, or labels that are not the model's.
    """
    if isinstance(recipe.dataset, Tensor):
        chosen = draw(len(_checked_pixels(recipe.dataset)), recipe)
        fields = {"pixel_values": recipe.dataset[chosen].float().cpu()}
        data = Images((), None, "pixel values")
        return {**fields, **chosen_labels(data, (), recipe, classes)}, data.source
    data = read_images(recipe, splits)
    if not len(data.images):
        raise CalibrationError("the data hold no images")
    processor = find_image_processor(name_or_path if recipe.tokenizer is None else recipe.tokenizer)
    rows = draw(len(data.images), recipe).tolist()
    parts = []
    with logging.tqdm(total=len(rows), desc="Preparing images", unit="image") as bar:
        for start in range(0, len(rows), IMAGES_AT_A_TIME):
            of_part = rows[start : start + IMAGES_AT_A_TIME]
            parts.append(_processed(processor, [data.images[index].convert("RGB") for index in of_part]))
            bar.update(len(of_part))
    if any(part.keys() != parts[0].keys() or _shapes(part) != _shapes(parts[0]) for part in parts):
        raise CalibrationError(f"{_name_of(processor)} gives images of different sizes; pass float pixel values")
    fields = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {**fields, **chosen_labels(data, rows, recipe, classes)}, data.source


def find_image_processor(processor: Any, token: str | bool | None = None) -> Any:
    """An image processor of transformers.

    Args:
        processor: name, path or object; the processor of a vision–language model has one.
        token: for the Hub; by default that of `hf auth login`.

    Raises:
        CalibrationError: there is none, or a library that it needs (Pillow, torchvision) is not installed.
    """
    if isinstance(processor, (str, os.PathLike)):
        try:
            return AutoImageProcessor.from_pretrained(processor, token=token)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise CalibrationError(
                f"no image processor at {os.fspath(processor)!r} ({_first_line(error)}): pass tokenizer= (an image"
                " processor: a name, a path or an object), or float pixel values as dataset="
            ) from error
    if isinstance(processor, ProcessorMixin):
        processor = getattr(processor, "image_processor", None)
    if not hasattr(processor, "image_processor_type") and not callable(getattr(processor, "preprocess", None)):
        raise CalibrationError(
            f"tokenizer= is {type(processor).__name__}; for a model that reads images pass an image processor"
        )
    return processor


def find_preprocessor(source: str, head: str | None, token: str | bool | None = None) -> Any:
    """What goes beside a model so that it can be used: a tokenizer, an image processor, a feature extractor, or a
    processor that has both.

    Args:
        source: name or path.
        head: of the model, see `model_view.head_of_class`.
        token: for the Hub.

    Raises:
        CalibrationError: there is no image processor.
        OSError, ValueError: there is no tokenizer or processor.
    """
    if head == "image-classification":
        return find_image_processor(source, token)
    both = dict.fromkeys(("image-text-to-text", "speech-seq2seq", "ctc"), AutoProcessor)
    auto_class = {**both, "audio-classification": AutoFeatureExtractor}.get(str(head), AutoTokenizer)
    return auto_class.from_pretrained(source, token=token)


def tokens_of(pixel_values: Tensor) -> int:
    """How much a batch of images counts where text is counted by tokens: patches of 16 × 16 pixels, or as many as a
    processor has made of them.

    Args:
        pixel_values: `[images, channels, height, width]`, or `[images, patches, features]`.
    """
    if pixel_values.dim() == 3:
        return pixel_values.shape[0] * pixel_values.shape[1]
    height, width = pixel_values.shape[-2:]
    return len(pixel_values) * max(1, (height * width) // PATCH**2)


def _checked_pixels(pixels: Tensor) -> Tensor:
    if pixels.dim() != 4 or not pixels.is_floating_point() or not len(pixels):
        raise CalibrationError(
            f"pixel values must be floats of shape [images, channels, height, width], as the model's image processor"
            f" gives them, not {tuple(pixels.shape)} of {pixels.dtype}; or pass {WAYS_WITH_IMAGES}"
        )
    return pixels


def _processed(processor: Any, images: list[Any]) -> dict[str, Tensor]:
    try:
        fields = dict(processor(images, return_tensors="pt"))
    except ValueError as error:
        raise CalibrationError(
            f"{_name_of(processor)} cannot prepare the images ({_first_line(error)}); pass float pixel values"
        ) from error
    if "pixel_values" not in fields:
        raise CalibrationError(f"{_name_of(processor)} gives {sorted(fields)}, no pixel values; pass them as dataset=")
    return fields


def _shapes(fields: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape[1:]) for tensor in fields.values()]


def _name_of(processor: Any) -> str:
    return f"the image processor {type(processor).__name__}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
