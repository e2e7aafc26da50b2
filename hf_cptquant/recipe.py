"""`Recipe`: the checked, frozen settings of one quantization, which the rest of the package reads.

Every rule about the names, types, ranges and combinations of settings stands here; their meaning is told by
`CPTQuantConfig`, the shell that transformers handles.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from .errors import ConfigError
from .plan import PACKED_BITS, BitPlan
from .record import QuantizationRecord
from .runtimes import RUNTIMES

METHOD_NAMES = ("cmpq", "pmpq", "tdmpq", "auto")
ESTIMATOR_NAMES = ("perturbation", "taylor")
METRIC_NAMES = ("loss", "perplexity", "accuracy")
ALLOCATION_NAMES = ("kmeans", "k-harmonic-means", "integer")
BUDGETS = ("target_bits", "target_size", "target_compression", "max_loss_increase")
GRANULARITY_NAMES = ("block", "group", "module")
ROUNDING_NAMES = ("nearest", "clipped", "gptq", "signround")
QUALITIES = {"fast": ("nearest", 0), "balanced": ("signround", 100), "best": ("signround", 300)}  # rounding, iters
RECOVER_NAMES = (None, "scales")
PERTURB_NAMES = ("all", "first")
OUTSIDE_SETTINGS = ("quantize_lm_head", "quantize_embeddings", "quantize_vision_tower", "quantize_front_end")
_WITHOUT_METRIC = {
    "cmpq": ", which measures correlations; use metric='loss'",
    "auto": ", whose plans are compared by their loss; use metric='loss'",
}
_LEAST = {
    "refine": 0,
    "iters": 0,
    "num_samples": 1,
    "sequence_length": 8,
    "taylor_samples": 1,
    "cca_components": 1,
    "cca_samples": 2,
    "seed": 0,
}
BIT_WIDTHS = (*PACKED_BITS, 16)
GROUP_SIZES = (-1, 16, 32, 64, 128, 256)
RUNTIME_NAMES = (None, *RUNTIMES)
HUB_IDS = {  # what `datasets.load_dataset` calls them: dataset, configuration
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": ("allenai/c4", "en"),
    "imdb": ("stanfordnlp/imdb", None),
    "imagenet-1k": ("ILSVRC/imagenet-1k", None),
    "cifar10": ("uoft-cs/cifar10", None),
    "food101": ("ethz/food101", None),
}
HUB_DATASETS = tuple(HUB_IDS)
IMAGE_DATASETS = ("imagenet-1k", "cifar10", "food101")
SELF = "self"  # text that the model itself writes
FILE_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
WAYS_WITHOUT_NETWORK = (
    f"a list of strings, a path to a file ({', '.join(FILE_SUFFIXES)}), a datasets.Dataset, or token tensors"
)
WAYS_WITH_SOUND = (
    "batches of features as the model's processor gives them: a dict of tensors, or a list of such, with input_features"
    " or input_values [clips, …], and labels; without data a plan=, or one bit width, with quality='fast' will do"
)
WAYS_WITH_IMAGES = (
    "a list of PIL images, a datasets.Dataset or .parquet file with a column of images, or float pixel values [images,"
    " channels, height, width]"
)


@dataclass(frozen=True)
class Recipe:
    """The checked settings of one quantization; see `CPTQuantConfig` for their meaning.

    Raises:
        ConfigError: a setting has a wrong type, range or combination.
    """

    method: str = "tdmpq"
    bits: tuple[int, ...] = (4, 8, 16)
    allocation: str = "integer"
    granularity: str = "group"
    target_bits: float | None = None
    target_size: int | None = None
    target_compression: float | None = None
    max_loss_increase: float | None = None
    bits_override: tuple[tuple[str, int], ...] = ()
    quantize_lm_head: int | None = None
    quantize_embeddings: int | None = None
    quantize_vision_tower: int | None = None
    quantize_front_end: int | None = None
    refine: int = 0
    regularization: float = 0.0
    plan: str | os.PathLike[str] | BitPlan | QuantizationRecord | None = None
    group_size: int = 128
    symmetric: bool = True
    quality: str = "balanced"
    rounding: str = QUALITIES["balanced"][0]
    iters: int = QUALITIES["balanced"][1]
    recover: str | None = None
    metric: str = "loss"
    estimator: str = "taylor"
    taylor_samples: int = 4096
    perturb: str = "all"
    perturbation_scale: float = 0.1
    sparsity_levels: tuple[float, ...] = (0.3, 0.5, 0.7)
    cca_components: int = 64
    cca_samples: int = 4096
    dataset: Any = None
    tokenizer: Any = None
    text_column: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    num_samples: int = 128
    sequence_length: int = 2048
    batch_size: int | None = None
    modules_to_not_convert: tuple[str, ...] | None = None
    allow_skipped: bool = False
    target_runtime: str | None = None
    strict: bool = False
    work_dir: str | os.PathLike[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("method", self.method, METHOD_NAMES)
        _check_choice("allocation", self.allocation, ALLOCATION_NAMES)
        _check_choice("granularity", self.granularity, GRANULARITY_NAMES)
        _check_choice("quality", self.quality, tuple(QUALITIES))
        _check_choice("rounding", self.rounding, ROUNDING_NAMES)
        _check_choice("recover", self.recover, RECOVER_NAMES)
        _check_choice("metric", self.metric, METRIC_NAMES)
        _check_choice("estimator", self.estimator, ESTIMATOR_NAMES)
        _check_choice("perturb", self.perturb, PERTURB_NAMES)
        _check_choice("group_size", self.group_size, GROUP_SIZES)
        _check_choice("symmetric", self.symmetric, (True, False))
        _check_choice("allow_skipped", self.allow_skipped, (True, False))
        _check_choice("target_runtime", self.target_runtime, RUNTIME_NAMES)
        _check_choice("strict", self.strict, (True, False))
        for name in OUTSIDE_SETTINGS:
            _check_choice(name, getattr(self, name), (None, *PACKED_BITS))
        for width in self.bits or ():
            _check_choice("bits", width, BIT_WIDTHS)
        if not self.bits or len(set(self.bits)) != len(self.bits):
            raise ConfigError(f"bits={self.bits!r} must name at least one bit width, each once")
        for name, least in _LEAST.items():
            _check_integer(name, getattr(self, name), least)
        if self.batch_size is not None:
            _check_integer("batch_size", self.batch_size, 1)
        self._check_budget()
        self._check_plan()
        self._check_runtime()
        scale = self.perturbation_scale
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
            raise ConfigError(f"perturbation_scale={scale!r} must be a positive number")
        levels = self.sparsity_levels
        if not levels or not all(isinstance(level, float) and 0 < level < 1 for level in levels):
            raise ConfigError(f"sparsity_levels={levels!r} must be a list of numbers between 0 and 1")
        if self.metric != "loss" and (self.method in _WITHOUT_METRIC or self.uses_taylor):
            reason = _WITHOUT_METRIC.get(
                self.method, " and estimator='taylor', which expands the loss; use estimator='perturbation'"
            )
            raise ConfigError(f"metric={self.metric!r} cannot be had with method={self.method!r}{reason}")
        if not isinstance(self.work_dir, (str, os.PathLike, type(None))):
            raise ConfigError(f"work_dir={self.work_dir!r} must be a folder")
        for name in ("text_column", "image_column", "label_column"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be the name of a column")
        if not all(isinstance(pattern, str) for pattern in self.modules_to_not_convert or ()):
            raise ConfigError(f"modules_to_not_convert={self.modules_to_not_convert!r} must be a list of strings")
        if isinstance(self.tokenizer, (bool, int, float)):
            raise ConfigError(f"tokenizer={self.tokenizer!r} must be a name, a path or a tokenizer")
        _check_dataset(self.dataset)

    def _check_plan(self) -> None:
        if not isinstance(self.plan, (str, os.PathLike, BitPlan, QuantizationRecord, type(None))):
            raise ConfigError(f"plan={self.plan!r} must be the file of a plan, or a BitPlan")
        deciding = [name for name in (*BUDGETS, "bits_override", "refine", *OUTSIDE_SETTINGS) if getattr(self, name)]
        if self.plan is not None and deciding:
            raise ConfigError(f"with plan= every module is decided; leave out {deciding[0]}, or make another plan")

    def _check_runtime(self) -> None:
        """Refuse what leaves the runtime no choice, whatever the model is."""
        if self.target_runtime is None or self.plan is not None:
            return
        runtime = RUNTIMES[self.target_runtime]
        wanted = f"target_runtime={self.target_runtime!r} ({runtime.title}, {runtime.kernel})"
        if self.granularity == "module":
            raise ConfigError(
                f"{wanted} loads fused projections of one scheme only, which granularity='module' would decide one by"
                " one; use granularity='group'"
            )
        if not self.offered_bits:
            raise ConfigError(f"{wanted} takes {runtime.bits_in_words} and 16; bits={list(self.bits)} has none of them")
        for pattern, width in self.bits_override:
            if not runtime.takes_bits(width, self.symmetric):
                raise ConfigError(
                    f"{wanted} takes {runtime.bits_in_words} and 16, not bits_override[{pattern!r}]={width}"
                )
        if min(self.offered_bits) < 8 and not runtime.takes_group_size(self.group_size):
            raise ConfigError(
                f"{wanted} takes groups of {runtime.group_sizes_in_words}, not group_size={self.group_size}"
            )

    def _check_budget(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        for name in (*given, "regularization"):
            value = getattr(self, name)
            least = 0 if name in ("regularization", "max_loss_increase") else sys.float_info.min
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < float("inf"):
                raise ConfigError(f"{name}={value!r} must be a {'' if least == 0 else 'positive '}number")
        if len(given) > 1:
            raise ConfigError(f"{given[0]} and {given[1]} are two budgets; give one")
        if self.method == "auto" and (self.allocation != "integer" or self.max_loss_increase is not None):
            raise ConfigError(
                "method='auto' compares plans of equal size: give target_bits, target_size or target_compression"
            )
        if self.allocation != "integer" and given:
            raise ConfigError(f"{given[0]} is for allocation='integer'; allocation={self.allocation!r} takes no budget")
        if self.allocation != "integer" and self.refine:
            raise ConfigError(
                f"refine={self.refine} is for allocation='integer'; allocation={self.allocation!r} has no budget"
            )
        if self.max_loss_increase is not None and not self.uses_taylor:
            raise ConfigError(
                "max_loss_increase needs costs in nats, which only method='tdmpq' with estimator='taylor' gives; use"
                " target_bits"
            )
        for pattern, width in self.bits_override:
            if not isinstance(pattern, str):
                raise ConfigError(
                    f"bits_override={dict(self.bits_override)!r} must map patterns of module names to bits"
                )
            _check_choice(f"bits_override[{pattern!r}]", width, BIT_WIDTHS)

    @property
    def uses_taylor(self) -> bool:
        """Whether the method prices bit widths in nats."""
        return (self.method, self.estimator) == ("tdmpq", "taylor")

    @property
    def rounds_to_nearest(self) -> bool:
        """Whether weights are rounded one by one, without data."""
        return self.rounding == "nearest" or (self.rounding == "signround" and self.iters == 0)

    @property
    def compensates(self) -> bool:
        """Whether the weights of a layer make up for each other's rounding errors."""
        return self.rounding != "clipped" and not self.rounds_to_nearest

    @property
    def learns(self) -> bool:
        """Whether calibration data decide on more than the plan."""
        return not self.rounds_to_nearest or self.recover is not None

    @property
    def leaves_no_choice(self) -> bool:
        """Whether without data there is nothing to decide: one bit width, and weights rounded one by one."""
        return self.plan is None and self.names_no_data and len(self.offered_bits) == 1 and not self.learns

    @property
    def names_no_data(self) -> bool:
        """Whether a model that can is to write its own calibration text."""
        return self.dataset is None or (isinstance(self.dataset, str) and self.dataset == SELF)

    @property
    def offered_bits(self) -> tuple[int, ...]:
        """The bit widths to choose from, in their order: those that the runtime takes, if one is named."""
        if self.target_runtime is None:
            return self.bits
        runtime = RUNTIMES[self.target_runtime]
        return tuple(bits for bits in self.bits if runtime.takes_bits(bits, self.symmetric))

    @property
    def packed_bits(self) -> tuple[int, ...]:
        """The bit widths below 16 that a unit may get, ascending, those of `bits_override` included."""
        return tuple(sorted({bits for bits in (*self.offered_bits, *dict(self.bits_override).values()) if bits < 16}))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values. Objects that are no settings (datasets, tensors, tokenizers, plans) become
        None."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["bits"], plain["sparsity_levels"] = list(self.bits), list(self.sparsity_levels)
        plain["bits_override"] = dict(self.bits_override) or None
        plain["dataset"] = _plain_dataset(self.dataset)
        for name in ("work_dir", "plan", "tokenizer"):
            value = plain[name]
            plain[name] = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
        if self.modules_to_not_convert is not None:
            plain["modules_to_not_convert"] = list(self.modules_to_not_convert)
        return plain


def _plain_dataset(dataset: Any) -> str | list[str] | None:
    if isinstance(dataset, (str, os.PathLike)):
        return os.fspath(dataset)
    if isinstance(dataset, (list, tuple)) and all(isinstance(text, str) for text in dataset):
        return list(dataset)
    return None


def is_batch(value: Any) -> bool:
    """Whether a value is a dict of tensors, as processors and feature extractors give."""
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(item, Tensor) for item in value.values())


def nearest_name(name: object, choices: tuple[Any, ...]) -> str:
    """The end of an error message: the choice that was probably meant, if one is near."""
    match = difflib.get_close_matches(str(name), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def _check_choice(setting: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
        listed = ", ".join(map(repr, choices))
        raise ConfigError(f"{setting}={value!r} is not one of {listed}{nearest_name(value, choices)}")


def _check_integer(setting: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{setting}={value!r} must be a whole number of at least {least}")


def _check_dataset(dataset: Any) -> None:
    if isinstance(dataset, (bool, int, float, bytes, Mapping)) and not is_batch(dataset):
        raise ConfigError(f"dataset={dataset!r} must be one of {', '.join(HUB_DATASETS)}, or {WAYS_WITHOUT_NETWORK}")
    named = (*HUB_DATASETS, SELF)
    if isinstance(dataset, str) and dataset not in named and not dataset.endswith(FILE_SUFFIXES):
        raise ConfigError(
            f"dataset={dataset!r} is neither one of {', '.join(named)} nor a file ending in"
            f" {', '.join(FILE_SUFFIXES)}{nearest_name(dataset, named)}"
        )
