"""`CPTQuantConfig`: the shell that transformers handles, and `Recipe`: what the rest of the package reads.

transformers wants a mutable object with `to_dict`; the pipeline wants a checked, frozen value. So the config only
collects settings and turns them into a `Recipe`, which is where every rule about names, types, ranges and combinations
stands. After quantization the config carries the finished checkpoint section, which it hands out verbatim and without
understanding it.
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .errors import ConfigError

METHOD_NAMES = ("cmpq", "pmpq", "tdmpq")
ESTIMATOR_NAMES = ("perturbation", "taylor")
METRIC_NAMES = ("loss", "perplexity", "accuracy")
ALLOCATION_NAMES = ("kmeans",)
GRANULARITY_NAMES = ("block", "group", "module")
ROUNDING_NAMES = ("nearest",)
PERTURB_NAMES = ("all", "first")
_LEAST = {"num_samples": 1, "sequence_length": 8, "cca_components": 1, "cca_samples": 2, "seed": 0}
BIT_WIDTHS = (2, 3, 4, 5, 6, 8, 16)
GROUP_SIZES = (-1, 16, 32, 64, 128, 256)
HUB_DATASETS = ("wikitext2", "c4", "imdb")
FILE_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
WAYS_WITHOUT_NETWORK = (
    f"a list of strings, a path to a file ({', '.join(FILE_SUFFIXES)}), a datasets.Dataset, or token tensors"
)


@dataclass(frozen=True)
class Recipe:
    """The checked settings of one quantization; see `CPTQuantConfig` for their meaning.

    Raises:
        ConfigError: a setting has a wrong type, range or combination.
    """

    method: str = "tdmpq"
    bits: tuple[int, ...] = (4, 8, 16)
    allocation: str = "kmeans"
    granularity: str = "block"
    group_size: int = 128
    symmetric: bool = True
    rounding: str = "nearest"
    metric: str = "loss"
    estimator: str = "perturbation"
    perturb: str = "all"
    perturbation_scale: float = 0.1
    sparsity_levels: tuple[float, ...] = (0.3, 0.5, 0.7)
    cca_components: int = 64
    cca_samples: int = 4096
    dataset: Any = None
    tokenizer: Any = None
    text_column: str | None = None
    label_column: str | None = None
    num_samples: int = 128
    sequence_length: int = 2048
    batch_size: int | None = None
    modules_to_not_convert: tuple[str, ...] | None = None
    allow_skipped: bool = False
    work_dir: str | os.PathLike[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("method", self.method, METHOD_NAMES)
        _check_choice("allocation", self.allocation, ALLOCATION_NAMES)
        _check_choice("granularity", self.granularity, GRANULARITY_NAMES)
        _check_choice("rounding", self.rounding, ROUNDING_NAMES)
        _check_choice("metric", self.metric, METRIC_NAMES)
        _check_choice("estimator", self.estimator, ESTIMATOR_NAMES)
        _check_choice("perturb", self.perturb, PERTURB_NAMES)
        _check_choice("group_size", self.group_size, GROUP_SIZES)
        _check_choice("symmetric", self.symmetric, (True, False))
        _check_choice("allow_skipped", self.allow_skipped, (True, False))
        for width in self.bits or ():
            _check_choice("bits", width, BIT_WIDTHS)
        if not self.bits or len(set(self.bits)) != len(self.bits):
            raise ConfigError(f"bits={self.bits!r} must name at least one bit width, each once")
        for name, least in _LEAST.items():
            _check_integer(name, getattr(self, name), least)
        if self.batch_size is not None:
            _check_integer("batch_size", self.batch_size, 1)
        scale = self.perturbation_scale
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
            raise ConfigError(f"perturbation_scale={scale!r} must be a positive number")
        levels = self.sparsity_levels
        if not levels or not all(isinstance(level, float) and 0 < level < 1 for level in levels):
            raise ConfigError(f"sparsity_levels={levels!r} must be a list of numbers between 0 and 1")
        if self.metric != "loss" and (self.method == "cmpq" or (self.method, self.estimator) == ("tdmpq", "taylor")):
            raise ConfigError(
                f"metric={self.metric!r} cannot be had with method={self.method!r}"
                + (
                    ", which measures correlations"
                    if self.method == "cmpq"
                    else " and estimator='taylor', which expands the loss"
                )
                + "; use metric='loss'"
            )
        if not isinstance(self.work_dir, (str, os.PathLike, type(None))):
            raise ConfigError(f"work_dir={self.work_dir!r} must be a folder")
        for name in ("text_column", "label_column"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be the name of a column")
        if not all(isinstance(pattern, str) for pattern in self.modules_to_not_convert or ()):
            raise ConfigError(f"modules_to_not_convert={self.modules_to_not_convert!r} must be a list of strings")
        if isinstance(self.tokenizer, (bool, int, float)):
            raise ConfigError(f"tokenizer={self.tokenizer!r} must be a name, a path or a tokenizer")
        _check_dataset(self.dataset)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values. Objects that JSON cannot hold (datasets, tensors, tokenizers) become None."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["bits"], plain["sparsity_levels"] = list(self.bits), list(self.sparsity_levels)
        plain["dataset"] = _plain_dataset(self.dataset)
        plain["work_dir"] = None if self.work_dir is None else os.fspath(self.work_dir)
        plain["tokenizer"] = os.fspath(self.tokenizer) if isinstance(self.tokenizer, (str, os.PathLike)) else None
        if self.modules_to_not_convert is not None:
            plain["modules_to_not_convert"] = list(self.modules_to_not_convert)
        return plain


def _plain_dataset(dataset: Any) -> str | list[str] | None:
    if isinstance(dataset, (str, os.PathLike)):
        return os.fspath(dataset)
    if isinstance(dataset, (list, tuple)) and all(isinstance(text, str) for text in dataset):
        return list(dataset)
    return None


def _nearest(name: object, choices: tuple[Any, ...]) -> str:
    match = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def _check_choice(setting: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
        listed = ", ".join(map(repr, choices))
        raise ConfigError(f"{setting}={value!r} is not one of {listed}{_nearest(value, choices)}")


def _check_integer(setting: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{setting}={value!r} must be a whole number of at least {least}")


def _check_dataset(dataset: Any) -> None:
    if isinstance(dataset, (bool, int, float, bytes, Mapping)):
        raise ConfigError(f"dataset={dataset!r} must be one of {', '.join(HUB_DATASETS)}, or {WAYS_WITHOUT_NETWORK}")
    if isinstance(dataset, str) and dataset not in HUB_DATASETS and not dataset.endswith(FILE_SUFFIXES):
        raise ConfigError(
            f"dataset={dataset!r} is neither one of {', '.join(HUB_DATASETS)} nor a file ending in"
            f" {', '.join(FILE_SUFFIXES)}{_nearest(dataset, HUB_DATASETS)}"
        )


class CPTQuantConfig(QuantizationConfigMixin):
    """Settings for mixed-precision quantization, for `from_pretrained(..., quantization_config=...)`.

    Args:
        method: how sensitivity is measured. `"tdmpq"`: the rise of the loss when the weights of a unit are disturbed
            (arXiv 2412.03599 §3.4). `"pmpq"`: the rise of the loss when they are pruned (§3.3).
        bits: the bit widths to choose from: 2, 3, 4, 5, 6, 8, 16 (16 leaves a weight as it came).
        allocation: `"kmeans"`: as many clusters of the scores as there are bit widths, most sensitive → most bits
            (§3.2).
        granularity: what gets one decision: `"block"` (a transformer layer, the paper), `"group"` (projections that
            inference engines fuse, such as q/k/v, and each other projection alone) or `"module"`. Default `"block"`.
        group_size: input features that share a scale below 8 bits: 16 to 256, or -1 for one scale per output channel.
            Where it does not divide a layer, the largest of 128, 64, 32 below it that does. 8 bits are per channel.
        symmetric: without zero points. The scale is then signed, which uses all levels. `False` stores zero points,
            which plain transformers cannot load with compressed-tensors 0.18 to 0.20 (they load with this package).
        rounding: `"nearest"` (equation 1).
        perturb: disturb `"all"` quantizable weights of a unit or, as the paper says, the `"first"`.
        perturbation_scale: standard deviation of the disturbance relative to the root mean square of the weight; 0.1 is
            about the error of 4-bit rounding.
        sparsity_levels: shares of a unit's weights that `"pmpq"` prunes; the score is the mean over them.
        dataset: calibration data: `"wikitext2"`, `"c4"` or `"imdb"` from the Hub; a path to a text, JSON Lines or
            Parquet file; a list of strings; a `datasets.Dataset`; or token tensors `[sequences, length]`.
        tokenizer: name, path or object; by default the model's own.
        text_column, label_column: columns of a dataset. Without labels, a classifier is measured against its own
            predictions.
        num_samples: calibration sequences.
        sequence_length: tokens in each, at most what the model can take.
        batch_size: sequences at a time; by default as many as keep the logits within 1 GiB. Scores do not depend on it.
        modules_to_not_convert: names, suffixes or regular expressions of modules to leave alone.
        allow_skipped: accept that most of the weights of the blocks are in modules that cannot be quantized.
        seed: of the choice of windows, the masking and the disturbances.

    After `from_pretrained` the model's `config.quantization_config` is a `CPTQuantConfig` whose `to_dict()` is what
    stands in `config.json`.

    Raises:
        ConfigError: an unknown setting (the nearest valid name is given), or a wrong type, range or combination.
    """

    quant_method = "cptquant"

    def __init__(
        self,
        method: str = "tdmpq",
        bits: tuple[int, ...] | list[int] = (4, 8, 16),
        allocation: str | None = None,
        granularity: str | None = None,
        group_size: int = 128,
        symmetric: bool = True,
        rounding: str = "nearest",
        metric: str = "loss",
        estimator: str = "perturbation",
        perturb: str = "all",
        perturbation_scale: float = 0.1,
        sparsity_levels: tuple[float, ...] | list[float] = (0.3, 0.5, 0.7),
        cca_components: int = 64,
        cca_samples: int = 4096,
        dataset: Any = None,
        tokenizer: Any = None,
        text_column: str | None = None,
        label_column: str | None = None,
        num_samples: int = 128,
        sequence_length: int = 2048,
        batch_size: int | None = None,
        modules_to_not_convert: list[str] | tuple[str, ...] | None = None,
        allow_skipped: bool = False,
        work_dir: str | os.PathLike[str] | None = None,
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        if unknown.pop("quant_method", self.quant_method) != self.quant_method:
            raise ConfigError("the settings are for another quant_method than 'cptquant'")
        if unknown:
            name = next(iter(unknown))
            raise ConfigError(
                f"CPTQuantConfig has no setting {name!r}{_nearest(name, tuple(f.name for f in fields(Recipe)))}"
            )
        self.method = method
        self.bits = bits
        self.allocation = allocation
        self.granularity = granularity
        self.group_size = group_size
        self.symmetric = symmetric
        self.rounding = rounding
        self.metric = metric
        self.estimator = estimator
        self.perturb = perturb
        self.perturbation_scale = perturbation_scale
        self.sparsity_levels = sparsity_levels
        self.cca_components = cca_components
        self.cca_samples = cca_samples
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.text_column = text_column
        self.label_column = label_column
        self.num_samples = num_samples
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.modules_to_not_convert = modules_to_not_convert
        self.allow_skipped = allow_skipped
        self.work_dir = work_dir
        self.seed = seed
        self.recipe()

    def recipe(self) -> Recipe:
        """The settings, checked and frozen, with the defaults filled in."""
        settings = {field.name: getattr(self, field.name) for field in fields(Recipe)}
        for name in ("bits", "sparsity_levels", "modules_to_not_convert"):
            if not isinstance(settings[name], (list, tuple, type(None))):
                raise ConfigError(f"{name}={settings[name]!r} must be a list")
            settings[name] = settings[name] and tuple(settings[name])
        settings["allocation"] = "kmeans" if self.allocation is None else self.allocation
        settings["granularity"] = "block" if self.granularity is None else self.granularity
        return Recipe(**settings)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values, with `quant_method`."""
        plain = self.recipe().to_dict()
        return {
            "quant_method": self.quant_method,
            **plain,
            "allocation": self.allocation,
            "granularity": self.granularity,
        }

    def __iter__(self):
        yield from self.to_dict().items()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Rebuild from `to_dict()`, of a request or of a finished checkpoint."""
        if "cptquant" not in config_dict:
            return super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        config = CPTQuantCheckpointConfig(config_dict)
        return (config, kwargs) if return_unused_kwargs else config


class CPTQuantCheckpointConfig(CPTQuantConfig):
    """The config of a model that is quantized: the settings it was made with, and its section of `config.json`.

    A class of its own so that transformers refuses a `CPTQuantConfig` given for a model that is quantized already.

    Args:
        section: the value of `quantization_config` in `config.json`.
    """

    def __init__(self, section: Mapping[str, Any]) -> None:
        self.section = copy.deepcopy(dict(section))
        super().__init__(**self.section["cptquant"].get("settings", {}))

    def to_dict(self) -> dict[str, Any]:
        """The section of `config.json`, verbatim."""
        return copy.deepcopy(self.section)
