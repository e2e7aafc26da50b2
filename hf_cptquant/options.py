"""The options of the command line that are settings of `CPTQuantConfig`, once for all commands that take them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from .config import CPTQuantConfig
from .errors import CPTQuantError

Number = TypeVar("Number", int, float)

AllocationOption = Annotated[
    str | None, typer.Option(help="kmeans, k-harmonic-means or integer: how scores become bits.")
]
TargetBitsOption = Annotated[float | None, typer.Option(help="Budget: bits per weight, with scales.")]
TargetSizeOption = Annotated[str | None, typer.Option(help="Budget: size of the checkpoint, e.g. 300MB.")]
TargetCompressionOption = Annotated[float | None, typer.Option(help="Budget: compression ratio.")]
MaxLossIncreaseOption = Annotated[float | None, typer.Option(help="Smallest model within this loss (nats).")]
BitsOverrideOption = Annotated[list[str] | None, typer.Option(help="PATTERN=BITS decided beforehand; may be repeated.")]
TargetRuntimeOption = Annotated[
    str | None, typer.Option(help="vllm, vllm-cpu or sglang: choose only plans that it loads.")
]
TokenizerOption = Annotated[
    str | None, typer.Option(help="Name or folder, for images of an image processor; by default the model's own.")
]
TextColumnOption = Annotated[str | None, typer.Option(help="Column of the texts.")]
ImageColumnOption = Annotated[str | None, typer.Option(help="Column of the images.")]
LabelColumnOption = Annotated[str | None, typer.Option(help="Column of the labels (classifiers).")]
BatchSizeOption = Annotated[int | None, typer.Option(help="Sequences at a time.")]
RegularizationOption = Annotated[float, typer.Option(help="Weight of the rounding error beside the loss.")]


def read_settings(
    method: Annotated[
        str, typer.Option(help="tdmpq, pmpq, cmpq, or auto for the best of them: how sensitivity is measured.")
    ] = "tdmpq",
    metric: Annotated[str, typer.Option(help="loss, perplexity or accuracy: what a change is measured by.")] = "loss",
    bits: Annotated[str, typer.Option(help="Bit widths to choose from, with commas.")] = "4,8,16",
    granularity: Annotated[str | None, typer.Option(help="block, group or module: what gets one decision.")] = None,
    allocation: AllocationOption = None,
    target_bits: TargetBitsOption = None,
    target_size: TargetSizeOption = None,
    target_compression: TargetCompressionOption = None,
    max_loss_increase: MaxLossIncreaseOption = None,
    bits_override: BitsOverrideOption = None,
    quantize_lm_head: Annotated[
        int | None, typer.Option(help="Bits of the layer that predicts tokens, which is left alone otherwise.")
    ] = None,
    quantize_embeddings: Annotated[
        int | None, typer.Option(help="Bits of the embedding of tokens, and of a head that shares its weight.")
    ] = None,
    quantize_vision_tower: Annotated[
        int | None, typer.Option(help="Bits of the layers that read images, which are left alone otherwise.")
    ] = None,
    quantize_front_end: Annotated[
        int | None, typer.Option(help="Bits of patch embeddings, convolutions and projectors in front of the blocks.")
    ] = None,
    refine: Annotated[
        int, typer.Option(help="Swaps of equal size between units to try after the integer program.")
    ] = 0,
    regularization: RegularizationOption = 0.0,
    plan: Annotated[
        Path | None, typer.Option(help="File of `cptquant plan` or `solve`, instead of measuring and allocating.")
    ] = None,
    quality: Annotated[str, typer.Option(help="fast, balanced or best: how long rounding may take.")] = "balanced",
    rounding: Annotated[
        str | None, typer.Option(help="nearest, clipped, gptq or signround: how weights become integers.")
    ] = None,
    iters: Annotated[int | None, typer.Option(help="Steps of signround for each block.")] = None,
    recover: Annotated[str | None, typer.Option(help="scales: train scales and norms after rounding.")] = None,
    group_size: Annotated[int, typer.Option(help="Input features that share a scale below 8 bits.")] = 128,
    symmetric: Annotated[bool, typer.Option("--symmetric/--asymmetric", help="Without or with zero points.")] = True,
    dataset: Annotated[
        str,
        typer.Option(
            help="wikitext2, c4, imdb, a .txt, .jsonl or .parquet file, or self: the model's own text; for images"
            " imagenet-1k, cifar10, food101 or a .parquet file."
        ),
    ] = "wikitext2",
    tokenizer: TokenizerOption = None,
    text_column: TextColumnOption = None,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    num_samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    sequence_length: Annotated[int, typer.Option(help="Tokens in each.")] = 2048,
    batch_size: BatchSizeOption = None,
    estimator: Annotated[str | None, typer.Option(help="taylor or perturbation: how tdmpq measures.")] = None,
    taylor_samples: Annotated[int, typer.Option(help="Tokens that taylor measures.")] = 4096,
    perturb: Annotated[str, typer.Option(help="all or first: which weights of a unit are disturbed.")] = "all",
    perturbation_scale: Annotated[float, typer.Option(help="Size of the disturbance relative to the weights.")] = 0.1,
    sparsity_levels: Annotated[str, typer.Option(help="Shares of the weights that pmpq prunes.")] = "0.3,0.5,0.7",
    cca_components: Annotated[int, typer.Option(help="Principal components that cmpq keeps of a unit.")] = 64,
    cca_samples: Annotated[int, typer.Option(help="Tokens that cmpq correlates.")] = 4096,
    modules_to_not_convert: Annotated[
        list[str] | None, typer.Option(help="Module to leave alone; may be repeated.")
    ] = None,
    allow_skipped: Annotated[
        bool, typer.Option(help="Accept that most weights of the blocks cannot be quantized.")
    ] = False,
    target_runtime: TargetRuntimeOption = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop before rounding if vLLM, or the target runtime, would not load it.")
    ] = False,
    work_dir: Annotated[
        Path | None, typer.Option(help="Folder for finished measurements; a killed run goes on from it.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of windows, masking and disturbances.")] = 0,
) -> CPTQuantConfig:
    """The settings of `CPTQuantConfig` as options."""
    return CPTQuantConfig(
        method=method,
        metric=metric,
        bits=parse_numbers("--bits", bits, int),
        allocation=allocation,
        target_bits=target_bits,
        target_size=target_size,
        target_compression=target_compression,
        max_loss_increase=max_loss_increase,
        bits_override=parse_overrides(bits_override or []) or None,
        quantize_lm_head=quantize_lm_head,
        quantize_embeddings=quantize_embeddings,
        quantize_vision_tower=quantize_vision_tower,
        quantize_front_end=quantize_front_end,
        refine=refine,
        regularization=regularization,
        plan=plan,
        granularity=granularity,
        group_size=group_size,
        symmetric=symmetric,
        quality=quality,
        rounding=rounding,
        iters=iters,
        recover=recover,
        estimator=estimator,
        taylor_samples=taylor_samples,
        perturb=perturb,
        perturbation_scale=perturbation_scale,
        sparsity_levels=parse_numbers("--sparsity-levels", sparsity_levels, float),
        cca_components=cca_components,
        cca_samples=cca_samples,
        dataset=dataset,
        tokenizer=tokenizer,
        text_column=text_column,
        image_column=image_column,
        label_column=label_column,
        num_samples=num_samples,
        sequence_length=sequence_length,
        batch_size=batch_size,
        modules_to_not_convert=modules_to_not_convert or None,
        allow_skipped=allow_skipped,
        target_runtime=target_runtime,
        strict=strict,
        work_dir=work_dir,
        seed=seed,
    )


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `read_settings` in the place of its last parameter, `config`."""

    @functools.wraps(command)
    def with_options(**options: Any) -> None:
        own = {name: options.pop(name) for name in tuple(options) if name not in settings}
        command(**own, config=read_settings(**options))

    settings = inspect.signature(read_settings, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True)
    kept = [parameter for name, parameter in own.parameters.items() if name != "config"]
    with_options.__signature__ = own.replace(parameters=[*kept, *settings.values()])  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in (*kept, *settings.values())}
    return with_options


def parse_overrides(texts: list[str]) -> dict[str, int]:
    """`["*.down_proj=8"]` → {"*.down_proj": 8}. Raises `CPTQuantError` for anything else."""
    overrides = {}
    for text in texts:
        pattern, _, bits = text.rpartition("=")
        if not pattern or not bits.isdigit():
            raise CPTQuantError(f"--bits-override {text}: give a pattern and its bits, like '*.down_proj=8'")
        overrides[pattern] = int(bits)
    return overrides


def parse_numbers(option: str, text: str, kind: type[Number]) -> tuple[Number, ...]:
    """`"4,8,16"` → (4, 8, 16). Raises `CPTQuantError` for anything else."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise CPTQuantError(f"{option} {text}: give numbers with commas") from error
