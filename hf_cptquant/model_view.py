"""What a model looks like to the rest of the package: blocks, quantizable modules, fused groups.

The one file that knows how transformers builds models; everybody else works on the frozen `ModelView`. It reads
structure only (names, classes, shapes), so it works on the meta device too, which is how a checkpoint is
validated before its weights are read.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from .errors import ModelError
from .experts import LinearExperts, fused_experts, matrices_of, projection_names, unused_bytes
from .modules import CONVOLUTIONS, kind_of, matrix_of, padding_of
from .plan import LINEAR, UNTOUCHED, BitPlan, LeftAlone, ModulePlan
from .runtimes import matrices
from .tied import TIED_CLASSES

ROUTERS = {"gate", "router", "shared_expert_gate"}  # what modules beside the experts are called that choose among them
CROSS_ATTENTION = "cross_attn"  # what blocks have that only run where there are images (Mllama's)
FEWEST_INPUTS = 16  # for which a scale is worth its bytes: the smallest group
ALL_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # those that cannot be packed included
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def _classes(table: Mapping[str, str | tuple[str, ...]]) -> frozenset[str]:
    """The classes that a table of transformers lists, without those that compute no loss."""
    listed = (names if isinstance(names, tuple) else (names,) for names in table.values())
    return frozenset(name for names in listed for name in names if not name.endswith("WithTeacher"))


# What a model is trained to do → the classes that transformers lists for it. A class
# that is listed twice (BART's, for masked language models, too) has the first task.
TASKS = {
    "causal-lm": _classes(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "seq2seq-lm": _classes(modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "masked-lm": _classes(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "sequence-classification": _classes(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    "image-classification": _classes(modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    "speech-seq2seq": _classes(modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES),
    "ctc": _classes(modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES),
    "audio-classification": _classes(modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES),
}
# Language models that read images, too. They are calibrated on text alone, as causal language models.
READ_IMAGES = _classes(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
CLASSIFIERS = ("sequence-classification", "image-classification", "audio-classification")  # a label for all of an input
HEARING = ("speech-seq2seq", "ctc", "audio-classification")  # whose data are batches of features, and which are not
EVALUATED = tuple(task for task in TASKS if task not in HEARING)  # evaluated, as these are


@dataclass(frozen=True)
class QuantizableModule:
    """A module with a matrix inside a block, or one outside of them that was asked for.

    Attributes:
        name: dotted name in the model.
        block: name of its block; its own name outside of them.
        out_features, in_features: shape as a map from inputs to outputs (`Conv1D` stores the transpose).
        element_size: bytes per weight as loaded.
        kind: name of its class.
        shared_with: names of the modules that share its weight.
    """

    name: str
    block: str
    out_features: int
    in_features: int
    element_size: int
    kind: str = LINEAR
    shared_with: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelView:
    """The structure of one model.

    Attributes:
        blocks: names of the transformer layers, in the order in which they are defined.
        modules: quantizable modules in the same order.
        left: modules with a matrix that are not to be quantized, with the reason.
        other_bytes: bytes of all parameters and saved buffers except the quantizable weights, tied ones once.
    """

    blocks: tuple[str, ...]
    modules: tuple[QuantizableModule, ...]
    left: tuple[LeftAlone, ...]
    other_bytes: int

    def plan(self, granularity: str) -> BitPlan:
        """The undecided plan (16 bits everywhere) whose units have the given granularity."""
        modules = tuple(
            ModulePlan(
                module.name,
                module.block,
                unit,
                module.out_features,
                module.in_features,
                module.element_size,
                UNTOUCHED,
                module.kind,
                module.shared_with,
            )
            for unit, members in units(self, granularity).items()
            for module in members
        )
        return BitPlan(modules, self.left, self.other_bytes)


def view_model(
    model: PreTrainedModel,
    modules_to_not_convert: Sequence[str] | None = None,
    allow_skipped: bool = False,
    outside: Collection[str] = (),
) -> ModelView:
    """Find the blocks of a model and what in them can be quantized.

    Args:
        model: any transformers model, on any device (meta included).
        modules_to_not_convert: names, suffixes or regular expressions as in transformers' own quantizers.
        allow_skipped: accept that more than half of the weights of the blocks have a form that is not supported.
        outside: names of modules outside the blocks that are to be quantized, too. With an embedding go all that share
            its weight.

    Raises:
        ModelError: nothing to quantize, or most of the blocks' weights would be skipped unasked.
    """
    in_language = _language_part(model)
    blocks = tuple(name for name in find_blocks(model) if in_language(name))
    for_images = tuple(f"{name}." for name in _blocks_for_images(model))
    tied = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
    float32_modules = (model._keep_in_fp32_modules or set()) | (model._keep_in_fp32_modules_strict or set())
    mixtures = _mixtures(model)
    kinds = {name: kind_of(module) for name, module in model.named_modules()}
    sharing = {name: sharing_with(model, name) for name in outside if kinds.get(name) is nn.Embedding}
    modules, left, skipped = [], [], []
    for name, kind, parameters in _with_matrices(model):
        if any(name in others for others in sharing.values()):
            continue  # packed with the embedding
        block = next((block for block in blocks if name.startswith(block + ".")), None)
        weights = sum(parameter.numel() for parameter in parameters)
        if f"{name}.weight" in model.all_tied_weights_keys:
            weights = 0  # counted where they come from
        if not should_convert_module(name, modules_to_not_convert):
            reason = "named in modules_to_not_convert"
        elif f"{name}.weight" in tied and name not in sharing:
            reason = "shares its weight with another module"
        elif (unfit := _unfit(model, sharing.get(name, ()), modules_to_not_convert)) is not None:
            reason = f"shares its weight with {unfit}"
        elif block is None and name not in outside and name.startswith(for_images):
            reason = "reads images, which calibration on text does not show it"
        elif block is None and name not in outside:
            reason = "outside the blocks"
        elif any(name.startswith(mixture) and ROUTERS & set(name[len(mixture) :].split(".")) for mixture in mixtures):
            reason = "routes tokens to experts"
        elif float32_modules.intersection(name.split(".")):
            reason = "kept in float32 by the model"
            skipped.append(LeftAlone(name, reason, weights))
        elif kind in CONVOLUTIONS and (odd := _odd_convolution(model.get_submodule(name))) is not None:
            reason = odd
            skipped.append(LeftAlone(name, reason, weights))
        elif kind not in (nn.Linear, Conv1D, *CONVOLUTIONS) and not (kind is nn.Embedding and block is None):
            reason = f"{kind.__name__} is not supported"
            skipped.append(LeftAlone(name, reason, weights))
        elif (in_features := matrix_of(kind, parameters[0]).shape[1]) < FEWEST_INPUTS:
            reason = f"fewer than {FEWEST_INPUTS} inputs, too few for a scale"
            skipped.append(LeftAlone(name, reason, weights))
        else:
            (weight,) = parameters
            sizes = matrix_of(kind, weight).shape[0], in_features, weight.element_size()
            of_module = kind.__name__, sharing.get(name, ())
            modules.append(QuantizableModule(name, block or name, *sizes, *of_module))
            continue
        left.append(LeftAlone(name, reason, weights))

    if not modules:
        reasons = ", ".join(
            f"{count} × {reason}" for reason, count in Counter(module.reason for module in left).items()
        )
        raise ModelError(f"{type(model).__name__} has nothing to quantize ({reasons or 'no matrices'})")
    if not allow_skipped:
        inside = [module for module in modules if module.block != module.name]
        unasked = [module for module in skipped if module.name not in outside]
        _refuse_skipping(model, sum(module.out_features * module.in_features for module in inside), unasked)
    quantizable = sum(module.out_features * module.in_features * module.element_size for module in modules)
    return ModelView(blocks, tuple(modules), tuple(left), _saved_bytes(model) - quantizable)


def sharing_with(model: PreTrainedModel, name: str) -> tuple[str, ...]:
    """Names of the modules that have the same weight as one of them (`tie_word_embeddings`), in the model's order."""
    own, tied = f"{name}.weight", model.all_tied_weights_keys
    source = tied.get(own, own)
    weights = {source, *(target for target, other in tied.items() if other == source)} - {own}
    names = {weight.rpartition(".")[0] for weight in weights}
    return tuple(other for other, _ in model.named_modules() if other in names)


def _unfit(model: PreTrainedModel, sharing: Sequence[str], modules_to_not_convert: Sequence[str] | None) -> str | None:
    """The first of some modules that cannot compute with a packed embedding's weight, or is not to, with the reason."""
    for name in sharing:
        if not should_convert_module(name, modules_to_not_convert):
            return f"{name}, which is named in modules_to_not_convert"
        if (kind := kind_of(model.get_submodule(name))) not in TIED_CLASSES:
            return f"{name}, a {kind.__name__}, which cannot compute with a packed weight"
    return None


def _odd_convolution(module: nn.Module) -> str | None:
    """Why a convolution is left alone, or None. A depthwise one has few weights for each scale."""
    assert isinstance(module, CONVOLUTIONS)
    if module.groups == module.in_channels > 1:
        return "a depthwise convolution"
    if module.padding_mode != "zeros" or padding_of(module) is None:
        return f"{type(module).__name__} with padding={module.padding!r} of {module.padding_mode} is not supported"
    return None


def output_embedding(model: PreTrainedModel) -> str:
    """Name of the linear layer that predicts tokens.

    Raises:
        ModelError: there is none, or it shares its weight with another module.
    """
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is None or kind_of(head) is not nn.Linear:
        raise ModelError(
            f"{type(model).__name__} has no linear layer that predicts tokens (get_output_embeddings()); leave"
            " quantize_lm_head out"
        )
    if sharing := sharing_with(model, name):
        raise ModelError(
            f"{name} shares its weight with {sharing[0]} (tie_word_embeddings): quantize_embeddings packs it for both."
            " Give that instead of quantize_lm_head, or save the model with weights of their own:"
            " config.tie_word_embeddings=False"
        )
    return name


def input_embedding(model: PreTrainedModel) -> str:
    """Name of the module that looks tokens up.

    Raises:
        ModelError: there is none, or it is another one than `nn.Embedding`, plain or with scaled rows.
    """
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    name = next((name for name, module in model.named_modules() if module is embedding), None)
    if name is None or kind_of(embedding) is not nn.Embedding or embedding.max_norm is not None:
        found = "nothing" if name is None else f"{name}, a {type(embedding).__name__},"
        raise ModelError(
            f"{type(model).__name__} looks tokens up in {found} not nn.Embedding; leave quantize_embeddings out"
        )
    return name


def vision_tower(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the linear layers in the blocks with which a language model reads images or sound.

    Raises:
        ModelError: there are none.
    """
    for_images = tuple(f"{name}." for name in _blocks_for_images(model))
    linear = (name for name, module in model.named_modules() if kind_of(module) in (nn.Linear, Conv1D))
    if not (names := tuple(name for name in linear if name.startswith(for_images))):
        raise ModelError(
            f"{type(model).__name__} has no blocks of linear layers that read images; leave quantize_vision_tower out"
        )
    return names


def front_end(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the linear layers and convolutions outside the blocks that are defined before the last block: what leads
    to a stack of blocks, or from one to the next. Heads, and what pools, are defined behind them.

    Raises:
        ModelError: there are none.
    """
    in_blocks = tuple(f"{name}." for name in (*find_blocks(model), *_blocks_for_images(model)))
    names = [name for name, _ in model.named_modules()]
    last = max((index for index, name in enumerate(names) if name.startswith(in_blocks)), default=0)
    head = model.get_output_embeddings()
    found = (
        name
        for name in names[:last]
        if not name.startswith(in_blocks)
        and isinstance(module := model.get_submodule(name), (nn.Linear, Conv1D, *ALL_CONVOLUTIONS))
        and module is not head
    )
    if not (front := tuple(found)):
        raise ModelError(
            f"{type(model).__name__} has no linear layers or convolutions in front of its blocks; leave"
            " quantize_front_end out"
        )
    return front


def _language_part(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether a block, by its name, reads text: all do but those that language models have for images."""
    if type(model).__name__ not in READ_IMAGES:
        return lambda _: True
    start, towers = _decoder(model), _towers(model)
    if _encodes_both(model):
        return lambda name: not name.startswith(towers)
    children = {name: dict(model.get_submodule(name).named_children()) for name in find_blocks(model)}
    crossing = {name for name, of_block in children.items() if CROSS_ATTENTION in of_block}
    return lambda name: name.startswith(start) and not name.startswith(towers) and name not in crossing


def _encodes_both(model: PreTrainedModel) -> bool:
    """Whether an encoder reads text and images, and a decoder answers, as those of T5Gemma 2 do."""
    name = type(model).__name__
    return name in READ_IMAGES and task_of_class(name) == "seq2seq-lm"


def _decoder(model: PreTrainedModel) -> str:
    """Prefix of the names of the decoder's modules."""
    decoder = model.get_decoder()
    return next((f"{name}." for name, module in model.named_modules() if name and module is decoder), "")


def _towers(model: PreTrainedModel) -> tuple[str, ...]:
    """Prefixes of the names of what a language model reads images or sound with."""
    whole = model.get_encoder() if _encodes_both(model) else model
    encoders = (whole.get_encoder(modality) for modality in ("image", "video", "audio"))
    found, decoder = {id(encoder) for encoder in encoders if encoder is not whole}, _decoder(model)
    prefixes = (f"{name}." for name, module in model.named_modules() if name and id(module) in found)
    return tuple(prefix for prefix in prefixes if not decoder.startswith(prefix))


def _blocks_for_images(model: PreTrainedModel) -> tuple[str, ...]:
    """Blocks with which a language model reads images or sound; of a tower whose layers transformers has not marked
    (Mllama's), the members of all its lists."""
    if type(model).__name__ not in READ_IMAGES:
        return ()
    in_language = _language_part(model)
    marked = [name for name in find_blocks(model) if not in_language(name)]
    unmarked = tuple(tower for tower in _towers(model) if not any(name.startswith(tower) for name in marked))
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    in_lists = (f"{name}.{index}" for name in lists if name.startswith(unmarked) for index in range(len(lists[name])))
    return (*marked, *in_lists)


def _with_matrices(model: PreTrainedModel) -> Iterator[tuple[str, type[nn.Module], list[Tensor]]]:
    """Name, class and matrices of the modules that have some; each projection of fused experts as the linear layer that
    it becomes."""
    fused = fused_experts(model)
    for name, module in model.named_modules():
        if name in fused:
            for leaf, weight, _ in matrices_of(module, projection_names(model, name, module)):
                yield f"{name}.{leaf}", nn.Linear, [weight]
        elif parameters := [parameter for parameter in module.parameters(recurse=False) if parameter.dim() > 1]:
            yield name, kind_of(module), parameters


def _mixtures(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the modules that hold experts, and beside them what routes tokens to them."""
    apart = (name for name, module in model.named_modules() if isinstance(module, LinearExperts))
    names = [*fused_experts(model), *apart]
    return tuple(name.rpartition(".")[0] + "." for name in names)


def _saved_bytes(model: PreTrainedModel) -> int:
    """Bytes of the tensors that `save_pretrained` writes: tied ones once, also before they are tied; of experts what is
    written when they are apart."""
    kept = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in model.all_tied_weights_keys
    }
    written = sum(
        tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in kept.values()}.values()
    )
    return written - sum(map(unused_bytes, fused_experts(model).values()))


def _refuse_skipping(model: PreTrainedModel, quantizable: int, skipped: Sequence[LeftAlone]) -> None:
    weights = sum(module.weights for module in skipped)
    if weights > quantizable:
        largest = max(skipped, key=lambda module: module.weights)
        raise ModelError(
            f"{weights / (weights + quantizable):.0%} of the weights in the blocks of {type(model).__name__} would"
            f" be skipped,"
            f" e.g. {largest.name}: {largest.reason}; pass allow_skipped=True to quantize only the rest"
        )


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the transformer layers: the outermost `GradientCheckpointingLayer`s, or else the members of the
    longest `ModuleList` whose members are all of one class, and of all others with members of that class (the stages of
    ConvNeXt)."""
    layers = [name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    outermost = tuple(name for name in layers if not any(name.startswith(other + ".") for other in layers))
    if outermost:
        return outermost
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(member) for member in module}) == 1
    }
    longest = max(lists.values(), key=len, default=None)
    if longest is None:
        return ()
    alike = {name: module for name, module in lists.items() if type(module[0]) is type(longest[0])}
    return tuple(f"{name}.{index}" for name, module in alike.items() for index in range(len(module)))


def units(view: ModelView, granularity: str) -> dict[str, tuple[QuantizableModule, ...]]:
    """Unit name → its modules, in the model's order.

    `"block"`: the paper's layer. `"group"`: projections that inference engines fuse share a unit, and so do all
    projections of the experts of a block, which they stack. `"module"`: each alone.
    """
    fused = matrices(module.name for module in view.modules)
    grouped: dict[str, tuple[QuantizableModule, ...]] = {}
    for module in view.modules:
        unit = {"block": module.block, "module": module.name}.get(granularity, fused[module.name])
        grouped[unit] = (*grouped.get(unit, ()), module)
    return grouped


def task_of(model: nn.Module) -> str | None:
    """A name in `TASKS`, or None for a class without such a head.

    A language model that reads images, too, is `"causal-lm"`, or None if it cannot be run on text alone, or what it is
    listed as beside that."""
    name = type(model).__name__
    listed = task_of_class(name)
    return None if name in READ_IMAGES and listed == "causal-lm" and _needs_images(model) else listed


def predicts_one_class(model: PreTrainedModel) -> bool:
    """Whether each prediction is one class out of several; that of a regression is none, and that of some classifiers
    any number of them."""
    single = model.config.problem_type in (None, "single_label_classification")
    return task_of(model) not in CLASSIFIERS or (single and model.config.num_labels > 1)


def task_of_class(name: str) -> str | None:
    """As `task_of`, by the name of the class."""
    listed = next((task for task, classes in TASKS.items() if name in classes), None)
    return "causal-lm" if listed is None and name in READ_IMAGES else listed


def head_of(model: nn.Module) -> str | None:
    """As `head_of_class`."""
    return head_of_class(type(model).__name__)


def head_of_class(name: str) -> str | None:
    """As `task_of_class`, but `"image-text-to-text"` for a language model that reads images, too."""
    return "image-text-to-text" if name in READ_IMAGES else task_of_class(name)


def _needs_images(model: nn.Module) -> bool:
    """Whether the text is only the answer to what an encoder has read, or `forward` has to be given more than text."""
    required = {
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
    return bool(model.config.is_encoder_decoder or required - {"input_ids"})


def read_config(model: str) -> PreTrainedConfig:
    """The config of a model by its name on the Hub or its folder. Raises `ModelError` if it cannot be read."""
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ModelError(f"no model at {model!r}: {error}") from error


def class_named_in(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that a config names, if it is one that computes a loss."""
    named = next((name for name in config.architectures or () if task_of_class(name)), None)
    return None if named is None else getattr(transformers, named)


def hub_name_of(model: PreTrainedModel) -> str | None:
    """The model's name on the Hub, or None if it came from a folder or was made in memory."""
    name = model.name_or_path
    return name if HUB_NAME.fullmatch(name) and not Path(name).exists() else None


def max_length_of(model: PreTrainedModel) -> int | None:
    """Positions that the model has embeddings for, or None if its config sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
