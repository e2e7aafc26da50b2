"""AutoRound, with AutoScheme if a number of bits is asked for, on the data of `benchmarks/accuracy.py`, in an
environment of its own.

    uv venv auto_round && uv pip install --python auto_round/bin/python auto-round
    auto_round/bin/python benchmarks/peers/auto_round_peer.py FOLDER --target-bits 4.5 --bits 4,8 --output weights.pt

`FOLDER` is what `accuracy.py` prepares: the model and `calibration.jsonl`. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import os
from tempfile import TemporaryDirectory

from auto_round import AutoRound, AutoScheme
from auto_round.schemes import QuantizationScheme
from running import Rounded, parser, run
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP_SIZE, SAMPLES, LENGTH = 64, 32, 512


def scheme_for(bits: int) -> QuantizationScheme:
    """Weight-only: groups below 8 bits, and one scale per output channel at 8 bits, as ours."""
    return QuantizationScheme(bits=bits, group_size=-1 if bits == 8 else GROUP_SIZE, sym=bits == 8, data_type="int")


def quantize(arguments: argparse.Namespace) -> Rounded:
    """Search, if bits are to be found, and round."""
    folder = str(arguments.folder / "model")
    data = {
        "dataset": str(arguments.folder / "calibration.jsonl"),
        "nsamples": SAMPLES,
        "seqlen": LENGTH,
        "batch_size": 8,
    }
    scheme, *others = (scheme_for(int(bits)) for bits in arguments.bits.split(","))
    if arguments.target_bits is not None:
        scheme = AutoScheme(avg_bits=arguments.target_bits, options=[scheme, *others], **data)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rounder = AutoRound(model, tokenizer, scheme=scheme, iters=arguments.iters, device_map="cpu", **data)
    rounded, layers = rounder.quantize()
    return rounded.state_dict(), {name: layer.get("bits") for name, layer in layers.items() if "layers." in name}


if __name__ == "__main__":
    options = parser()
    options.add_argument("--target-bits", type=float, help="AutoScheme searches for them; default: all weights alike")
    options.add_argument("--bits", default="4")
    options.add_argument("--iters", type=int, default=20)
    given = options.parse_args()
    with TemporaryDirectory() as scores:  # or those of an earlier run would be taken, in no time
        os.environ["AR_AUTO_SCHEME_CACHE"] = scores
        run("auto-round", lambda: quantize(given), given.output)
