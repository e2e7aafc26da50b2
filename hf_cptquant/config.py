"""`CPTQuantConfig`: the settings as transformers handles them.

transformers wants a mutable object with `to_dict`; the pipeline wants a checked, frozen value. So the config only
collects settings and turns them into a `Recipe` (`recipe.py`). After quantization the config carries the finished
checkpoint section, which it hands out verbatim and without understanding it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from accelerate.utils import convert_file_size_to_int
from transformers.utils.quantization_config import QuantizationConfigMixin

from .errors import ConfigError
from .plan import BitPlan
from .recipe import QUALITIES, Recipe, nearest_name
from .record import QuantizationRecord


class CPTQuantConfig(QuantizationConfigMixin):
    """Settings for mixed-precision quantization, for `from_pretrained(..., quantization_config=...)`.

    Args:
        method: how sensitivity is measured. `"tdmpq"`: the rise of the loss when the weights of a unit are disturbed
            (arXiv 2412.03599 §3.4). `"pmpq"`: the rise of the loss when they are pruned (§3.3). `"cmpq"`: how little
            its outputs correlate with those of the other units (§3.2). `"auto"`: all of them, and both estimators of
            `"tdmpq"`, each with a plan for the same budget; the one whose model has the least loss on calibration data
            that were kept from the methods (the last quarter) is taken.
        bits: the bit widths to choose from: 2, 3, 4, 5, 6, 8, 16 (16 leaves a weight as it came).
        allocation: `"kmeans"` or `"k-harmonic-means"`: as many clusters of the scores as there are bit widths, most
            sensitive → most bits (§3.2), which takes no budget; `"integer"`, the default: the least predicted rise of
            the loss in a budget, by an exact integer program (equations 4 and 5).
        granularity: what gets one decision: `"block"` (a transformer layer, the paper), `"group"` (projections that
            inference engines fuse, such as q/k/v, and each other projection alone) or `"module"`. By default `"group"`
            for the integer program, `"block"` for clusters.
        target_bits: budget in bits per quantizable weight, scales and zero points included. Without any
            budget a quarter of a bit more than the smallest plan takes: 4.5 bits for 4 bits in groups of 64.
        target_size: budget in bytes of the whole checkpoint, embeddings included: a number, `"300MB"`, `"3GiB"`.
        target_compression: budget as a compression ratio of the whole checkpoint.
        max_loss_increase: instead of a budget in bytes, the largest rise of the loss (nats) that is predicted for
            rounding to nearest; the smallest model within it is chosen. Needs `estimator="taylor"`.
        bits_override: pattern of names of modules in the layers (`"*.down_proj"`, `"model.layers.0.*"`) → bits, decided
            beforehand.
        quantize_lm_head: 2, 3, 4, 5, 6 or 8 bits for the linear layer that predicts tokens (`lm_head`), rounded to
            nearest, if it has a weight of its own; it then counts for all budgets, `target_bits` included. None leaves
            it as it is.
        quantize_embeddings: the same for the embedding that tokens are looked up in. Where other modules share its
            weight (`tie_word_embeddings`), such as the head, it is packed once, for all of them. Plain transformers
            cannot load it.
        quantize_vision_tower: the same for the linear layers with which a language model reads images or sound. Text
            does not show what they are worth, so no method decides on them; 8 bits are near to what was there.
        quantize_front_end: the same for the linear layers and convolutions in front of the blocks and between their
            stacks: patch embeddings, the stem of a convolutional network and what shrinks its images on the way,
            convolutions over sound, projectors of language models that read images. Convolutions cannot be loaded by
            plain transformers.
        refine: swaps (fewer bits for one unit, more for another, in the same budget) that are tried after the integer
            program, the most promising first; those that bring the predictions nearer to the original's on up to 8,192
            tokens of the calibration data are kept. Each takes about as long as a forward pass over these.
        regularization: λ of equations 4 and 5, the weight of the relative squared rounding error beside the predicted
            rise of the loss.
        plan: a finished plan, instead of measuring and allocating: the file of `cptquant plan` or `solve`, the folder
            of a quantized model, or a `BitPlan`. It may be from another model of the same architecture.
        group_size: input features that share a scale below 8 bits: 16 to 256, or -1 for one scale per output channel.
            Where it does not divide a layer, the largest of 128, 64, 32 below it that does. 8 bits are per channel.
        symmetric: without zero points. The scale is then signed, which uses all levels. `False` stores zero points,
            which plain transformers 5.23 and 5.24 cannot load with compressed-tensors 0.18 to 0.20 (this package can).
        quality: `"fast"`: rounding to nearest; `"balanced"`: rounding tuned by 100 steps for each block; `"best"`: by
            300.
        rounding: `"nearest"` (equation 1); `"clipped"`: to nearest on ranges that are narrowed by what that costs on
            the inputs; `"gptq"`: on such ranges, with errors compensated by second-order information of each layer's
            inputs (arXiv 2210.17323), also for what rounded layers before it changed in them (arXiv 2504.02692), and of
            the loss by its outputs (arXiv 2505.22988); `"signround"`: offsets and ranges tuned by signed gradients for
            the outputs of each block (arXiv 2309.05516). All but the first take the calibration data and a model in
            memory. By default what the quality says.
        iters: steps of `"signround"` for each block, each on about 1,024 tokens; calibration data beyond that are
            not rounded on. 0 is rounding to nearest. By default what the quality says.
        recover: `"scales"`: after rounding, train the scales and the weights of norms, while the integers stay, to
            predict what the original predicts on the first three quarters of the calibration data; what is best on the
            rest is taken, which may be what was there before. Takes a model in memory.
        metric: what a disturbed or pruned model is measured by: `"loss"`, `"perplexity"`, or `"accuracy"` (classes by
            `label_column`, masked or next tokens), over sequences, so that a ragged last batch counts by its size.
        estimator: of `"tdmpq"`. `"taylor"`: first- and second-order terms of the loss for the rounding errors of every
            bit width, from a backward pass each; `"perturbation"`: the paper's algorithm 3, noise on the weights. By
            default Taylor for the integer program (and the loss), and the perturbation for clusters.
        taylor_samples: tokens that the Taylor estimator measures, in sequences spread evenly over the calibration data.
        perturb: disturb `"all"` quantizable weights of a unit or, as the paper says, the `"first"`.
        perturbation_scale: standard deviation of the disturbance relative to the root mean square of the weight; 0.1 is
            about the error of 4-bit rounding.
        sparsity_levels: shares of a unit's weights that `"pmpq"` prunes; the score is the mean over them.
        cca_components, cca_samples: principal components of each unit, and tokens, that `"cmpq"` correlates.
        dataset: calibration data: `"wikitext2"`, `"c4"` or `"imdb"` from the Hub; a path to a text, JSON Lines or
            Parquet file; a list of strings; a `datasets.Dataset`; token tensors `[sequences, length]`; or `"self"`, the
            default for causal language models: text that the model itself writes. For image classifiers
            `"imagenet-1k"`, `"cifar10"` or `"food101"` from the Hub; a `datasets.Dataset` or Parquet file with a column
            of images; a list of PIL images; or float pixel values `[images, channels, height, width]`, as the model's
            image processor gives them. For models that hear, batches of features as the model's processor gives them:
            a dict of tensors, or a list of such, with labels. None will do if nothing is left to decide: a plan, or one
            bit width, and weights rounded to nearest.
        tokenizer: name, path or object of a tokenizer, or of an image processor; by default the model's own.
        text_column, image_column, label_column: columns of a dataset. Without labels, a classifier is measured against
            its own predictions.
        num_samples: calibration sequences, or images.
        sequence_length: tokens in each, at most what the model can take. (An image has those that it has.)
        batch_size: sequences at a time; by default as many as keep the logits within 256 MiB, or images with 4,096
            patches of 16 × 16 pixels. No score depends on it.
        modules_to_not_convert: names, suffixes or regular expressions of modules to leave alone.
        allow_skipped: accept that most of the weights of the blocks are in modules that cannot be quantized.
        target_runtime: `"vllm"` (on CUDA), `"vllm-cpu"` or `"sglang"`: choose only plans that it loads (`runtimes.py`):
            of `bits` those that its kernels take for all modules of a unit, and one scheme for what it fuses. Clusters
            give a unit the next wider bits that it takes. It needs `granularity="group"` or `"block"`.
        strict: raise an error before anything is rounded, instead of a warning when saving, if the target runtime
            (`"vllm"` if none is named) would not load the checkpoint.
        work_dir: folder where every finished measurement is written at once; a run that was killed goes on from it.
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
        target_bits: float | None = None,
        target_size: int | str | None = None,
        target_compression: float | None = None,
        max_loss_increase: float | None = None,
        bits_override: Mapping[str, int] | None = None,
        quantize_lm_head: int | None = None,
        quantize_embeddings: int | None = None,
        quantize_vision_tower: int | None = None,
        quantize_front_end: int | None = None,
        refine: int = 0,
        regularization: float = 0.0,
        plan: str | os.PathLike[str] | BitPlan | QuantizationRecord | None = None,
        group_size: int = 128,
        symmetric: bool = True,
        quality: str = "balanced",
        rounding: str | None = None,
        iters: int | None = None,
        recover: str | None = None,
        metric: str = "loss",
        estimator: str | None = None,
        taylor_samples: int = 4096,
        perturb: str = "all",
        perturbation_scale: float = 0.1,
        sparsity_levels: tuple[float, ...] | list[float] = (0.3, 0.5, 0.7),
        cca_components: int = 64,
        cca_samples: int = 4096,
        dataset: Any = None,
        tokenizer: Any = None,
        text_column: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        num_samples: int = 128,
        sequence_length: int = 2048,
        batch_size: int | None = None,
        modules_to_not_convert: list[str] | tuple[str, ...] | None = None,
        allow_skipped: bool = False,
        target_runtime: str | None = None,
        strict: bool = False,
        work_dir: str | os.PathLike[str] | None = None,
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        if unknown.pop("quant_method", self.quant_method) != self.quant_method:
            raise ConfigError("the settings are for another quant_method than 'cptquant'")
        if unknown:
            name = next(iter(unknown))
            raise ConfigError(
                f"CPTQuantConfig has no setting {name!r}{nearest_name(name, tuple(f.name for f in fields(Recipe)))}"
            )
        self.method = method
        self.bits = bits
        self.allocation = allocation
        self.granularity = granularity
        self.target_bits = target_bits
        self.target_size = target_size
        self.target_compression = target_compression
        self.max_loss_increase = max_loss_increase
        self.bits_override = bits_override
        self.quantize_lm_head = quantize_lm_head
        self.quantize_embeddings = quantize_embeddings
        self.quantize_vision_tower = quantize_vision_tower
        self.quantize_front_end = quantize_front_end
        self.refine = refine
        self.regularization = regularization
        self.plan = plan
        self.group_size = group_size
        self.symmetric = symmetric
        self.quality = quality
        self.rounding = rounding
        self.iters = iters
        self.recover = recover
        self.metric = metric
        self.estimator = estimator
        self.taylor_samples = taylor_samples
        self.perturb = perturb
        self.perturbation_scale = perturbation_scale
        self.sparsity_levels = sparsity_levels
        self.cca_components = cca_components
        self.cca_samples = cca_samples
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.text_column = text_column
        self.image_column = image_column
        self.label_column = label_column
        self.num_samples = num_samples
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.modules_to_not_convert = modules_to_not_convert
        self.allow_skipped = allow_skipped
        self.target_runtime = target_runtime
        self.strict = strict
        self.work_dir = work_dir
        self.seed = seed
        self.recipe()

    @classmethod
    def paper(cls, method: str, **settings: Any) -> CPTQuantConfig:
        """The paper's own pipeline (arXiv 2412.03599, algorithms 1 to 3 and equation 1): scores of blocks, three
        clusters of their scores for 16, 8 and 4 bits, rounding to nearest on asymmetric grids.

        Args:
            method: `"cmpq"`, `"pmpq"` or `"tdmpq"`.
            settings: others, such as `dataset`; they take precedence.
        """
        literal = {
            "allocation": "kmeans",
            "estimator": "perturbation",
            "perturb": "first",
            "symmetric": False,
            "rounding": "nearest",
        }
        return cls(**{"method": method, **literal, **settings})

    def recipe(self) -> Recipe:
        """The settings, checked and frozen, with the defaults filled in."""
        settings = {field.name: getattr(self, field.name) for field in fields(Recipe)}
        for name in ("bits", "sparsity_levels", "modules_to_not_convert"):
            if not isinstance(settings[name], (list, tuple, type(None))):
                raise ConfigError(f"{name}={settings[name]!r} must be a list")
            settings[name] = settings[name] and tuple(settings[name])
        if self.allocation is None:
            settings["allocation"] = "integer"
        integer = settings["allocation"] == "integer"
        settings["granularity"] = ("group" if integer else "block") if self.granularity is None else self.granularity
        default = "taylor" if integer and self.metric == "loss" else "perturbation"
        settings["estimator"] = default if self.estimator is None else self.estimator
        rounding, iters = QUALITIES.get(str(self.quality), QUALITIES["balanced"])  # a wrong one is found by the recipe
        settings["rounding"] = rounding if self.rounding is None else self.rounding
        settings["iters"] = iters if self.iters is None else self.iters
        settings["target_size"] = _bytes(self.target_size)
        if not isinstance(self.bits_override, (Mapping, type(None))):
            raise ConfigError(f"bits_override={self.bits_override!r} must map patterns of module names to bits")
        settings["bits_override"] = tuple((self.bits_override or {}).items())
        return Recipe(**settings)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values, with `quant_method`."""
        plain = self.recipe().to_dict()
        return {
            "quant_method": self.quant_method,
            **plain,
            "allocation": self.allocation,
            "granularity": self.granularity,
            "estimator": self.estimator,
            "rounding": self.rounding,
            "iters": self.iters,
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


def _bytes(size: Any) -> Any:
    """`"300MB"` → 300,000,000; anything but a string as it is."""
    if not isinstance(size, str):
        return size
    try:
        return convert_file_size_to_int(size.replace(" ", ""))
    except ValueError as error:
        raise ConfigError(f"target_size={size!r} is no size; write it like '300MB' or '3GiB'") from error


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
