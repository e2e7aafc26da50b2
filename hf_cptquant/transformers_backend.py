"""The quantizer that transformers calls: hooks without arithmetic, and their registration.

`from_pretrained` asks two tables which config and quantizer belong to a `quant_method`. We add `cptquant` to both. Our
checkpoints say `compressed-tensors`, so that they load without us; where we are imported, the config entry of that name
is replaced by a class that hands checkpoints with a `cptquant` section to us and all others to the original, untouched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import CompressedTensorsConfig

from .checkpoint import build_skeleton, check_files, finish_loading, is_portable, with_plan_file
from .config import CPTQuantCheckpointConfig, CPTQuantConfig
from .errors import ConfigError, ModelError
from .experts import LinearExperts, without_merging
from .hub import push_to_hub, save_pretrained
from .modules import packed_modules
from .pipeline import Preparation, prepare, quantize_model
from .quantize import dequantize_model
from .record import QuantizationRecord
from .section import read_section, write_section


class CPTQuantHfQuantizer(HfQuantizer):
    """Quantizes a dense model after its weights are loaded, or loads a packed one.

    Attributes:
        record: plan, scores and settings of the model, once it is loaded.
    """

    requires_calibration = False
    quantization_config: CPTQuantConfig
    record: QuantizationRecord
    _preparation: Preparation
    _apart: Sequence[str] = ()  # experts that are loaded as linear layers
    _scales: Mapping[str, torch.dtype] = MappingProxyType({})  # tensor → its format, where packed layers are loaded

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        refuse_sharding(model)
        if self.pre_quantized:
            record = read_section(self.quantization_config.to_dict(), model)
            check_files(checkpoint_files or (), record)
            self.record = with_plan_file(record, checkpoint_files or ())
            build_skeleton(model, self.record)
            self._apart = _experts_apart(model)
            packed = packed_modules(model)
            self._scales = {f"{name}.weight_scale": module.weight_scale.dtype for name, module in packed.items()}
        else:
            with torch.device("cpu"):  # transformers builds the model on the meta device; the data are real
                self._preparation = prepare(model, self.quantization_config.recipe())

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        tokenizer = None
        if self.pre_quantized:
            finish_loading(model)
        else:
            tokenizer = self.quantization_config.tokenizer
            self.record = quantize_model(model, self.quantization_config.recipe(), self._preparation)
            del self._preparation  # the calibration data
            self.quantization_config = CPTQuantCheckpointConfig(write_section(self.record, is_portable(model)))
            model.config.quantization_config = self.quantization_config
            packed = [module.name for module in self.record.plan.packed]
            model._weight_conversions = without_merging(model._weight_conversions, _experts_apart(model), packed)
        model.save_pretrained = partial(save_pretrained, model, self.record, tokenizer)
        model.push_to_hub = partial(push_to_hub, model, self.record, tokenizer)
        model.resize_token_embeddings = partial(resize_token_embeddings, model, self.record)
        model.tie_weights = partial(tie_weights, model)
        model.half, model.float = partial(nn.Module.half, model), partial(nn.Module.float, model)  # theirs refuse
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *model: PreTrainedModel) -> list[Any]:
        """What was packed by itself is loaded so. (Only newer versions of transformers give the model.)"""
        packed = [name.removesuffix(".weight_scale") for name in self._scales]
        return super().update_weight_conversions(without_merging(weight_conversions, self._apart, packed), *model)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Scales keep the format of the weights that they belong to, where the model's class asks for float32 by a name
        that is part of theirs, too (HYV4's `scale`)."""
        return self._scales.get(converter.target_patterns[0], super().get_new_dtype(converter, param, dtype))

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Make the model dense, in place, in its own dtype unless another is asked for.

        (The base class would cast to `config.dtype`, which `.to()` does not keep up to date.) Where k-bit preparation
        of adapters has cast all that is not packed to float32, so is what was packed.
        """
        dequantized = set(dequantize_model(model))
        others = {
            parameter.dtype
            for name, parameter in model.named_parameters()
            if name.rpartition(".")[0] not in dequantized and parameter.is_floating_point()
        }
        dtype = torch.float32 if dtype is None and others == {torch.float32} else dtype
        del model.save_pretrained, model.push_to_hub, model.resize_token_embeddings, model.tie_weights
        del model.half, model.float
        self.remove_quantization_config(model)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top can be trained: gradients reach the inputs of packed layers."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _experts_apart(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LinearExperts)]


def resize_token_embeddings(
    model: PreTrainedModel,
    record: QuantizationRecord,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> nn.Module:
    """As transformers' own, where the matrices with a row for each token are dense.

    Raises:
        ModelError: one is packed, and would have another number of rows.
    """
    of_tokens = (model.get_input_embeddings(), model.get_output_embeddings())
    packed = [module for module in record.plan.packed if model.get_submodule(module.name) in of_tokens]
    unchanged = pad_to_multiple_of is None and new_num_tokens in {None, *(module.out_features for module in packed)}
    if packed and not unchanged:
        raise ModelError(
            f"{packed[0].name} is packed with {packed[0].out_features} rows; resize the full-precision model before it"
            " is quantized, or call dequantize() first"
        )
    return type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, mean_resizing)


def tie_weights(model: PreTrainedModel, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
    """As transformers' own, for the parameters that are left to be tied. By its class a model may have more."""
    type(model).tie_weights(model, missing_keys, recompute_mapping=False)


def refuse_sharding(model: PreTrainedModel) -> None:
    """Raise `ConfigError` where transformers would shard the model's parameters over processes.

    It slices parameters along one dimension; a packed weight is several buffers, sliced along different ones, and a
    slice need not begin at a group or at a word.
    """
    distributed = getattr(model.config, "distributed_config", None)
    for size in ("tp_size", "ep_size", "fsdp_size", "dp_replicate_size", "pp_size"):
        if (getattr(distributed, size, None) or 1) > 1:
            raise ConfigError(
                f"{size}={getattr(distributed, size)}: packed weights cannot be sharded over processes (tp_plan or"
                " distributed_config); load with device_map='auto', which puts whole layers on several devices"
            )


class CompressedTensorsDispatch(CompressedTensorsConfig):
    """Stands for `compressed-tensors` in transformers' table and decides whose checkpoint it is."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        owner = CPTQuantConfig if "cptquant" in config_dict else CompressedTensorsConfig
        return owner.from_dict(config_dict, return_unused_kwargs, **kwargs)


def register() -> None:
    """Enter config and quantizer into transformers' tables. Doing it again, or after a reload, changes nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING["cptquant"] = CPTQuantConfig
    AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] = CompressedTensorsDispatch
    AUTO_QUANTIZER_MAPPING["cptquant"] = CPTQuantHfQuantizer
