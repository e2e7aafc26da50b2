"""`cptquant`: quantize, inspect and demo from a terminal.

The options of `quantize` are the settings of `CPTQuantConfig` with dashes. An error of ours is one line and exit status
1.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from .checkpoint import refuse_foreign
from .config import CPTQuantConfig
from .demo import run_demo
from .errors import CheckpointError, CPTQuantError, ModelError
from .model_view import TASKS
from .plan import PLAN_FILE
from .record import QuantizationRecord

app = typer.Typer(
    help="Mixed-precision quantization for Hugging Face transformers: every layer with the bits that it needs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

Number = TypeVar("Number", int, float)
DTYPES = ("auto", "bfloat16", "float16", "float32")


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Name on the Hub, or folder, of a full-precision model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the quantized model.")],
    method: Annotated[str, typer.Option(help="tdmpq or pmpq: how sensitivity is measured.")] = "tdmpq",
    bits: Annotated[str, typer.Option(help="Bit widths to choose from, with commas.")] = "4,8,16",
    granularity: Annotated[str | None, typer.Option(help="block, group or module: what gets one decision.")] = None,
    allocation: Annotated[str | None, typer.Option(help="kmeans: how scores become bits.")] = None,
    rounding: Annotated[str, typer.Option(help="nearest: how weights become integers.")] = "nearest",
    group_size: Annotated[int, typer.Option(help="Input features that share a scale below 8 bits.")] = 128,
    symmetric: Annotated[bool, typer.Option("--symmetric/--asymmetric", help="Without or with zero points.")] = True,
    dataset: Annotated[
        str, typer.Option(help="wikitext2, c4, imdb, or a .txt, .jsonl or .parquet file.")
    ] = "wikitext2",
    tokenizer: Annotated[str | None, typer.Option(help="Name or folder; by default the model's own.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the texts.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the labels (classifiers).")] = None,
    num_samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    sequence_length: Annotated[int, typer.Option(help="Tokens in each.")] = 2048,
    batch_size: Annotated[int | None, typer.Option(help="Sequences at a time.")] = None,
    perturb: Annotated[str, typer.Option(help="all or first: which weights of a unit are disturbed.")] = "all",
    perturbation_scale: Annotated[float, typer.Option(help="Size of the disturbance relative to the weights.")] = 0.1,
    sparsity_levels: Annotated[str, typer.Option(help="Shares of the weights that pmpq prunes.")] = "0.3,0.5,0.7",
    modules_to_not_convert: Annotated[
        list[str] | None, typer.Option(help="Module to leave alone; may be repeated.")
    ] = None,
    allow_skipped: Annotated[
        bool, typer.Option(help="Accept that most weights of the blocks cannot be quantized.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of windows, masking and disturbances.")] = 0,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="As in transformers, e.g. auto.")] = None,
) -> None:
    """Quantize MODEL and write it to a folder."""
    if dtype not in DTYPES:
        raise CPTQuantError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    config = CPTQuantConfig(
        method=method,
        bits=parse_numbers("--bits", bits, int),
        allocation=allocation,
        granularity=granularity,
        group_size=group_size,
        symmetric=symmetric,
        rounding=rounding,
        perturb=perturb,
        perturbation_scale=perturbation_scale,
        sparsity_levels=parse_numbers("--sparsity-levels", sparsity_levels, float),
        dataset=dataset,
        tokenizer=tokenizer,
        text_column=text_column,
        label_column=label_column,
        num_samples=num_samples,
        sequence_length=sequence_length,
        batch_size=batch_size,
        modules_to_not_convert=modules_to_not_convert or None,
        allow_skipped=allow_skipped,
        seed=seed,
    )
    check_output(output)
    quantized = model_class(model).from_pretrained(
        model,
        quantization_config=config,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        device_map=device_map,
    )
    quantized.save_pretrained(output)
    AutoTokenizer.from_pretrained(tokenizer or model).save_pretrained(output)
    console.print(f"Written to {output}. See the plan with: cptquant inspect {output}", highlight=False, soft_wrap=True)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A folder that `cptquant quantize` or `save_pretrained` wrote.")],
) -> None:
    """Show the plan of a quantized model: bits, bytes and score of every unit, and the totals."""
    show_plan(QuantizationRecord.load(folder))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the quantized model.")] = Path(
        "smollm2-135m-cptquant"
    ),
) -> None:
    """Quantize a real 135M-parameter model without a network, and compare it with the original."""
    check_output(output)
    result = run_demo(output)
    plan = result.record.plan
    show_plan(result.record)
    table = Table("", "original", "quantized", title="SmolLM2-135M-Instruct")
    table.add_row("perplexity on held-out text", f"{result.perplexity_before:.2f}", f"{result.perplexity_after:.2f}")
    table.add_row("checkpoint, MB", f"{plan.original_bytes / 1e6:.1f}", f"{plan.nbytes / 1e6:.1f}")
    table.add_row("greedy continuation", result.sentence_before, result.sentence_after)
    console.print(table)
    agreement = "bit for bit" if result.reload_difference == 0 else f"to within {result.reload_difference:.3g}"
    console.print(f"Written to {output} and reloaded: the logits agree {agreement}.", highlight=False, soft_wrap=True)


def parse_numbers(option: str, text: str, kind: type[Number]) -> tuple[Number, ...]:
    """`"4,8,16"` → (4, 8, 16). Raises `CPTQuantError` for anything else."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise CPTQuantError(f"{option} {text}: give numbers with commas") from error


def check_output(folder: Path) -> None:
    """Refuse a folder that holds anything which is not an earlier result of ours.

    Raises:
        CheckpointError: the folder is a file, or holds other things.
    """
    refuse_foreign(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PLAN_FILE).exists():
        raise CheckpointError(f"{folder} is not empty and was not written by cptquant; give a new folder")


def model_class(model: str) -> type[PreTrainedModel]:
    """The class that the model's config names, if it is one that computes a loss; otherwise the causal language model.

    Raises:
        ModelError: the model is quantized already, or its config cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ModelError(f"no model at {model!r}: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{model} is quantized already; give the full-precision model")
    known = {name for classes in TASKS.values() for name in classes.values()}
    named = next((name for name in config.architectures or () if name in known), None)
    return AutoModelForCausalLM if named is None else getattr(transformers, named)


def show_plan(record: QuantizationRecord) -> None:
    """Print a plan as a table with totals."""
    plan, scores = record.plan, record.table.scores
    table = Table(
        "block", "modules", "bits", "MB", "score", title=f"{record.table.method}, {record.settings['allocation']}"
    )
    for column in (3, 4):
        table.columns[column].justify = "right"
    for block, members in plan.by_block().items():
        by_unit: dict[str, list[str]] = {}
        for name, module in members.items():
            by_unit.setdefault(module.unit, []).append(name)
        for index, (unit, names) in enumerate(by_unit.items()):
            modules = [members[name] for name in names]
            schemes = ", ".join(dict.fromkeys(str(module.scheme) for module in modules))
            label = f"all {len(names)}" if len(by_unit) == 1 else ", ".join(name.rpartition(".")[2] for name in names)
            megabytes = sum(module.nbytes for module in modules) / 1e6
            table.add_row("" if index else block, label, schemes, f"{megabytes:.2f}", f"{scores[unit]:.3f}")
    console.print(table)
    console.print(
        f"{plan.bits_per_weight:.3f} bits per weight; {plan.original_bytes / 1e6:.1f} → {plan.nbytes / 1e6:.1f} MB:"
        f" compression ratio {plan.compression_ratio:.2f}, reduction {plan.final_reduction_percentage:.1f} %",
        highlight=False,
        soft_wrap=True,
    )


def main(arguments: list[str] | None = None) -> Any:
    """Entry point: our errors become one line on standard error and exit status 1."""
    logging.set_verbosity_warning()
    try:
        return app(args=arguments, prog_name="cptquant")
    except CPTQuantError as error:
        Console(stderr=True).print(f"Error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
