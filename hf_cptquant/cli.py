"""`cptquant`: quantize, measure, inspect and demo from a terminal.

The settings of `CPTQuantConfig` are options with dashes (`options.py`). An error of ours is one line and exit status 1.
Under `accelerate launch` or `torchrun` all processes measure, and the first one writes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from . import ranks
from .checkpoint import refuse_foreign
from .config import CPTQuantConfig
from .demo import run_demo
from .errors import CheckpointError, CPTQuantError, ModelError
from .model_view import TASKS
from .options import takes_settings
from .pipeline import measure_sensitivity
from .plan import PLAN_FILE
from .plots import plot_sensitivity
from .record import QuantizationRecord
from .terminal import console, show_plan, show_sensitivity

app = typer.Typer(
    help="Mixed-precision quantization for Hugging Face transformers: every layer with the bits that it needs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
DTYPES = ("auto", "bfloat16", "float16", "float32")
ModelArgument = Annotated[str, typer.Argument(help="Name on the Hub, or folder, of a full-precision model.")]
DtypeOption = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")]
DeviceMapOption = Annotated[str | None, typer.Option(help="As in transformers, e.g. auto.")]


@app.command()
@takes_settings
def quantize(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the quantized model.")],
    dtype: DtypeOption = "auto",
    device_map: DeviceMapOption = None,
    *,
    config: CPTQuantConfig,
) -> None:
    """Quantize MODEL and write it to a folder."""
    join_processes()
    check_output(output)
    quantized = load_model(model, dtype, device_map, quantization_config=config)
    if ranks.rank() > 0:
        return
    quantized.save_pretrained(output)
    AutoTokenizer.from_pretrained(config.tokenizer or model).save_pretrained(output)
    console.print(f"Written to {output}. See the plan with: cptquant inspect {output}", highlight=False, soft_wrap=True)


@app.command()
@takes_settings
def sensitivity(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file for the table.")],
    plot: Annotated[Path | None, typer.Option(help="PNG file for a bar chart.")] = None,
    dtype: DtypeOption = "auto",
    device_map: DeviceMapOption = None,
    *,
    config: CPTQuantConfig,
) -> None:
    """Measure how sensitive the units of MODEL are, without quantizing it."""
    join_processes()
    for path in (output, plot):
        if path is not None and not path.parent.is_dir():
            raise CPTQuantError(f"the folder of {path} does not exist")
    table = measure_sensitivity(load_model(model, dtype, device_map), config)
    if ranks.rank() > 0:
        return
    table.save(output)
    if plot is not None:
        plot_sensitivity(table, plot)
    show_sensitivity(table)


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


def join_processes() -> None:
    """Under a launcher, become one of its processes; only the first one reports."""
    ranks.join()
    if ranks.rank() > 0:
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def check_output(folder: Path) -> None:
    """Refuse a folder that holds anything which is not an earlier result of ours.

    Raises:
        CheckpointError: the folder is a file, or holds other things.
    """
    refuse_foreign(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PLAN_FILE).exists():
        raise CheckpointError(f"{folder} is not empty and was not written by cptquant; give a new folder")


def load_model(model: str, dtype: str, device_map: str | None, **extra: Any) -> PreTrainedModel:
    """Load a full-precision model with the class that its config names.

    Raises:
        CPTQuantError: an unknown dtype, no model there, or one that is quantized already.
    """
    if dtype not in DTYPES:
        raise CPTQuantError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    return model_class(model).from_pretrained(
        model, dtype=dtype if dtype == "auto" else getattr(torch, dtype), device_map=device_map, **extra
    )


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


def main(arguments: list[str] | None = None) -> Any:
    """Entry point: our errors become one line on standard error and exit status 1."""
    logging.set_verbosity_warning()
    try:
        return app(args=arguments, prog_name="cptquant")
    except CPTQuantError as error:
        Console(stderr=True).print(f"Error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)
    finally:
        ranks.leave()


if __name__ == "__main__":
    main()
