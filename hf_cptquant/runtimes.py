"""What inference engines ask of a checkpoint, as frozen rules: (plan, runtime) → what it would not load, and the change
that helps.

An engine keeps projections of the same inputs (q/k/v, gate/up, the experts of a layer) as one matrix, which has one
scheme, and its kernels take certain bit widths, group sizes and shapes. None of that is in the format, so a checkpoint
can be valid and yet fail when it is loaded, after a long quantization. The rules were read in the sources of vLLM
0.32.0 and SGLang 0.5.23; nothing of either is imported.

Both find the scheme of a fused matrix by the exact names of its parts: all of them in `ignore`, or all of them among
the `targets` of `config_groups`, of which the first decides for all (vLLM
`compressed_tensors/utils.py: should_ignore_layer, find_matched_target`; SGLang has the same functions, and raises where
a name is in neither). A difference in bits or groups is found when the shapes of the tensors do not fit. Experts must
agree in all projections, which are looked up as `gate_proj`, `up_proj` and `down_proj` whatever the model calls them
(`CompressedTensorsMoEMethod.get_moe_method`).

The head, the matrix that predicts tokens, has its rows padded to a multiple of 64 before they are dealt out to ranks
(`VocabParallelEmbedding`). It takes packed weights where its own name is among the targets, and the model's class
gives it the quantization config (vLLM `compressed_tensors.py: get_quant_method`, SGLang `get_lm_head_scheme`), which
most do; those that do not, such as OPT's, find a packed head nowhere to put and stop. Packed embeddings are looked up
by vLLM alone, and by few of its classes (`compressed_tensors_embedding.py`), Llama's not among them.

Kernels that only some GPUs or installations have (Machete, Exllama, Conch, Triton, Humming, which takes all widths)
are not counted on: what passes runs on Marlin, which every NVIDIA GPU since Turing (vLLM) or Ampere (SGLang) has.
Signed scales are safe: the kernels multiply by them. The exception has to be asked for: int8 activations for Marlin
(`VLLM_MARLIN_INPUT_DTYPE=int8`) divide by the largest scale, as if none were negative.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from .errors import PlanError
from .plan import EMBEDDING, PER_CHANNEL, UNTOUCHED, BitPlan, LayerScheme, ModulePlan

# Projections of the same inputs that inference engines fuse into one matrix: (name of the matrix, names of its parts).
# Where a model has them fused already (`qkv_proj`, `c_attn`, `gate_up_proj`, …) they are one module.
FUSED_GROUPS: tuple[tuple[str, frozenset[str]], ...] = (
    ("qkv_proj", frozenset({"q_proj", "k_proj", "v_proj"})),
    ("qkv_proj", frozenset({"query_proj", "key_proj", "value_proj"})),
    ("qkv", frozenset({"query", "key", "value"})),
    ("qkv", frozenset({"q", "k", "v"})),
    ("qkv", frozenset({"Wq", "Wk", "Wv"})),
    ("qkv", frozenset({"q_lin", "k_lin", "v_lin"})),
    ("qkv", frozenset({"project_q", "project_k", "project_v"})),
    ("qkv_a_proj", frozenset({"q_a_proj", "kv_a_proj_with_mqa"})),
    ("in_proj_qkvz", frozenset({"in_proj_qkv", "in_proj_z"})),
    ("in_proj_ba", frozenset({"in_proj_b", "in_proj_a"})),
    ("gate_up_proj", frozenset({"gate_proj", "up_proj"})),
    ("gate_up_proj", frozenset({"w1", "w3"})),
    ("wi", frozenset({"wi_0", "wi_1"})),
)
EXPERT = re.compile(r"\b(experts|input_linear|output_linear)\.\d+\..*")  # the others are JetMoE's lists
EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")  # what engines call them when they look for the scheme

# Projections whose inputs are split over the ranks of tensor parallelism (`RowParallelLinear` in vLLM's and SGLang's
# models); the outputs of all others are.
ROW_PARALLEL = frozenset(
    {"o_proj", "out_proj", "down_proj", "fc2", "dense", "dense_4h_to_h", "c_proj", "wo", "Wo", "w2", "fc_out"}
)
WORD = 32
HEAD_ROWS = 64  # `DEFAULT_VOCAB_PADDING_SIZE` of vLLM's and SGLang's vocab_parallel_embedding.py


@dataclass(frozen=True)
class Runtime:
    """What an inference engine takes on one kind of hardware.

    Attributes:
        title: its name in a sentence.
        kernel: of its kernels, the one that the rules are of.
        symmetric_bits, asymmetric_bits: bit widths without and with zero points, ascending; 16 always goes.
        group_sizes: the sizes that go; None for every even one. -1 (per channel) always goes.
        tiles: (multiple of output features, multiple of input features) of the matrix that one rank has; one pair must
            fit.
    """

    title: str
    kernel: str
    symmetric_bits: tuple[int, ...]
    asymmetric_bits: tuple[int, ...]
    group_sizes: tuple[int, ...] | None
    tiles: tuple[tuple[int, int], ...]

    def takes_bits(self, bits: int, symmetric: bool) -> bool:
        """Whether the kernel, or no kernel (16), takes a bit width."""
        return bits in (*(self.symmetric_bits if symmetric else self.asymmetric_bits), UNTOUCHED.bits)

    def takes_group_size(self, size: int) -> bool:
        """Whether the kernel takes a group size, -1 for one scale per output channel included."""
        return size == PER_CHANNEL or (size % 2 == 0 if self.group_sizes is None else size in self.group_sizes)

    @property
    def bits_in_words(self) -> str:
        """`"4 and 8 bits (4 with zero points)"`."""
        with_zero_points = _listed(map(str, self.asymmetric_bits))
        same = self.symmetric_bits == self.asymmetric_bits
        return (
            f"{_listed(map(str, self.symmetric_bits))} bits{'' if same else f' ({with_zero_points} with zero points)'}"
        )

    @property
    def group_sizes_in_words(self) -> str:
        """`"-1, 32, 64 and 128"`."""
        return "-1 and every even number" if self.group_sizes is None else _listed(map(str, (-1, *self.group_sizes)))


RUNTIMES = {
    # marlin_utils.py: query_marlin_supported_quant_types, MARLIN_SUPPORTED_GROUP_SIZES; marlin.py: can_implement, which
    # pads shapes that fit no tile; compute capability 7.5
    "vllm": Runtime("vLLM on CUDA", "Marlin", (4, 8), (4,), (32, 64, 128), ((1, 1),)),
    # kernels/linear/mixed_precision/cpu.py: can_implement; the model computes in bfloat16 or float16
    "vllm-cpu": Runtime("vLLM on CPUs", "CPUWNA16", (4,), (4,), None, ((32, 32),)),
    # compressed_tensors_wNa16.py, which alone is for these checkpoints, on CUDA only; marlin_utils.py; gptq_marlin.cuh:
    # is_valid_config, without padding; compute capability 8.0
    "sglang": Runtime("SGLang", "Marlin", (4, 8), (4,), (32, 64, 128), ((64, 128), (128, 64))),
}
SERVED_TASK = "causal-lm"


@dataclass(frozen=True)
class Problem:
    """One thing that a runtime does not load.

    Attributes:
        modules: those that share the matrix; none if it is the model as a whole.
        rule: what the runtime asks for, and what is there instead.
        change: what to do, in a clause.
        scheme: what to give to all of the modules, or None if no scheme helps.
    """

    modules: tuple[str, ...]
    rule: str
    change: str
    scheme: LayerScheme | None = None

    def __str__(self) -> str:
        subject = self.modules[0] if self.modules else "the model"
        parent = subject.rpartition(".")[0]
        others = [name.removeprefix(f"{parent}.") for name in self.modules[1:3]]
        more = len(self.modules) - 3
        with_others = f" (with {', '.join(others)}{f' and {more} more' if more > 0 else ''})" if others else ""
        return f"{subject}{with_others}: {self.rule}; {self.change}"


def fused_matrix(name: str, siblings: Collection[str]) -> str:
    """The name of the matrix that a module is part of in inference engines.

    Args:
        name: dotted name of the module.
        siblings: last parts of the names of all modules with the same parent, its own included.

    Returns:
        That of the fused matrix if all of its parts are there, that of the list of experts, or the module's own.
    """
    if EXPERT.search(name):
        return EXPERT.sub(r"\1", name)
    parent, _, leaf = name.rpartition(".")
    fused = (matrix for matrix, parts in FUSED_GROUPS if leaf in parts and parts <= set(siblings))
    return ".".join(filter(None, (parent, next(fused, leaf))))


def matrices(names: Iterable[str]) -> dict[str, str]:
    """Module name → `fused_matrix`, for all modules of a model."""
    names = tuple(names)
    siblings: dict[str, set[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        siblings.setdefault(parent, set()).add(leaf)
    return {name: fused_matrix(name, siblings[name.rpartition(".")[0]]) for name in names}


def model_problems(task: str | None, portable: bool, runtime: Runtime) -> tuple[Problem, ...]:
    """What keeps a runtime from loading a model with any plan.

    Args:
        task: see `model_view.TASKS`. The rules are those of causal language models: others have other names in vLLM
            (BERT's attention) or are not there (T5).
        portable: whether the checkpoint is in the format of compressed-tensors.
        runtime: one of `RUNTIMES`.
    """
    found = []
    if task != SERVED_TASK:
        found.append(Problem((), f"{runtime.title} is only known to load causal language models", "use transformers"))
    if not portable:
        rule = f"{runtime.title} reads the format of compressed-tensors, in which only linear layers are written"
        found.append(Problem((), rule, "use transformers with hf_cptquant"))
    return tuple(found)


def problems(plan: BitPlan, runtime: Runtime, tensor_parallel: int = 1) -> tuple[Problem, ...]:
    """What a runtime would not load of a plan. What it takes is told by `Runtime`; besides, parts of a matrix must have
    one scheme, and every rank whole groups and whole words.

    Args:
        plan: finished.
        runtime: one of `RUNTIMES`.
        tensor_parallel: ranks that share each matrix equally. Whether the heads can be shared is the model's affair.

    Returns:
        The first problem of each matrix, in the plan's order. Giving the modules the scheme that it names solves it.
    """
    matrix_of = matrices((*(module.name for module in plan.modules), *(module.name for module in plan.left)))
    left = {matrix_of[module.name]: module.name for module in plan.left}
    members: dict[str, list[ModulePlan]] = {}
    for module in plan.modules:
        members.setdefault(matrix_of[module.name], []).append(module)
    found = (
        _problem_of(parts, left.get(matrix), runtime, tensor_parallel)
        for matrix, parts in members.items()
        if any(module.scheme.packed for module in parts)
    )
    return tuple(problem for problem in found if problem is not None)


def _problem_of(parts: Sequence[ModulePlan], left: str | None, runtime: Runtime, ranks: int) -> Problem | None:
    """The first rule that the parts of a matrix break.

    Args:
        parts: its modules in the plan, some of them packed.
        left: a part that no plan touches, if there is one.
    """
    names = tuple(module.name for module in parts)
    schemes = sorted({module.scheme for module in parts})
    if any(EXPERT.search(name) and name.rpartition(".")[2] not in EXPERT_PROJECTIONS for name in names):
        rule = f"{runtime.title} asks for the scheme of experts by the names {_listed(EXPERT_PROJECTIONS)}"
        return Problem(names, rule, "give 16 bits", UNTOUCHED)
    if any(module.kind == EMBEDDING for module in parts):
        rule = f"{runtime.title} is not known to look tokens up in packed embeddings"
        return Problem(names, rule, "leave quantize_embeddings out", UNTOUCHED)
    if left is not None:
        rule = f"{runtime.title} keeps {left} in the same matrix, which is left alone, so all of it must be"
        return Problem(names, rule, "give 16 bits, or do not leave that one alone", UNTOUCHED)
    if (unsplit := _unsplittable(parts, ranks)) is not None:
        return Problem(names, unsplit, "use fewer ranks")
    if len(schemes) > 1:
        rule = f"{runtime.title} keeps them in one matrix of one scheme, and they have {_listed(map(str, schemes))}"
    elif (broken := _broken(parts, schemes[0], runtime, ranks)) is not None:
        rule = broken
    else:
        return None
    scheme = nearest_scheme(parts, schemes[-1], runtime, ranks)
    fewer = " or use fewer ranks" if ranks > 1 and len(schemes) == 1 else ""
    return Problem(names, rule, f"give {'all ' if len(parts) > 1 else ''}{_in_words(scheme)}{fewer}", scheme)


def nearest_scheme(parts: Sequence[ModulePlan], wanted: LayerScheme, runtime: Runtime, ranks: int) -> LayerScheme:
    """The scheme that a runtime takes for all parts of a matrix with bits as near as possible above those wanted, or
    else below, and with the most alike grid."""
    sizes = (PER_CHANNEL, 16, 32, 64, 128, 256, wanted.group_size)
    bits = sorted({*runtime.symmetric_bits, *runtime.asymmetric_bits})
    candidates = [LayerScheme(*choice) for choice in product(bits, sizes, (True, False))]
    fitting = [scheme for scheme in candidates if _broken(parts, scheme, runtime, ranks) is None]
    return min(
        (*fitting, UNTOUCHED),
        key=lambda scheme: (
            scheme.bits < wanted.bits,
            abs(scheme.bits - wanted.bits),
            scheme.symmetric != wanted.symmetric,
            (scheme.group_size == PER_CHANNEL) != (wanted.group_size == PER_CHANNEL),
            scheme.group_size > wanted.group_size,
            abs(scheme.group_size - wanted.group_size),
        ),
    )


def _unsplittable(parts: Sequence[ModulePlan], ranks: int) -> str | None:
    """Why no checkpoint of the model, quantized or not, can be split over so many ranks."""
    for module in parts:
        what, size = ("input", module.in_features) if _is_row_parallel(module) else ("output", _rows(module))
        if size % ranks:
            return f"its {size} {what} features cannot be split over {ranks} ranks"
    return None


def _broken(parts: Sequence[ModulePlan], scheme: LayerScheme, runtime: Runtime, ranks: int) -> str | None:
    """The rule that the parts of a matrix would break if all had a scheme, or None."""
    if not scheme.packed:
        return None
    if not runtime.takes_bits(scheme.bits, scheme.symmetric):
        return f"{runtime.kernel} takes {runtime.bits_in_words}, not {scheme}"
    if not runtime.takes_group_size(scheme.group_size):
        return f"{runtime.kernel} takes groups of {runtime.group_sizes_in_words}, not {scheme.group_size}"
    share = "" if ranks == 1 else f" on each of {ranks} ranks"
    in_a_word = WORD // scheme.bits
    shapes = [_share(module, ranks) for module in parts]
    for module, (out_features, in_features) in zip(parts, shapes, strict=True):
        if scheme.group_size != PER_CHANNEL and in_features % scheme.group_size:
            return f"{in_features} input features{share} are no whole groups of {scheme.group_size}"
        if in_features % in_a_word:
            return f"{in_features} input features{share} are no whole words of {in_a_word} integers"
        for rows in (module.out_features, out_features):  # what is in the file, and what a rank has of it
            if not scheme.symmetric and rows % in_a_word:
                return f"{rows} output features{share} are no whole words of {in_a_word} zero points"
    if len({in_features for _, in_features in shapes}) == 1 and not EXPERT.search(parts[0].name):
        shapes = [(sum(out_features for out_features, _ in shapes), shapes[0][1])]
    for out_features, in_features in shapes:
        if not any(out_features % rows == 0 and in_features % columns == 0 for rows, columns in runtime.tiles):
            tiles = " or ".join(f"{rows} × {columns}" for rows, columns in runtime.tiles)
            found = f"{out_features} × {in_features}{share}"
            return f"{runtime.kernel} takes multiples of {tiles} (outputs × inputs), not {found}"
    return None


def _share(module: ModulePlan, ranks: int) -> tuple[int, int]:
    """Output and input features that one rank has."""
    if _is_row_parallel(module):
        return module.out_features, module.in_features // ranks
    return _rows(module) // ranks, module.in_features


def _rows(module: ModulePlan) -> int:
    """Output features, with the padding of a head."""
    return math.ceil(module.out_features / HEAD_ROWS) * HEAD_ROWS if module.outside else module.out_features


def _is_row_parallel(module: ModulePlan) -> bool:
    return module.name.rpartition(".")[2] in ROW_PARALLEL


def _in_words(scheme: LayerScheme) -> str:
    if not scheme.packed:
        return "16 bits"
    grid = "symmetric" if scheme.symmetric else "asymmetric"
    return f"{scheme.bits} bits, group_size {scheme.group_size}, {grid}"


def _listed(texts: Iterable[str]) -> str:
    """`"a, b and c"`."""
    *others, last = texts
    return f"{', '.join(others)} and {last}" if others else last


def refuse(found: Sequence[Problem], runtime: Runtime) -> None:
    """Raise `PlanError` with the first of some problems, and how many more there are."""
    if found:
        raise PlanError(in_one_line(found, runtime))


def in_one_line(found: Sequence[Problem], runtime: Runtime) -> str:
    """The first of some problems, and how many more there are."""
    others = f" ({len(found) - 1} more)" if len(found) > 1 else ""
    return f"By the rules of {runtime.title} ({runtime.kernel}) it would not load this checkpoint: {found[0]}{others}."
