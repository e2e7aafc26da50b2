"""What quantizing costs at equal size: ours beside its peers, on SmolLM2-135M, one process each.

All rows have the same calibration tokens (the first 32 × 512 of a text) and are evaluated on the same windows of
another (the first 64 × 1,024 tokens), and on text of another kind, so that nobody wins by learning the calibration.
Bits per weight include scales and zero points. Every row writes its dequantized weights, and one program measures them
all in float32. Peers live in environments of their own (`benchmarks/peers/`); those that are absent are skipped.

    uv run python benchmarks/accuracy.py --calibration wikitext2_valid.txt --evaluation wikitext2_test.txt \\
        --other imdb_test.parquet --peers environments --rows "nearest 4" "ours 4.5" "AutoScheme 4.5"
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet
import torch
import torch.nn.functional as F
from environment import environment
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_cptquant import CPTQuantConfig
from hf_cptquant.demo import write_bundled_model
from hf_cptquant.memory import peak_bytes
from hf_cptquant.model_view import view_model
from hf_cptquant.pipeline import prepare, quantize_model

GROUP_SIZE, SAMPLES, LENGTH, SPARE = 64, 32, 512, 32
WINDOWS, WINDOW, OTHER_WINDOWS = 64, 1024, 16
KL_WINDOWS = 16  # of which the original's predictions are held: 3.2 GB
BITS = (2, 3, 4, 8, 16)
NEAREST = {f"nearest {bits}": bits for bits in (3, 4)}
OURS = {f"ours {target}": {"target_bits": target, "bits": BITS} for target in (3.5, 4.0, 4.5, 5.0)}
OURS["ours 4.5, 4, 8, 16 bits"] = {"target_bits": 4.5, "bits": (4, 8, 16)}
OURS["ours 4.5, 4, 8, 16 bits, best"] = {**OURS["ours 4.5, 4, 8, 16 bits"], "quality": "best"}
OURS["ours 4.5, 4, 8, 16 bits, GPTQ, recovered"] = {
    **OURS["ours 4.5, 4, 8, 16 bits"],
    "rounding": "gptq",
    "recover": "scales",
}
OURS["ours 4.5, 3 to 8 bits"] = {"target_bits": 4.5, "bits": (3, 4, 5, 6, 8)}
OURS["ours 4.5, 3 to 8 bits, by module"] = {"target_bits": 4.5, "bits": (3, 4, 5, 6, 8), "granularity": "module"}
OURS["ours 4.5, 3 to 8 bits, by module, GPTQ"] = {**OURS["ours 4.5, 3 to 8 bits, by module"], "rounding": "gptq"}
OURS["ours 4.5, 3 to 8 bits, by module, GPTQ, zero points"] = {
    **OURS["ours 4.5, 3 to 8 bits, by module, GPTQ"],
    "symmetric": False,
}
OURS["ours 4.5, fast"] = {"target_bits": 4.5, "bits": BITS, "quality": "fast"}

# Bits of a zero point, by the bits of the weights: none, as wide as they are, or a number like the scales.
NONE, INTEGER, FLOAT = (lambda _: 0), (lambda bits: bits), (lambda _: 16)


@dataclass(frozen=True)
class Peer:
    """A row of another library.

    Attributes:
        script: in `peers/`; the environment that it runs in has its name without `_peer.py`.
        arguments: of the script.
        zero_point: bits of each, by the bits of the weights.
    """

    script: str
    arguments: tuple[str, ...] = ()
    zero_point: Callable[[int], int] = NONE


PEERS = {
    "GPTQModel 4": Peer("gptqmodel_peer.py", zero_point=INTEGER),
    "llm-compressor GPTQ 4": Peer("llm_compressor_peer.py"),
    "HQQ 4": Peer("hqq_peer.py", zero_point=FLOAT),
    "AutoRound 4": Peer("auto_round_peer.py", zero_point=INTEGER),
    "AutoScheme 4.5": Peer("auto_round_peer.py", ("--target-bits", "4.5", "--bits", "4,8"), INTEGER),
    "AutoScheme 3.5": Peer("auto_round_peer.py", ("--target-bits", "3.5", "--bits", "2,3,4,8"), INTEGER),
}
SCRIPTS = Path(__file__).resolve().parent / "peers"
RESULTS = Path(__file__).parent / "results" / "accuracy.json"


def prepare_data(folder: Path, calibration: Path, evaluation: Path, other: Path) -> None:
    """The model and the tokens, once for all rows."""
    if (folder / "evaluation.pt").exists():
        return
    write_bundled_model(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")

    def stream(text: str) -> Tensor:
        return tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]

    def windows(text: str, count: int, length: int) -> Tensor:
        return stream(text)[: count * length].view(count, length)

    ids = stream(calibration.read_text(encoding="utf-8"))
    torch.save(ids[: SAMPLES * LENGTH].view(SAMPLES, LENGTH), folder / "calibration.pt")
    # peers read text and drop what is too short: a few tokens more for each, which they cut off
    longer = [ids[start : start + LENGTH + SPARE] for start in range(0, SAMPLES * LENGTH, LENGTH)]
    texts = ({"text": text} for text in tokenizer.batch_decode(longer))
    (folder / "calibration.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    reviews = "\n\n".join(pyarrow.parquet.read_table(other)["text"].to_pylist()[:200])
    both = (windows(evaluation.read_text(encoding="utf-8"), WINDOWS, WINDOW), windows(reviews, OTHER_WINDOWS, WINDOW))
    torch.save(both, folder / "evaluation.pt")


def quantize(row: str, folder: Path, output: Path) -> dict[str, object]:
    """Ours: one row, with its dequantized weights written to a file."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    start = time.perf_counter()
    if row in NEAREST:
        undecided = view_model(model).plan("group")
        plan = undecided.with_bits({m.unit: NEAREST[row] for m in undecided.modules}, GROUP_SIZE)
        settings = {"plan": plan, "quality": "fast"}
    else:
        settings = {"dataset": torch.load(folder / "calibration.pt"), "group_size": GROUP_SIZE, **OURS[row]}
    recipe = CPTQuantConfig(sequence_length=LENGTH, num_samples=SAMPLES, **settings).recipe()
    record = quantize_model(model, recipe, prepare(model, recipe))
    seconds = time.perf_counter() - start
    peak = peak_bytes()["cpu"] / 2**20
    packed = {f"{module.name}.weight": model.get_submodule(module.name).weight for module in record.plan.packed}
    torch.save({**dict(model.named_parameters()), **packed}, output)  # recovery trains norms, too
    return {"seconds": seconds, "peak_mb": peak, "bits": {m.name: m.scheme.bits for m in record.plan.modules}}


def run(row: str, folder: Path, arguments: argparse.Namespace) -> dict[str, object] | None:
    """One row in a process of its own, or None where its peer is not installed."""
    output = folder / "weights.pt"
    command = [sys.executable, str(Path(__file__).resolve()), "--quantize", row, "--work-dir", str(folder)]
    if peer := PEERS.get(row):
        python = (arguments.peers or folder).absolute() / peer.script.removesuffix("_peer.py") / "bin" / "python"
        if not python.exists():
            print(f"{row}: skipped, no {python}")
            return None
        command = [str(python), str(SCRIPTS / peer.script), str(folder), *peer.arguments, "--output", str(output)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=folder).stdout  # for its logs
    return json.loads(printed.splitlines()[-1])


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, window: Tensor) -> Tensor:
    """float32 `[length, classes]`."""
    return model(window.unsqueeze(0), use_cache=False).logits[0].log_softmax(-1)


def perplexity(model: PreTrainedModel, windows: Tensor, wanted: Sequence[Tensor] = ()) -> tuple[float, float]:
    """In float32; and the mean KL divergence (nats) from what is wanted of the first windows."""
    losses, divergences = [], []
    for index, window in enumerate(windows):
        found = log_probabilities(model, window)
        losses.append(F.nll_loss(found[:-1], window[1:]).item())
        if index < len(wanted):
            divergences.append(F.kl_div(found, wanted[index], log_target=True, reduction="sum").item() / len(window))
    return math.exp(math.fsum(losses) / len(losses)), math.fsum(divergences) / max(1, len(divergences))


def bits_per_weight(model: PreTrainedModel, bits: dict[str, int], zero_point: Callable[[int], int]) -> float:
    """Of the quantizable weights, with a 16-bit scale for each group (each output channel at 8 bits) and zero points
    below 8 bits."""
    total = weights = 0
    for module in view_model(model).modules:
        size, width = module.out_features * module.in_features, bits.get(module.name, 16)
        groups = 0 if width == 16 else module.out_features * (1 if width == 8 else module.in_features // GROUP_SIZE)
        weights += size
        total += size * width + groups * (16 + (zero_point(width) if width < 8 else 0))
    return total / weights


def measured(wanted: Sequence[Tensor], weights: Path | None, folder: Path) -> dict[str, float]:
    """Perplexities of the model with some weights replaced, and its divergence from what the original predicts."""
    windows, other = torch.load(folder / "evaluation.pt")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    if weights is not None:
        found = {name: weight.float() for name, weight in torch.load(weights).items()}
        model.load_state_dict({name: found[name] for name in found.keys() & model.state_dict().keys()}, strict=False)
    own, kl = perplexity(model, windows, wanted)
    return {"perplexity": own, "other": perplexity(model, other)[0], "kl": kl}


def main() -> None:
    """Run and measure the rows; write the result file and print it as the last line."""
    rows = ["unrounded", *NEAREST, *OURS, *PEERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, help="text file")
    parser.add_argument("--evaluation", type=Path, help="text file")
    parser.add_argument("--other", type=Path, help="Parquet file with a column `text`")
    parser.add_argument("--peers", type=Path, help="folder of virtual environments, one for each peer")
    parser.add_argument("--rows", nargs="+", default=rows, choices=rows, metavar="ROW", help=", ".join(rows))
    parser.add_argument("--work-dir", type=Path, required=True, help="model and tokens")
    parser.add_argument("--quantize", choices=rows, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.work_dir.resolve()
    if arguments.quantize:
        print(json.dumps(quantize(arguments.quantize, folder, folder / "weights.pt")))
        return
    folder.mkdir(parents=True, exist_ok=True)
    prepare_data(folder, arguments.calibration, arguments.evaluation, arguments.other)
    original = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    windows = torch.load(folder / "evaluation.pt")[0][:KL_WINDOWS]
    wanted = [log_probabilities(original, window) for window in windows]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    for row in arguments.rows:
        made = {"bits": {}, "seconds": 0.0, "peak_mb": 0.0} if row == "unrounded" else run(row, folder, arguments)
        if made is None:
            continue
        figures = measured(wanted, None if row == "unrounded" else folder / "weights.pt", folder)
        ours = NONE if OURS.get(row, {}).get("symmetric", True) else INTEGER
        zero_point = PEERS[row].zero_point if row in PEERS else ours
        size = bits_per_weight(original, made.pop("bits"), zero_point)
        figures = {"bits_per_weight": size, **figures, **made}
        results["rows"][row] = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
        results["rows"] = {name: results["rows"][name] for name in rows if name in results["rows"]}
        print(row, results["rows"][row], flush=True)
        results |= {
            "command": "python benchmarks/accuracy.py --calibration wikitext2_valid.txt --evaluation wikitext2_test.txt"
            " --other imdb_test.parquet --peers environments --work-dir work",
            "model": "SmolLM2-135M-Instruct",
            "group_size": GROUP_SIZE,
            "calibration_tokens": SAMPLES * LENGTH,
            "evaluation_tokens": WINDOWS * WINDOW,
            **environment(),
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
