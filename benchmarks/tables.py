"""The README's tables of measurements, made from `benchmarks/results/*.json`.

uv run python benchmarks/tables.py     # rewrites README.md
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

from paper import COUNTERPARTS, DEVIATIONS, DROPS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OURS = ("packed", "packed with the embedding")  # models of `runtime.py`
STEPS = ("loads", "plans", "packs", "saves", "reloads packed", "reloads plain")  # of `architectures.py`
NOT_YET = "not tried yet"
TOLD = (  # reasons that many architectures share, by what they have in common
    (r"^MemoryError: ", "not tried: its default config, shrunk as far as it allows, is too large"),
    (r"^ImportError: .*?requires the (\w+) library", r"needs the library \1"),
    (
        r"nothing to quantize \(.*?× (\w+) is not",
        r"nothing to quantize: its blocks are made of `\1`, which is not supported",
    ),
    (r"would be skipped, e\.g\. \S+: (\w+) is no", r"most weights of the blocks are in `\1`, which is not supported"),
    (r"^ModelError: \w+ (cannot be run on text alone|computes no loss)", r"\1"),
    (
        r"^ModelError: \d+% of the weights .* would be skipped",
        "most weights of the blocks are in modules that are not supported",
    ),
    (
        r"^ValueError: quant_method='cptquant'",
        "in our own format, since compressed-tensors cannot say `Conv1D` or convolutions",
    ),
    (
        r"other weights than before: \S*(experts|input_linear)",
        "experts: transformers keeps them fused and reads no packed ones",
    ),
    (r"other weights than before: (.*)$", "other weights than before"),
    (
        r"float32 instead of bfloat16",
        "loaded in float32 where it was bfloat16, as transformers does for the whole model if its first parameter is"
        " float32, or for what a list of its class names in part (`scale`)",
    ),
    (r"object has no attribute 'weight'", "its class reads the weights of layers when it is built"),
)
METHOD_LABELS = {
    "oracle, bfloat16": "measured one by one in bfloat16",
    "tdmpq, taylor": '`tdmpq`, `estimator="taylor"`',
    "tdmpq, perturbation": '`tdmpq`, `estimator="perturbation"`',
    "pmpq": "`pmpq`",
    "cmpq": "`cmpq`",
    "outputs": "Σ(δ·Δy)², as in ModelOpt's auto_quantize",
    "absolute": "Σ\\|g·ΔW\\|, as in AutoRound's AutoScheme",
    "empirical": "Σ g²·ΔW² (empirical Fisher)",
    "HIGGS": "noise × relative error, as in HIGGS",
    "relative": "‖ΔW‖² / ‖W‖²",
    "error": "‖ΔW‖²",
    "random": "random",
}


def sensitivity_table(result: dict[str, Any]) -> str:
    """Methods by their rank correlation with the measured rise of the loss."""
    found = result["results"]
    seconds = found["oracle_seconds"] * 1e4 / result["tokens"]
    lines = [
        "| score | Spearman, 4 bits | Spearman, 3 bits | s per 10,000 tokens | peak MB |",
        "|---|---|---|---|---|",
        f"| measured one by one in float32 (the oracle) | 1 | 1 | {seconds:.0f} | – |",
    ]
    for name, label in METHOD_LABELS.items():
        method = found["methods"][name]
        cost = (
            (f"{method['seconds_per_10k_tokens']:.0f}", f"{method['peak_mb']}") if "seconds" in method else ("–", "–")
        )
        correlations = (f"{method[f'spearman_{width}_bits']:.2f}" for width in (4, 3))
        lines.append(f"| {label} | {' | '.join((*correlations, *cost))} |")
    speed = (
        f"{method.upper()} {ratio['literal_seconds']:.0f} → {ratio['engine_seconds']:.0f} s ({ratio['ratio']:.2f}×)"
        for method, ratio in found["speed"].items()
    )
    lines += [
        "",
        f"{result['tokens']:,} tokens, {result['model']}, {result['machine']}. Full forward passes → the engine, 30"
        f" blocks: {', '.join(speed)}, with the same scores.",
    ]
    return "\n".join(lines)


def allocation_table(result: dict[str, Any]) -> str:
    """Perplexities of plans by budget, and those of clusters beside the integer program's."""
    found = result["results"]
    budgets = found["budgets"]
    lines = [
        f"| plan from | {' | '.join(f'{target} bits per weight' for target in budgets)} |",
        f"|---|{'---|' * len(budgets)}",
    ]
    for name in next(iter(budgets.values())):
        label = METHOD_LABELS.get(name, name)
        lines.append(f"| {label} | {' | '.join(f'{of_budget[name]:.2f}' for of_budget in budgets.values())} |")
    uniform = (
        f"{name} {figures['perplexity']:.2f} ({figures['bits_per_weight']:.2f} bits per weight)"
        for name, figures in found["uniform"].items()
    )
    solver = result["solver"]
    lines += [
        "",
        f"{result['model']}, {result['calibration_tokens']:,} calibration tokens, groups of {result['group_size']},"
        f" {result['evaluation_tokens']:,} tokens of WikiText-2 test; {', '.join(uniform)}. The solver takes at most"
        f" {max(solver['seconds']):.1f} s for {solver['units']:,} units × {solver['bit_widths']} bit widths.",
        "",
        "| clusters | bits per weight | perplexity | integer program at that size |",
        "|---|---|---|---|",
    ]
    for name, figures in found["clusters"].items():
        method, _, kind = name.partition(" | ")
        lines.append(
            f"| {METHOD_LABELS[method]}, `{kind}` | {figures['bits_per_weight']:.2f} | {figures['perplexity']:.2f} |"
            f" {figures['integer_at_the_same_size']:.2f} |"
        )
    blocks = found["blocks"]
    draws = [value for name, value in blocks.items() if name.startswith("random")]
    lines += [
        "",
        "The paper's own way (three clusters of whole blocks, `CPTQuantConfig.paper`) gives"
        f" {blocks['bits_per_weight']:.2f} bits per weight and perplexity {blocks['clusters']:.2f}; random plans of"
        f" that size have {sum(draws) / len(draws):.2f} on average, `down_proj` high {blocks['down_proj high']:.2f}."
        " Clusters spend 16 bits where 8 would do, so the default is a budget.",
    ]
    return "\n".join(lines)


PLANS = {"default": "ours", "default, signed costs": "ours, with the costs of rounding to nearest"}


def tuned_plans_table(result: dict[str, Any]) -> str:
    """What plans are worth when rounding is tuned."""
    lines = [
        "| plan, rounded as the default does | bits per weight | perplexity | KL divergence |",
        "|---|---|---|---|",
    ]
    draws = [found for name, found in result["plans"].items() if name.startswith("random")]
    rows = {name: found for name, found in result["plans"].items() if not name.startswith("random")}
    for name, summary in {"mean": mean, "best": min}.items():
        rows[f"random, {name} of {len(draws)}"] = {key: summary(draw[key] for draw in draws) for key in draws[0]}
    for name, found in rows.items():
        figures = f"{found['bits_per_weight']:.2f} | {found['perplexity']:.2f} | {found['kl']:.4f}"
        lines.append(f"| {PLANS.get(name, name)} | {figures} |")
    lines += [
        "",
        f"{result['model']}, {result['calibration_tokens']:,} calibration tokens, groups of {result['group_size']},"
        f" {result['evaluation_tokens']:,} tokens of WikiText-2 test.",
    ]
    return "\n".join(lines)


def accuracy_table(result: dict[str, Any]) -> str:
    """What quantizing costs, ours and others."""
    lines = [
        "| | bits per weight | perplexity | on reviews | KL divergence | seconds | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        cost = (f"{row['seconds']:.0f}", f"{row['peak_mb']:.0f}") if row["seconds"] else ("–", "–")
        quality = (
            f"{row['bits_per_weight']:.2f}",
            f"{row['perplexity']:.2f}",
            f"{row['other']:.2f}",
            f"{row['kl']:.3f}",
        )
        lines.append(f"| {name} | {' | '.join((*quality, *cost))} |")
    lines += [
        "",
        f"{result['model']}, {result['calibration_tokens']:,} tokens of WikiText-2 validation, groups of"
        f" {result['group_size']}; {result['evaluation_tokens']:,} tokens of WikiText-2 test, IMDB reviews, in float32;"
        f" {result['machine']}. Ours chooses from 2, 3, 4, 8 and 16 bits unless it says so.",
    ]
    return "\n".join(lines)


def llama_cpp_table(result: dict[str, Any]) -> str:
    """How far llama.cpp's probabilities are from the model's."""
    lines = [
        "| GGUF file | largest difference of a log-probability | mean | KL divergence | same most probable token |",
        "|---|---|---|---|---|",
    ]
    for name, found in result["results"].items():
        figures = (f"{found[key]:.2g}" for key in ("largest_difference", "mean_difference", "kl_divergence"))
        lines.append(f"| {name} | {' | '.join(figures)} | {found['same_most_probable_token']:.1%} |")
    held = ", ".join(f"{count} × {how}" for how, count in result["modules"].items())
    lines += [
        "",
        f"{result['model']} at {result['bits_per_weight']:.2f} bits per weight ({held}; {result['modules_not_exact']}"
        f" not exact), {result['tokens']} tokens × 49,152 probabilities, xllamacpp {result['xllamacpp']}."
        f" Checkpoint {result['checkpoint_bytes'] / 1e6:.1f} MB, GGUF {result['gguf_bytes'] / 1e6:.1f} MB.",
    ]
    return "\n".join(lines)


def runtime_table(result: dict[str, Any]) -> str:
    """Speed of models and of products relative to bfloat16."""
    models = [
        "| model | | load, s | resident MB | prefill, tokens/s | decode, tokens/s | of the copy bandwidth |",
        "|---|---|---|---|---|---|---|",
    ]
    peers = {peer: f"{peer} {version}, 4 bits" for peer, version in result["peer_versions"].items() if version}
    if "llama.cpp" in peers:
        peers["llama.cpp"] = f"llama.cpp (llama-cpp-python {result['peer_versions']['llama.cpp']}), our GGUF"
    for name, kinds in result["models"].items():
        for kind, label in {"bfloat16": "bfloat16", **dict.fromkeys(OURS), **peers}.items():
            found = kinds.get(kind)
            if found is None:
                continue
            label = label or f"{kind}, {found['bits_per_weight']:.2f} bits"
            if "failed" in found:
                models.append(f"| {name} | {label} | does not run: {found['failed']} | | | | |")
                continue
            speeds = [
                f"{found[f'{step}_tokens_per_second']:.1f}"
                + (f" ({found[f'{step}_ratio']:.2f}×)" if f"{step}_ratio" in found else "")
                for step in ("prefill", "decode")
            ]
            memory = f"{found['resident_mb']:.0f}" if "resident_mb" in found else "–"
            share = f"{found['share_of_copy_bandwidth']:.0%}" if "share_of_copy_bandwidth" in found else "–"
            models.append(
                f"| {name} | {label} | {found['load_seconds']:.1f} | {memory} | {' | '.join(speeds)} | {share} |"
            )
    rows = list(next(iter(result["products"].values()))["bfloat16, ms"])
    products = [
        f"| outputs × inputs | scheme | rows: {' | '.join(rows)} |",
        f"|---|---{'|---' * len(rows)}|",
    ]
    for shape, kinds in result["products"].items():
        of_peers = {
            f"{peer}, {kind}": found
            for peer, shapes in result["peers"].items()
            for kind, found in shapes.get(shape, {}).items()
        }
        for kind, found in {**kinds, **of_peers}.items():
            if not kind.endswith("bfloat16, ms"):
                ratios = " | ".join(f"{found[count]:.2f}" for count in rows)
                products.append(f"| {shape.replace('x', ' × ')} | {kind} | {ratios} |")
    in_others = [
        f"| outputs × inputs | scheme | rows: {' | '.join(rows)} |",
        f"|---|---{'|---' * len(rows)}|",
    ]
    for dtype, shapes in result["products in others"].items():
        for shape, kinds in shapes.items():
            for kind, found in kinds.items():
                if not kind.endswith("ms"):
                    ratios = " | ".join(f"{found[count]:.2f}" for count in rows)
                    in_others.append(f"| {shape.replace('x', ' × ')}, {dtype} | {kind} | {ratios} |")
    versions = result["versions"]
    told = (
        f"Copy bandwidth {result['copy_bandwidth_gb_per_second']:.0f} GB/s; torch {versions['torch']}, numba"
        f" {result['numba']}, transformers {versions['transformers']}; {result['machine']}."
    )
    folded = ["<details><summary>One product, times as fast as in bfloat16</summary>", "", *products, "", "</details>"]
    summary = "<details><summary>In float16 and float32, times as fast as dense layers in the same</summary>"
    of_others = [summary, "", *in_others, "", "</details>"]
    return "\n".join([*models, "", *folded, "", *of_others, "", told])


def paper_tables(result: dict[str, Any]) -> str:
    """The paper's tables 1 and 2: ours, and what it prints for the same or the nearest models."""
    models = result["models"]
    return "\n".join((*_paper_table_1(models), "", *_paper_table_2(models), "", _paper_sizes(result)))


def _paper_table_1(models: dict[str, Any]) -> list[str]:
    columns = {f"{model} (paper)": values for model, values in DEVIATIONS.items()}
    for name, tasks in models.items():
        for found in tasks.values():
            columns |= {f"{name}, {method}": values for method, values in found["deviations"].items()}
    segments = ("first 30 % of the layers", "middle", "remaining layers")
    rows = (
        [segment, *("–" if values[index] is None else f"{values[index]:.3g}" for values in columns.values())]
        for index, segment in enumerate(segments)
    )
    return [
        f"| | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _paper_table_2(models: dict[str, Any]) -> list[str]:
    columns = ("IMDB accuracy drop", "CR", "WikiText perplexity drop", "CR")
    lines = [
        f"| | method | {' | '.join(columns)} | paper: {' | '.join(columns)} |",
        f"|---|---|{'---|' * 2 * len(columns)}",
    ]
    for name, tasks in models.items():
        nearest = COUNTERPARTS.get(name)
        label = name if nearest is None else f"{name} (paper: {nearest})"
        for method in next(iter(tasks.values()))["rows"]:
            ours = (
                *_drop_and_ratio(tasks.get("classification"), method, -1, "+.3f"),
                *_drop_and_ratio(tasks.get("language modelling"), method, 1, "+.2f"),
            )
            papers = DROPS.get(nearest or "", {}).get(method)
            theirs = ("–",) * 4 if papers is None else (papers[0], f"{papers[1]:g}x", papers[2], f"{papers[3]:g}x")
            lines.append(f"| {label} | {method} | {' | '.join(map(str, (*ours, *theirs)))} |")
            label = ""
    return lines


def _drop_and_ratio(found: dict[str, Any] | None, method: str, worse: int, form: str) -> tuple[str, str]:
    """How much worse a row is than the original, and how many times smaller; dashes without figures."""
    if found is None:
        return "–", "–"
    row, base = found["rows"][method], found["original"]
    drop = worse * (row["value"] - base["value"]) or 0.0  # no −0
    return f"{drop:{form}}".replace("-", "−"), f"{base['bytes'] / row['bytes']:.2f}x"


def _paper_sizes(result: dict[str, Any]) -> str:
    """What was measured on what."""
    of_models = []
    for name, tasks in result["models"].items():
        for task, found in tasks.items():
            bits = ", ".join(f"{method} {row['bits_per_weight']:.2f}" for method, row in found["rows"].items())
            base = f"{found['original']['value']:.3f}, {found['original']['bytes'] / 1e6:.1f} MB"
            (samples, length), (windows, window) = found["calibration_samples"], found["evaluation_samples"]
            of_models.append(
                f"{name}, {task}: {base} in float32; {samples} × {length} tokens of calibration, {windows} × {window}"
                f" of evaluation; bits per weight {bits}."
            )
    return " ".join(of_models)


def encoder_table(result: dict[str, Any]) -> str:
    """Accuracies of a classifier by method and budget."""
    budgets = list(next(iter(result["rows"].values())))
    lines = [
        f"| plan from | 16 bits | {' | '.join(f'{float(target):g} bits per weight' for target in budgets)} |",
        f"|---|---|{'---|' * len(budgets)}",
    ]
    for name, row in result["rows"].items():
        values = (result["unrounded"]["float16"], *(row[target]["value"] for target in budgets))
        lines.append(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |")
    lines += [
        "",
        f"{result['model']}, fine-tuned on {result['fine_tuning']['reviews']:,} IMDB reviews of at most"
        f" {result['fine_tuning']['length']} tokens; {result['calibration_reviews']} reviews of calibration,"
        f" {result['evaluation_reviews']} others to measure on (in float32 {result['unrounded']['float32']:.3f}),"
        f" groups of {result['group_size']}, rounding to nearest.",
    ]
    return "\n".join(lines)


def architectures_table(result: dict[str, Any]) -> str:
    """How many architectures come how far, by task, and which do not, with the reason."""
    found = result["architectures"]
    by_task: dict[str, list[dict[str, str | None]]] = {}
    for name, steps in found.items():
        by_task.setdefault(name.partition("/")[0], []).append(steps)
    lines = [f"| | registered | {' | '.join(STEPS)} |", f"|---|---|{'---|' * len(STEPS)}"]
    for task, of_task in by_task.items():
        reached = [str(sum(steps.get(step, "") is None for steps in of_task)) for step in STEPS]
        if untried := sum(NOT_YET in steps.values() for steps in of_task):
            reached[-1] += f" ({untried} not tried)"
        lines.append(f"| {task} | {len(of_task)} | {' | '.join(reached)} |")
    reasons: dict[str, dict[str, list[str]]] = {step: {} for step in STEPS}
    for name, steps in found.items():
        for step, reason in steps.items():
            if reason is not None:
                reasons[step].setdefault(_told(reason), []).append(name)
    for step, of_step in reasons.items():
        if of_step:
            count = sum(map(len, of_step.values()))
            lines += [
                "",
                f"<details><summary>{count} × not “{step}”</summary>",
                "",
                "| reason | architectures |",
                "|---|---|",
            ]
            for reason, names in sorted(of_step.items(), key=lambda item: (-len(item[1]), item[0])):
                lines.append(f"| {reason} | {', '.join(f'`{name}`' for name in names)} |")
            lines += ["", "</details>"]
    versions = result["versions"]
    lines += [
        "",
        f"transformers {versions['transformers']}, compressed-tensors {versions['compressed-tensors']}, torch"
        f" {versions['torch']}.",
    ]
    return "\n".join(lines)


def _told(reason: str) -> str:
    """A reason as a cell of a table, alike for models that only differ in their names and numbers."""
    for pattern, told in TOLD:
        if match := re.search(pattern, reason):
            return match.expand(told)
    return reason.replace("|", "\\|").replace("<", "&lt;")


TABLES = {
    "sensitivity": sensitivity_table,
    "allocation": allocation_table,
    "tuned_plans": tuned_plans_table,
    "accuracy": accuracy_table,
    "encoder": encoder_table,
    "paper_tables": paper_tables,
    "runtime": runtime_table,
    "architectures": architectures_table,
    "llama_cpp": llama_cpp_table,
}


def with_tables(readme: str) -> str:
    """The text with every table between its markers (`<!-- table: name -->`, `<!-- end -->`) made anew."""

    def made(match: re.Match[str]) -> str:
        name = match[1]
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        return f"<!-- table: {name} -->\n{TABLES[name](result)}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", made, readme, flags=re.DOTALL)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
