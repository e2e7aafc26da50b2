"""`cptquant`: quantize, measure, plan, inspect, evaluate and demo from a terminal.

The settings of `CPTQuantConfig` are options with dashes (`options.py`). An error of ours is one line and exit status 1.
Under `accelerate launch` or `torchrun` all processes measure, and the first one writes.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from . import ranks
from .allocation import frontier as frontier_of
from .base_card import inherited_from
from .checkpoint import add_results, describe, refuse_foreign, rewrite_record
from .config import CPTQuantConfig
from .demo import run_demo
from .doctor import diagnose
from .errors import CheckpointError, CPTQuantError, ModelError
from .folder_evaluation import evaluate_folder, uniform_control
from .hub import Target, check_can_push, push_folder
from .images import find_preprocessor
from .model_view import class_named_in, head_of, head_of_class, read_config
from .options import (
    AllocationOption,
    BatchSizeOption,
    BitsOverrideOption,
    ImageColumnOption,
    LabelColumnOption,
    MaxLossIncreaseOption,
    RegularizationOption,
    TargetBitsOption,
    TargetCompressionOption,
    TargetRuntimeOption,
    TargetSizeOption,
    TextColumnOption,
    TokenizerOption,
    parse_numbers,
    parse_overrides,
    takes_settings,
)
from .pipeline import decide, make_plan, measure_frontier, measure_record, measure_sensitivity
from .plan import PLAN_FILE, BitPlan, read_json
from .plots import plot_frontier, plot_plan, plot_sensitivity
from .record import QuantizationRecord
from .runtimes import RUNTIMES, Problem, Runtime, model_problems, problems
from .table import SensitivityTable
from .terminal import (
    console,
    say,
    show_diagnosis,
    show_evaluation,
    show_frontier,
    show_gguf,
    show_plan,
    show_sensitivity,
    show_units,
)

app = typer.Typer(
    help="Mixed-precision quantization for Hugging Face transformers: every layer with the bits that it needs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
HARDWARE = {
    ("vllm", "cuda"): RUNTIMES["vllm"],
    ("vllm", "cpu"): RUNTIMES["vllm-cpu"],
    ("sglang", "cuda"): RUNTIMES["sglang"],
}
DTYPES = ("auto", "bfloat16", "float16", "float32")
EXPORT_FORMATS = ("llama-cpp",)
TYPES_SUFFIX = ".tensor-types.txt"
ModelArgument = Annotated[str, typer.Argument(help="Name on the Hub, or folder, of a full-precision model.")]
DtypeOption = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")]
PlotOption = Annotated[Path | None, typer.Option(help="PNG file for a picture of the plan.")]
PrivateOption = Annotated[
    bool | None, typer.Option("--private/--public", help="Of a repository that is made; by default as the Hub has it.")
]
DeviceMapOption = Annotated[str | None, typer.Option(help="As in transformers, e.g. auto.")]


@app.command()
@takes_settings
def quantize(
    context: typer.Context,
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the quantized model.")],
    dtype: DtypeOption = "auto",
    device_map: DeviceMapOption = None,
    max_shard_size: Annotated[str, typer.Option(help="Of a file of weights, e.g. 5GB.")] = "50GB",
    push_to_hub: Annotated[str | None, typer.Option(help="NAME/MODEL on the Hub, to push to afterwards.")] = None,
    private: PrivateOption = None,
    *,
    config: CPTQuantConfig,
) -> None:
    """Quantize MODEL, write it to a folder, and push it to the Hub if that is asked for."""
    join_processes()
    check_output(output)
    if push_to_hub is not None:
        check_can_push(push_to_hub)
    quantized = load_model(model, dtype, device_map, quantization_config=config)
    if ranks.rank() > 0:
        return
    quantized.save_pretrained(output, max_shard_size=max_shard_size)
    add_command(output, context.obj)
    find_preprocessor(config.tokenizer or model, head_of(quantized)).save_pretrained(output)
    say(f"Written to {output}. See the plan with: cptquant inspect {output}")
    if push_to_hub is not None:
        push(output, push_to_hub, private)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a quantized model.")],
    repo_id: Annotated[str, typer.Argument(help="NAME/MODEL on the Hub; made if it does not exist.")],
    private: PrivateOption = None,
    revision: Annotated[str | None, typer.Option(help="Branch, made if it does not exist; by default main.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="First line of the commit.")] = None,
) -> None:
    """Push a quantized model to the Hub in one commit, with the token of `hf auth login` or HF_TOKEN."""
    target = Target(repo_id, private, revision, create_pr, commit_message=commit_message)
    commit = push_folder(folder, target)
    say(f"Pushed to {commit.pr_url or commit.commit_url}")


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
    check_files(output, plot)
    record = measure_record(load_model(model, dtype, device_map), config)
    if ranks.rank() > 0:
        return
    assert record.table is not None
    record.save(output)
    if plot is not None:
        plot_sensitivity(record.table, plot)
    show_sensitivity(record.table)


@app.command()
@takes_settings
def plan(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file for the plan.")],
    plot: PlotOption = None,
    dtype: DtypeOption = "auto",
    device_map: DeviceMapOption = None,
    *,
    config: CPTQuantConfig,
) -> None:
    """Decide on the bits of MODEL without quantizing it. The file can be edited; `quantize --plan` takes it."""
    join_processes()
    check_files(output, plot)
    record = make_plan(load_model(model, dtype, device_map), config)
    if ranks.rank() == 0:
        write_plan(record, output, plot)


@app.command()
def solve(
    table: Annotated[Path, typer.Argument(help="File of `cptquant sensitivity` or `plan`, or a quantized model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file for the plan.")],
    plot: PlotOption = None,
    bits: Annotated[
        str | None, typer.Option(help="Bit widths to choose from, with commas; by default all in TABLE, and 16.")
    ] = None,
    allocation: AllocationOption = None,
    target_bits: TargetBitsOption = None,
    target_size: TargetSizeOption = None,
    target_compression: TargetCompressionOption = None,
    max_loss_increase: MaxLossIncreaseOption = None,
    bits_override: BitsOverrideOption = None,
    regularization: RegularizationOption = 0.0,
    target_runtime: TargetRuntimeOption = None,
) -> None:
    """Make a plan from scores that were measured before: no model, in a second."""
    check_files(output, plot)
    record = QuantizationRecord.load(table)
    if record.table is None:
        raise CPTQuantError(f"{table} is a plan without the scores that it came from; measure them with `sensitivity`")
    widths = {width for of_unit in (record.table.costs or record.table.errors).values() for width in of_unit}
    config = CPTQuantConfig(
        bits=(*sorted(widths), 16) if bits is None else parse_numbers("--bits", bits, int),
        allocation=allocation,
        target_bits=target_bits,
        target_size=target_size,
        target_compression=target_compression,
        max_loss_increase=max_loss_increase,
        bits_override=parse_overrides(bits_override or []) or None,
        regularization=regularization,
        target_runtime=target_runtime,
        group_size=record.table.group_size,
        symmetric=record.table.symmetric,
    )
    write_plan(decide(record, config.recipe()), output, plot)


@app.command()
@takes_settings
def frontier(
    source: Annotated[str, typer.Argument(help="A full-precision model, or a file of `cptquant sensitivity`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file for the plans' sizes and losses.")],
    plot: Annotated[Path | None, typer.Option(help="PNG file for the curve.")] = None,
    points: Annotated[int, typer.Option(min=2, help="Plans on the way from the smallest to the best.")] = 12,
    measure: Annotated[bool, typer.Option("--measure", help="Also measure the loss with each plan.")] = False,
    dtype: DtypeOption = "auto",
    device_map: DeviceMapOption = None,
    *,
    config: CPTQuantConfig,
) -> None:
    """Show what every size costs: bits per weight against predicted and measured rise of the loss.

    Units are groups and scores are Taylor's unless other ones are asked for, as with a budget.
    """
    join_processes()
    check_files(output, plot)
    config.granularity = config.granularity or "group"
    if config.estimator is None and config.metric == "loss":
        config.estimator = "taylor"
    if Path(source).is_file():
        if measure:
            raise CPTQuantError("--measure needs the model in the place of the table")
        table = SensitivityTable.load(source)
        config.group_size, config.symmetric = table.group_size, table.symmetric
        priced, found = bool(table.costs), frontier_of(table, config.recipe(), points)
    elif measure:
        found = measure_frontier(load_model(source, dtype, device_map), config, points)
        priced = config.recipe().uses_taylor
    else:
        table = measure_sensitivity(load_model(source, dtype, device_map), config)
        priced, found = bool(table.costs), frontier_of(table, config.recipe(), points)
    if ranks.rank() > 0:
        return
    unit = "nats" if priced else "score × error"
    rows = [
        {
            "bits_per_weight": point.plan.bits_per_weight,
            "bytes": point.plan.nbytes,
            "predicted": point.predicted,
            "measured": point.measured,
        }
        for point in found
    ]
    output.write_text(json.dumps({"unit": unit, "points": rows}, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        plot_frontier(found, unit, plot)
    show_frontier(found, unit)


@app.command()
def inspect(
    source: Annotated[Path, typer.Argument(help="A quantized model's folder, or the file of a plan.")],
    plot: PlotOption = None,
    units: Annotated[bool, typer.Option("--units", help="Also bits, bytes and score of every unit.")] = False,
) -> None:
    """Show a plan: its bits as a map, and the totals."""
    check_files(plot)
    data = read_json(source)
    bare = "settings" not in data  # as `BitPlan.save` writes it
    record = QuantizationRecord(BitPlan.from_dict(data), None, {}, {}) if bare else QuantizationRecord.from_dict(data)
    show_plan(record)
    if units:
        show_units(record)
    if plot is not None:
        plot_plan(record.plan, record.table, plot)


@app.command()
def check(
    source: Annotated[Path, typer.Argument(help="A quantized model's folder, or the file of a plan.")],
    engine: Annotated[str, typer.Option("--for", help="vllm or sglang.")] = "vllm",
    hardware: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Ranks that share each matrix.")] = 1,
) -> None:
    """Tell whether vLLM or SGLang loads SOURCE, and if not, which modules break which rules, and what helps.

    Exit status 1 if there are problems. Whether a model is one that can be loaded is only known of a folder.
    """
    runtime = HARDWARE.get((engine, hardware))
    if runtime is None:
        known = ", ".join(f"--for {engine} --hardware {hardware}" for engine, hardware in HARDWARE)
        raise CPTQuantError(f"there are no rules for --for {engine} --hardware {hardware}; there are: {known}")
    found = (*problems_of_folder(source, runtime), *problems(BitPlan.load(source), runtime, tensor_parallel))
    for problem in found:
        say(str(problem))
    subject = f"{runtime.title} ({runtime.kernel})" + (f" on {tensor_parallel} ranks" if tensor_parallel > 1 else "")
    if found:
        say(f"{subject} would not load {source}: {len(found)} {'problem' if len(found) == 1 else 'problems'}.")
        raise typer.Exit(1)
    say(f"{source} keeps the rules of {subject}.")


def problems_of_folder(source: Path, runtime: Runtime) -> tuple[Problem, ...]:
    """What keeps a runtime from loading the model in a folder with any plan; nothing is known of a plan's file.

    Raises:
        CheckpointError: the folder's `config.json` cannot be read.
    """
    if not source.is_dir():
        return ()
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        portable = config["quantization_config"]["quant_method"] == "compressed-tensors"
        (architecture,) = config["architectures"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{source / 'config.json'} is not that of a quantized model: {error!r}") from error
    return model_problems(head_of_class(architecture), portable, runtime)


@app.command()
def evaluate(
    source: Annotated[str, typer.Argument(metavar="DIR", help="A quantized model's folder, or any model.")],
    against: Annotated[
        str | None,
        typer.Option(help="The original, name or folder: also its figures and how far the predictions are from its."),
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Also the original, rounded to the one bit width nearest in size.")
    ] = False,
    dataset: Annotated[
        str,
        typer.Option(
            help="wikitext2, c4, imdb, or a .txt, .jsonl or .parquet file; for images imagenet-1k, cifar10, food101 or"
            " a .parquet file."
        ),
    ] = "wikitext2",
    tokenizer: TokenizerOption = None,
    text_column: TextColumnOption = None,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    num_samples: Annotated[int, typer.Option(help="Windows, drawn at random.")] = 128,
    sequence_length: Annotated[int, typer.Option(help="Tokens in each.")] = 2048,
    batch_size: BatchSizeOption = None,
    seed: Annotated[int, typer.Option(help="Of the choice of windows and of the intervals.")] = 0,
    device_map: DeviceMapOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the results.")] = None,
) -> None:
    """Measure the model in DIR, with 95 % confidence intervals; the last line is JSON.

    Perplexity, pseudo-perplexity (each token masked in turn) or accuracy, by the kind of model. Datasets from the Hub
    give their text for tests. What is measured of a quantized model goes into its cptquant_plan.json and its card.
    """
    check_files(output)
    folder = Path(source)
    record = QuantizationRecord.load(folder) if (folder / PLAN_FILE).exists() else None
    if record is not None:
        describe(folder)  # find out before the work whether the results can be kept
    if control and (record is None or against is None):
        raise CPTQuantError("--control needs a quantized model, and --against with the original to round")
    config = CPTQuantConfig(
        dataset=dataset,
        tokenizer=tokenizer,
        text_column=text_column,
        image_column=image_column,
        label_column=label_column,
        num_samples=num_samples,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
    )
    results = evaluate_folder(
        source, config, against, device_map, uniform_control(record) if record is not None and control else None
    )
    show_evaluation(results)
    found = json.dumps({"model": source, "against": against, "results": [result.to_dict() for result in results]})
    if output is not None:
        output.write_text(found + "\n", encoding="utf-8")
    if record is not None:
        add_results(folder, results)
        say(f"Written to {folder / PLAN_FILE} and the model card.")
        if against is None and record.base_model is not None:
            say(f"What quantizing has cost, with the original's figures: --against {record.base_model}")
    typer.echo(found)


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A quantized model's folder.")],
    base_model: Annotated[
        str | None, typer.Option(help="NAME/MODEL on the Hub of a model that was quantized from a folder.")
    ] = None,
) -> None:
    """Write the model card of DIR anew from its record. What others wrote around our part is kept."""
    record = QuantizationRecord.load(folder)
    if base_model is not None:
        inherited = {**inherited_from(base_model), **record.inherited}
        record = replace(record, base_model=base_model, inherited=inherited)
    rewrite_record(folder, record)
    say(f"Written to {folder / 'README.md'}.")


@app.command()
def doctor(
    folder: Annotated[Path | None, typer.Argument(help="A quantized model's folder; without it, all schemes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show which kernels packed layers run on here, and why not on faster ones."""
    diagnosis = diagnose(folder)
    if as_json:
        typer.echo(json.dumps(diagnosis.to_dict(), indent=1))
    else:
        show_diagnosis(diagnosis)


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
    say(f"Written to {output} and reloaded: the logits agree {agreement}.")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A quantized model's folder.")],
    format: Annotated[str, typer.Option(help=f"One of {', '.join(EXPORT_FORMATS)}.")] = EXPORT_FORMATS[0],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New file; by default named after the folder, here.")
    ] = None,
    tensor_types_only: Annotated[
        bool, typer.Option("--tensor-types-only", help="Only the types of the plan, for llama-quantize.")
    ] = False,
) -> None:
    """Write a quantized model for llama.cpp: a GGUF file, and the types of its plan for llama-quantize.

    The GGUF file has our own integers, for Llama, Mistral, Qwen, Gemma, Phi, GPT-2 and others. The types are for any
    model that llama.cpp knows: it then rounds the original anew, with the bits of our plan.
    """
    if format not in EXPORT_FORMATS:
        raise CPTQuantError(f"--format {format} is not one of {', '.join(EXPORT_FORMATS)}")
    from .llama_cpp import export_gguf, refuse_existing, write_tensor_types  # needs an optional library

    name = source.resolve().name
    if tensor_types_only:
        types = output or Path(f"{name}{TYPES_SUFFIX}")
        write_tensor_types(source, types)
    else:
        output = output or Path(f"{name}.gguf")
        types = output.with_name(output.name.removesuffix(".gguf") + TYPES_SUFFIX)
        refuse_existing(types)
        show_gguf(export_gguf(source, output), BitPlan.load(source))
        say(f"Written to {output}. Run it with: llama-cli -m {output}")
        write_tensor_types(source, types)
    say(
        f"Written to {types}. Let llama.cpp round the original, converted to GGUF, with the bits of this plan:"
        f" llama-quantize --tensor-type-file {types} MODEL.gguf OUTPUT.gguf Q4_K_M"
    )


def add_command(folder: Path, arguments: list[str]) -> None:
    """Put the command that wrote a model into its record and onto its card. Of absolute paths only the last part, since
    the rest is nobody's but the user's."""
    record = QuantizationRecord.load(folder)
    command = shlex.join(["cptquant", *(re.sub("^(--[^=]*=)?/.*/(?=.)", r"\1", argument) for argument in arguments)])
    rewrite_record(folder, replace(record, run={**record.run, "command": command}))


def write_plan(record: QuantizationRecord, output: Path, plot: Path | None) -> None:
    """Save a plan and show it."""
    record.save(output)
    if plot is not None:
        plot_plan(record.plan, record.table, plot)
    show_plan(record)
    say(f"Written to {output}. Quantize with it: cptquant quantize MODEL --plan {output} --output FOLDER")


def join_processes() -> None:
    """Under a launcher, become one of its processes; only the first one reports."""
    ranks.join()
    if ranks.rank() > 0:
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def check_files(*paths: Path | None) -> None:
    """Find out before any work whether files can be written.

    Raises:
        CPTQuantError: the folder of one does not exist.
    """
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise CPTQuantError(f"the folder of {path} does not exist")


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
    config = read_config(model)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{model} is quantized already; give the full-precision model")
    return class_named_in(config) or AutoModelForCausalLM


def main(arguments: list[str] | None = None) -> Any:
    """Entry point: our errors become one line on standard error and exit status 1."""
    logging.set_verbosity_warning()
    try:
        return app(args=arguments, prog_name="cptquant", obj=sys.argv[1:] if arguments is None else arguments)
    except CPTQuantError as error:
        Console(stderr=True).print(f"Error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)
    finally:
        ranks.leave()


if __name__ == "__main__":
    main()
