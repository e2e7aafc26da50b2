"""How fast packed layers and models run beside bfloat16, and beside other libraries' layers, on this machine.

Products: one linear layer, by shape, scheme and rows, as a ratio to `nn.Linear` in bfloat16 (2: twice as fast), and
some in float16 and float32 as ratios to that in the same. The calls go round over so many copies of each layer that
no weight is still in the cache. Models: SmolLM2-135M, and random weights in the shape of Llama-3.2-1B; each in
processes of its own (the best of two rounds), in bfloat16, with 4 bits in groups of 64 and a few blocks at 8 bits
(about 4.5 bits per weight), and with the embedding, which is the head, too, at 8 bits besides. Decoding reads all
weights for every token, so its speed is also given as a share of the bandwidth with which memory is copied. Without
numba, torch's kernels alone are measured. Peers are measured where they are installed:

    uv run --with torchao --with optimum-quanto --with hqq --with bitsandbytes --with gptqmodel \\
        --with llama-cpp-python python benchmarks/runtime.py

`OMP_NUM_THREADS` chooses the threads. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from environment import environment
from gguf import GGUFReader
from timing import median_seconds
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    HqqConfig,
    LlamaConfig,
    QuantoConfig,
    TorchAoConfig,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_cptquant import CPTQuantConfig
from hf_cptquant.demo import write_bundled_model
from hf_cptquant.grid import QuantizedWeight, integer_range
from hf_cptquant.llama_cpp import export_gguf
from hf_cptquant.model_view import input_embedding, view_model
from hf_cptquant.modules import QuantLinear, explain_choice
from hf_cptquant.plan import PER_CHANNEL, LayerScheme

RESULTS = Path(__file__).parent / "results" / "runtime.json"
LLAMA_CPP_PEER = Path(__file__).parent / "peers" / "llama_cpp_peer.py"
SHAPES = ("576x576", "2048x2048", "4096x4096", "4096x14336", "14336x4096")  # outputs, inputs
ROWS = (1, 8, 32, 128, 512)
GROUP_SIZE = 64
SCHEMES = (LayerScheme(2, GROUP_SIZE), LayerScheme(3, GROUP_SIZE), LayerScheme(4, GROUP_SIZE),
           LayerScheme(4, GROUP_SIZE, False), LayerScheme(5, GROUP_SIZE), LayerScheme(6, GROUP_SIZE),
           LayerScheme(6, GROUP_SIZE, False), LayerScheme(8), LayerScheme(8, PER_CHANNEL, False))  # fmt: skip
SHAPES_IN_OTHERS, SCHEMES_IN_OTHERS = ("768x768", "2048x2048"), (SCHEMES[1], SCHEMES[2], SCHEMES[3], SCHEMES[7])
OUT_OF_CACHE = 2**26  # bytes over which the copies of a layer go round
PROMPT, TOKENS = 256, 24
LLAMA_1B = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}  # fmt: skip
MODELS = ("SmolLM2-135M-Instruct", "Llama-1B, random")
ROUNDS = 2
KINDS = {"packed with the embedding": True, "packed": False}  # and whether it is; the last is for llama.cpp, too
Makers = dict[str, Callable[[tuple[int, int]], tuple[Callable[[], nn.Module], int]]]
PEERS = {"torchao": "torchao", "quanto": "optimum-quanto", "hqq": "hqq", "bitsandbytes": "bitsandbytes",
         "GPTQModel": "gptqmodel"}  # fmt: skip
OF_MODELS = ("torchao", "quanto", "hqq", "bitsandbytes")  # peers that quantize without calibration


def installed(distribution: str) -> str | None:
    """The version of a distribution, if it is here."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def dense_layer(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    """A random layer without a bias."""
    layer = nn.Linear(shape[1], shape[0], bias=False, device="meta", dtype=dtype).to_empty(device="cpu")
    layer.weight = nn.Parameter(torch.randn(shape, dtype=dtype) * 0.05, requires_grad=False)
    return layer


def packed_layer(scheme: LayerScheme, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> QuantLinear:
    """A packed layer of random integers."""
    low, high = integer_range(scheme.bits)
    groups = (shape[0], scheme.groups(shape[1]))
    integers = torch.randint(low, high + 1, shape, dtype=torch.int8)
    zero_point = None if scheme.symmetric else torch.randint(low, high + 1, groups, dtype=torch.int8)
    scale = (0.005 * (0.5 + torch.rand(groups))).to(dtype)
    return QuantLinear.from_quantized(QuantizedWeight(integers, scale, zero_point, scheme), None)


def copies_of(make: Callable[[], nn.Module], nbytes: int) -> list[nn.Module]:
    """So many of them that they do not fit into the cache together."""
    return [make() for _ in range(1 + OUT_OF_CACHE // nbytes)]


def calls(layers: Sequence[nn.Module], x: Tensor) -> list[Callable[[], Tensor]]:
    """One call for each copy."""
    return [lambda layer=layer: layer(x) for layer in layers]


@torch.no_grad()
def products(
    makers: Makers, shapes: Sequence[str], budget: float, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """Shape → kind of layer → rows → speed relative to the dense layer, and the milliseconds of that.

    Args:
        makers: kind → a function of a shape that gives what makes a layer, and how many bytes its weight has.
        shapes: outputs × inputs, such as `576x576`.
        budget: seconds for each shape and number of rows.
    """
    found: dict[str, Any] = {}
    for name in shapes:
        out_features, in_features = map(int, name.split("x"))
        shape = (out_features, in_features)
        name_of_dense = str(dtype).removeprefix("torch.")
        dense = copies_of(lambda shape=shape: dense_layer(shape, dtype), dtype.itemsize * shape[0] * shape[1])
        kinds = {kind: copies_of(*make(shape)) for kind, make in makers.items()}
        of_shape: dict[str, Any] = {f"{name_of_dense}, ms": {}, **{kind: {} for kind in kinds}}
        for rows in ROWS:
            x = torch.randn(rows, shape[1]).to(dtype)
            layers = {name_of_dense: dense, **kinds}
            seconds = median_seconds({kind: calls(layers[kind], x) for kind in layers}, budget)
            of_shape[f"{name_of_dense}, ms"][str(rows)] = round(1000 * seconds[name_of_dense], 4)
            for kind in kinds:
                of_shape[kind][str(rows)] = round(seconds[name_of_dense] / seconds[kind], 3)
        found[name] = of_shape
    return found


def our_layers(schemes: Sequence[LayerScheme] = SCHEMES, dtype: torch.dtype = torch.bfloat16) -> Makers:
    """Makers of packed layers by scheme."""

    def maker(scheme: LayerScheme, shape: tuple[int, int]) -> tuple[Callable[[], nn.Module], int]:
        layer = packed_layer(scheme, shape, dtype)
        return partial(copy.deepcopy, layer), scheme.nbytes(*shape, dtype.itemsize)

    return {str(scheme): partial(maker, scheme) for scheme in schemes}


def peer_layers(name: str) -> Makers:
    """Makers of a peer's layers with 4 bits in groups of 64 and with 8 bits, as far as it has them on this device."""
    if name == "torchao":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig  # what it has for CPUs, in 0.18
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        configs = {4: PrototypeInt4WeightOnlyConfig(group_size=GROUP_SIZE), 8: Int8WeightOnlyConfig()}

        def make(shape: tuple[int, int], bits: int) -> nn.Module:
            holder = nn.Sequential(dense_layer(shape))
            quantize_(holder, configs[bits])
            return holder[0]
    elif name == "quanto":
        from optimum.quanto import QLinear, freeze, qint4, qint8

        def make(shape: tuple[int, int], bits: int) -> nn.Module:
            layer = QLinear.from_module(dense_layer(shape), weights={4: qint4, 8: qint8}[bits])
            freeze(layer)
            return layer
    elif name == "hqq":
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        def make(shape: tuple[int, int], bits: int) -> nn.Module:
            settings = BaseQuantizeConfig(nbits=bits, group_size=GROUP_SIZE)
            return HQQLinear(dense_layer(shape), settings, compute_dtype=torch.bfloat16, device="cpu")
    elif name == "GPTQModel":
        from gptqmodel.nn_modules.qlinear.torch_cpu_avx512 import TorchCpuAvx512Linear  # its fastest on CPUs

        def make(shape: tuple[int, int], bits: int) -> nn.Module:
            sizes = {"in_features": shape[1], "out_features": shape[0], "group_size": GROUP_SIZE}
            layer = TorchCpuAvx512Linear(bits=bits, sym=True, desc_act=False, bias=False, **sizes)
            layer.qweight.random_()
            layer.qzeros.fill_(-(2**31) + 0x08888888)  # 8 in each nibble
            layer.scales.fill_(0.01)
            layer.post_init()
            return layer.eval()
    else:
        from bitsandbytes.nn import Linear4bit, Params4bit

        def make(shape: tuple[int, int], bits: int) -> nn.Module:
            layer = Linear4bit(shape[1], shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
            layer.weight = Params4bit(dense_layer(shape).weight.data, False, blocksize=GROUP_SIZE, quant_type="nf4")
            return layer.to("cpu")

    widths = (4,) if name in ("bitsandbytes", "GPTQModel") else (4, 8)  # 8 bits quantize the inputs, too, or are slow

    def maker(bits: int, shape: tuple[int, int]) -> tuple[Callable[[], nn.Module], int]:
        alike = name in ("quanto", "GPTQModel")  # whose layers cannot be copied, or are made when they are called
        again = partial(make, shape, bits) if alike else partial(copy.deepcopy, make(shape, bits))
        return again, shape[0] * shape[1] * bits // 8

    return {f"{bits} bits": partial(maker, bits) for bits in widths}


@torch.no_grad()
def overhead() -> dict[str, float]:
    """Microseconds of a call with one row and a weight of 576 × 576 that stays in the cache, and the ratio."""
    shape, x = (576, 576), torch.randn(1, 576).bfloat16()
    kinds = {"bfloat16": dense_layer(shape), **{str(scheme): packed_layer(scheme, shape) for scheme in SCHEMES}}
    seconds = median_seconds({kind: calls([layer], x) for kind, layer in kinds.items()}, 1.0)
    microseconds = {kind: round(1e6 * taken, 2) for kind, taken in seconds.items()}
    ratios = {f"{kind}, ratio": round(seconds[kind] / seconds["bfloat16"], 3) for kind in kinds}
    return {**microseconds, **ratios}


def copy_bandwidth() -> float:
    """Bytes read and written per second when memory is copied."""
    source = torch.ones(2**28, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = median_seconds({"copy": [lambda: target.copy_(source)]}, 1.0)["copy"]
    return 2 * source.nbytes / seconds


def peer_config(name: str) -> QuantizationConfigMixin:
    """A peer's 4 bits in groups of 64 for `from_pretrained`."""
    if name == "torchao":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=GROUP_SIZE))
    if name == "quanto":
        return QuantoConfig(weights="int4")
    if name == "hqq":
        return HqqConfig(nbits=4, group_size=GROUP_SIZE)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")


@torch.no_grad()
def of_model(folder: str, peer: str | None) -> dict[str, float]:
    """Seconds to load a model, its resident memory, and tokens per second; run in a process of its own."""
    resident = psutil.Process().memory_info().rss
    how = {} if peer is None else {"quantization_config": peer_config(peer), "device_map": "cpu"}
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, **how).eval()
    loaded = time.perf_counter() - start
    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    prefill = median_seconds({"": [lambda: model(ids, use_cache=False, logits_to_keep=1)]}, 0.0)[""]
    found = model(ids[:, :32], use_cache=True, logits_to_keep=1)
    cache, steps = found.past_key_values, []
    for _ in range(TOKENS + 1):
        token = found.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        found = model(token, past_key_values=cache, use_cache=True)
        steps.append(time.perf_counter() - start)
    speeds = {
        "load_seconds": round(loaded, 3),
        "resident_mb": round((psutil.Process().memory_info().rss - resident) / 1e6, 1),
        "prefill_tokens_per_second": round(PROMPT / prefill, 2),
        "decode_tokens_per_second": round(TOKENS / sum(steps[1:]), 2),
    }
    if peer is not None:  # what its tensors take they do not tell
        return speeds
    held = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    if not model.config.tie_word_embeddings:  # of an embedding of its own one row is read
        held.pop(id(model.get_input_embeddings().weight))
    return {**speeds, "read_bytes_per_token": sum(held.values())}


def write_model(name: str, folder: Path) -> None:
    """The bfloat16 model by that name."""
    if name == MODELS[0]:
        write_bundled_model(folder)
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_1B), dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02) if parameter.dim() > 1 else parameter.data.fill_(1)
    model.tie_weights()
    model.save_pretrained(folder)


def write_quantized(source: Path, folder: Path, with_embedding: bool) -> float:
    """The model with 4 bits, but the first of every 16 blocks, and maybe the embedding, with 8; its bits per weight."""
    model = AutoModelForCausalLM.from_pretrained(source)
    undecided = view_model(model, outside=[input_embedding(model)] if with_embedding else ()).plan("module")
    blocks = list(dict.fromkeys(module.block for module in undecided.inside.modules))
    of_blocks = {block: 4 if index % 16 else 8 for index, block in enumerate(blocks)}
    bits = {module.unit: 8 if module.outside else of_blocks[module.block] for module in undecided.modules}
    plan = undecided.with_bits(bits, GROUP_SIZE)
    del model
    config = CPTQuantConfig(plan=plan, quality="fast")
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(folder)
    return plan.bits_per_weight


def child(*command: str) -> dict[str, Any]:
    """What a process of its own prints as JSON in its last line, or the error that it ended with."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def best(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The best of each figure: what else the machine did meanwhile only makes them worse."""
    if any("failed" in figures for figures in rounds):
        return rounds[0]
    return {key: (max if "per_second" in key else min)(figures[key] for figures in rounds) for key in rounds[0]}


def models(names: Sequence[str], peers: Sequence[str], bandwidth: float) -> dict[str, Any]:
    """Model → kind (bfloat16, two packed, peers, llama.cpp) → figures, of some rounds in which each kind has a turn;
    those of quantized models also relative to bfloat16."""
    found: dict[str, Any] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as work:
            original = Path(work, "original")
            write_model(name, original)
            commands = {"bfloat16": (__file__, "--model", str(original))}
            bits = {}
            for kind, with_embedding in KINDS.items():
                quantized = Path(work, kind)
                bits[kind] = write_quantized(original, quantized, with_embedding)
                commands[kind] = (__file__, "--model", str(quantized))
            commands |= {peer: (*commands["bfloat16"], "--peer", peer) for peer in peers}
            if name == MODELS[0] and installed("llama-cpp-python"):
                file = Path(work, "model.gguf")
                AutoTokenizer.from_pretrained(original).save_pretrained(quantized)
                export_gguf(quantized, file)
                of_file = {"read_bytes_per_token": sum(int(tensor.n_bytes) for tensor in GGUFReader(file).tensors)}
                settings = (str(torch.get_num_threads()), str(PROMPT), str(TOKENS))
                commands["llama.cpp"] = (str(LLAMA_CPP_PEER), str(file), *settings)
            rounds = [{kind: child(*command) for kind, command in commands.items()} for _ in range(ROUNDS)]
        found[name] = {kind: best([figures[kind] for figures in rounds]) for kind in commands}
        if "llama.cpp" in commands:
            found[name]["llama.cpp"] |= of_file
        for kind, figures in found[name].items():
            if kind in bits:
                figures["bits_per_weight"] = round(bits[kind], 4)
            for step in ("decode", "prefill") if kind != "bfloat16" and "failed" not in figures else ():
                key = f"{step}_tokens_per_second"
                figures[f"{step}_ratio"] = round(figures[key] / found[name]["bfloat16"][key], 3)
            if "read_bytes_per_token" in figures:
                reads = figures["read_bytes_per_token"] * figures["decode_tokens_per_second"]
                figures["share_of_copy_bandwidth"] = round(reads / bandwidth, 3)
    return found


def main() -> None:
    """Measure, write the result file, print it as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each shape and number of rows")
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="outputs x inputs of the products")
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS, help="which models to run")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--model", help=argparse.SUPPRESS)  # what the processes are told that this one starts
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.model or arguments.peer:
        found = (
            of_model(arguments.model, arguments.peer)
            if arguments.model
            else products(peer_layers(arguments.peer), arguments.shapes, arguments.seconds)
        )
        print(json.dumps(found))
        return
    start, bandwidth = time.perf_counter(), copy_bandwidth()
    versions = {name: installed(distribution) for name, distribution in PEERS.items()}
    peer = (__file__, "--seconds", f"{arguments.seconds / 4:g}", "--shapes", *arguments.shapes, "--peer")
    peers = [name for name, version in versions.items() if version is not None]
    result = {
        "command": f"python benchmarks/runtime.py --seconds {arguments.seconds:g}",
        "numba": installed("numba"),
        "kernels": {str(scheme): explain_choice(packed_layer(scheme, (2048, 2048))) for scheme in SCHEMES},
        "copy_bandwidth_gb_per_second": round(bandwidth / 1e9, 2),
        "overhead_microseconds": overhead(),
        "models": models(arguments.models, [name for name in peers if name in OF_MODELS], bandwidth),
        "products": products(our_layers(), arguments.shapes, arguments.seconds),
        "products in others": {
            str(dtype).removeprefix("torch."): products(
                our_layers(SCHEMES_IN_OTHERS, dtype), SHAPES_IN_OTHERS, arguments.seconds, dtype
            )
            for dtype in (torch.float16, torch.float32)
        },
        "peers": {name: child(*peer, name) for name in peers},
        "peer_versions": {**versions, "llama.cpp": installed("llama-cpp-python")},
        "seconds": round(time.perf_counter() - start, 1),
        **environment(),
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
