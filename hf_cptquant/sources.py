"""Where calibration data come from: whatever `dataset=` is → texts or images, with their labels if there are some.

Datasets by name are from the Hub. Data are never replaced by other data: what cannot be used is an error that says what
would work.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CalibrationError
from .recipe import HUB_DATASETS, HUB_IDS, IMAGE_DATASETS, WAYS_WITH_IMAGES, WAYS_WITHOUT_NETWORK, Recipe

POOL = 8  # windows are drawn from at most this many times what is needed
STREAMED = ("c4", "imagenet-1k")  # far larger than what is needed of them
SORTED_BY_LABEL = ("imdb", "imagenet-1k", "food101")
LABEL_COLUMNS = {"imdb": "label", "imagenet-1k": "label", "cifar10": "label", "food101": "label"}
TRAINING_SPLITS = dict.fromkeys(HUB_DATASETS, "train")
EVALUATION_SPLITS = {
    "wikitext2": "test",
    "c4": "validation",
    "imdb": "test",
    "imagenet-1k": "validation",
    "cifar10": "test",
    "food101": "validation",
}


@dataclass(frozen=True)
class Documents:
    """Texts in order, with a label each or none."""

    texts: Iterable[str]
    labels: tuple[int, ...] | None
    source: str


@dataclass(frozen=True)
class Images:
    """PIL images in order, opened when they are asked for by their index, with a label each or none."""

    images: Sequence[Any]
    labels: tuple[int, ...] | None
    source: str


def read_documents(recipe: Recipe, labelled: bool, splits: Mapping[str, str]) -> Documents:
    """Texts (and, for a classifier, labels) from a Hub name, a file, a list of strings or a `datasets.Dataset`."""
    dataset = recipe.dataset
    if isinstance(dataset, (list, tuple)) and all(isinstance(text, str) for text in dataset):
        return Documents(tuple(dataset), None, f"{len(dataset)} texts")
    if _are_images(dataset):
        raise CalibrationError(f"the data are images, and the model reads text; pass {WAYS_WITHOUT_NETWORK}")
    if isinstance(dataset, (str, os.PathLike)) and Path(dataset).suffix == ".txt":
        return Documents((_text_of(Path(dataset)),), None, Path(dataset).name)
    import datasets

    table, source = _table(recipe, splits)
    columns = {name: feature.dtype for name, feature in table.features.items()}
    textual = [name for name, dtype in columns.items() if dtype in ("string", "large_string")]
    column = recipe.text_column or ("text" if "text" in textual else textual[0] if len(textual) == 1 else None)
    if not textual and any(isinstance(feature, datasets.Image) for feature in table.features.values()):
        raise CalibrationError(f"{source} holds images, and the model reads text; pass {WAYS_WITHOUT_NETWORK}")
    if column not in textual:
        raise CalibrationError(
            f"{source} has no text column {column or '(several fit)'}; set text_column= to one of"
            f" {textual or list(columns)}"
        )
    return Documents(table[column], _labels(table, source, recipe) if labelled else None, source)


def read_images(recipe: Recipe, splits: Mapping[str, str]) -> Images:
    """Images and labels from a Hub name, a Parquet file, a list of PIL images or a `datasets.Dataset`."""
    dataset = recipe.dataset
    if isinstance(dataset, (list, tuple)) and _are_images(dataset):
        return Images(dataset, None, f"{len(dataset)} images")
    named = isinstance(dataset, (str, os.PathLike))
    if isinstance(dataset, (list, tuple, Tensor)) or (
        named and (Path(dataset).suffix == ".txt" or dataset in set(HUB_DATASETS) - set(IMAGE_DATASETS))
    ):
        held = repr(os.fspath(dataset)) if named else type(dataset).__name__
        raise CalibrationError(f"the model reads images, and dataset= ({held}) holds none; pass {WAYS_WITH_IMAGES}")
    import datasets

    table, source = _table(recipe, splits)
    pictures = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    column = recipe.image_column or (pictures[0] if len(pictures) == 1 else None)
    if not pictures:
        raise CalibrationError(
            f"the model reads images, and none of the columns {list(table.features)} of {source} holds some (as"
            f" datasets.Image); pass {WAYS_WITH_IMAGES}"
        )
    if column not in pictures:
        raise CalibrationError(
            f"{source} has no column of images {column or '(several fit)'}; set image_column= to one of {pictures}"
        )
    return Images(table[column], _labels(table, source, recipe), source)


def chosen_labels(data: Documents | Images, chosen: Sequence[int], recipe: Recipe, classes: int) -> dict[str, Tensor]:
    """`"labels"` → int64 `[chosen]`, or nothing where there are none.

    Args:
        chosen: indices of texts or images.
        classes: outputs of the model.

    Raises:
        CalibrationError: labels that are not the model's classes, or none where the metric needs them.
    """
    if data.labels is None:
        if recipe.metric == "accuracy":
            raise CalibrationError(
                f"metric='accuracy' needs labels, and {data.source} has none; set label_column to a column of a"
                " datasets.Dataset or of a .jsonl or .parquet file, or use metric='loss'"
            )
        return {}
    labels = [data.labels[index] for index in chosen]
    wrong = [label for label in labels if type(label) is not int or not 0 <= label < classes]
    if wrong and classes > 1:
        raise CalibrationError(
            f"the label {wrong[0]!r} is not one of the model's {classes} classes, numbered from 0; set"
            " label_column to the right column, or map its values to numbers"
        )
    return {"labels": torch.tensor(labels)}


def draw(count: int, recipe: Recipe) -> Tensor:
    """`num_samples` (at most) of so many indices, at random under the seed, ascending."""
    generator = torch.Generator().manual_seed(recipe.seed)
    return torch.randperm(count, generator=generator)[: recipe.num_samples].sort().values


def _are_images(dataset: Any) -> bool:
    if isinstance(dataset, str) and dataset in IMAGE_DATASETS:
        return True
    if isinstance(dataset, (list, tuple)) and len(dataset) and not isinstance(dataset[0], (str, Tensor)):
        from transformers.image_utils import is_pil_image

        return all(is_pil_image(item) for item in dataset)
    return False


def _table(recipe: Recipe, splits: Mapping[str, str]) -> tuple[Any, str]:
    """A `datasets.Dataset`, and what to call it."""
    import datasets

    dataset = recipe.dataset
    if isinstance(dataset, str) and dataset in HUB_DATASETS:
        return _from_hub(dataset, splits[dataset], recipe), dataset
    if isinstance(dataset, (str, os.PathLike)):
        return _from_file(Path(dataset)), Path(dataset).name
    if isinstance(dataset, datasets.Dataset):
        return dataset, "datasets.Dataset"
    raise CalibrationError(
        f"dataset= is {type(dataset).__name__}; pass one of {', '.join(HUB_DATASETS)}, {WAYS_WITHOUT_NETWORK}, or for"
        f" a model that reads images {WAYS_WITH_IMAGES}"
    )


def _from_hub(name: str, split: str, recipe: Recipe) -> Any:
    import datasets

    try:
        dataset = datasets.load_dataset(*filter(None, HUB_IDS[name]), split=split, streaming=name in STREAMED)
        if name in SORTED_BY_LABEL:
            dataset = dataset.shuffle(seed=recipe.seed)
        if name in STREAMED:
            rows = list(islice(dataset, POOL * recipe.num_samples))
            dataset = datasets.Dataset.from_list(rows, features=dataset.features)
    except OSError as error:
        ways = WAYS_WITH_IMAGES if name in IMAGE_DATASETS else WAYS_WITHOUT_NETWORK
        raise CalibrationError(
            f"dataset={name!r} is on the Hugging Face Hub, which could not be reached ({error}); without a network"
            f" pass {ways}"
        ) from error
    return dataset


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"the file {path} does not exist") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"the file {path} cannot be read as {path.suffix}: {error}") from error


def _from_file(path: Path) -> Any:
    import datasets
    import pyarrow
    import pyarrow.json
    import pyarrow.parquet

    if not path.is_file():
        raise CalibrationError(f"the file {path} does not exist")
    read = pyarrow.parquet.read_table if path.suffix == ".parquet" else pyarrow.json.read_json
    try:
        return datasets.Dataset(read(path))
    except pyarrow.ArrowInvalid as error:
        raise CalibrationError(f"the file {path} cannot be read as {path.suffix}: {error}") from error


def _labels(table: Any, source: str, recipe: Recipe) -> tuple[int, ...] | None:
    column = recipe.label_column or LABEL_COLUMNS.get(source)
    if column is None:
        return None
    if column not in table.features:
        raise CalibrationError(f"{source} has no label column {column!r}; its columns are {list(table.features)}")
    return tuple(table[column])
