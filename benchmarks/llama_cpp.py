"""What llama.cpp computes from our GGUF file, beside what the model computes here.

SmolLM2-135M is quantized with 2 to 16 bits and exported. llama.cpp goes on with some texts, taking the most probable
token each time, and gives the probabilities of all tokens; the model here is asked for its own on the same tokens.
llama.cpp rounds activations (to 8 bits block by block where a weight has a packed type, to bfloat16 where it is one),
so its probabilities differ even where the weights are the same. Therefore the file is run once more with every tensor
dequantized to float32, where llama.cpp does not round: that difference is what the export is answerable for.

    uv run --with xllamacpp python benchmarks/llama_cpp.py

Nothing is done where that build is absent.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from environment import environment
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_cptquant import BitPlan, CPTQuantConfig
from hf_cptquant.demo import python_help_texts, write_bundled_model
from hf_cptquant.llama_cpp import export_gguf
from hf_cptquant.llama_cpp.vocabulary import Vocabulary

RESULTS = Path(__file__).parent / "results" / "llama_cpp.json"
BUILD = "xllamacpp"
PROMPTS, PROMPT_LENGTH = 4, 64
TEXTS = (
    "Hello, World! It's 7 o'clock; 2,048 tokens cost $3.50 (they'll say).",
    "  indented\n\n\tdef f(x):\n        return x**2  # naïve café — 東京 🙂",
    "<|im_start|>user\nHi<|im_end|>\n",
)


class Opaque(ctypes.Structure):
    """A structure of llama.cpp's that goes back as it came; room for more than it has does no harm."""

    _fields_ = (("bytes", ctypes.c_int64 * 32),)


class ContextSettings(ctypes.Structure):
    """The beginning of llama.cpp's `llama_context_params`, as far as it is of interest here, and room for the rest."""

    _fields_ = (
        ("context", ctypes.c_uint32),
        ("_sizes", ctypes.c_uint32 * 12),
        ("flash_attention", ctypes.c_int32),
        ("_rope", ctypes.c_uint32 * 8),
        ("_callback", ctypes.c_void_p * 2),
        ("keys", ctypes.c_int32),
        ("values", ctypes.c_int32),
        ("_rest", ctypes.c_int64 * 32),
    )


class LlamaCpp:
    """A GGUF file in llama.cpp's server, on CPU, with a float32 cache.

    Args:
        path: of the file.
        length: of the longest sequence.
    """

    def __init__(self, path: Path, length: int) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel, settings.verbosity, settings.warmup = length, 1, 0, False
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
        self.server = xllamacpp.Server(settings)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(body).encode())
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text."""
        return self._post("/tokenize", {"content": text, "parse_special": True, "add_special": True})["tokens"]

    def go_on(self, tokens: list[int], count: int, vocabulary: int) -> tuple[list[int], Tensor]:
        """The most probable continuation, and the logarithms of all probabilities at each of its tokens.

        The server leaves tokens out that end in the middle of a character, so there may be fewer than `count`.
        """
        settings = {"n_predict": count, "temperature": 0, "n_probs": vocabulary, "ignore_eos": True}
        found = self._post("/completion", {"prompt": tokens, "return_tokens": True, **settings})
        steps = found["completion_probabilities"]
        tokens = [step["id"] for step in steps]
        assert tokens == found["tokens"][: len(tokens)]
        logarithms = torch.empty(len(steps), vocabulary)
        for row, step in zip(logarithms, steps, strict=True):
            ids = torch.tensor([entry["id"] for entry in step["top_logprobs"]])
            row[ids] = torch.tensor([entry["logprob"] for entry in step["top_logprobs"]])
        return tokens, logarithms


class EncoderDecoder:
    """A GGUF file of an encoder–decoder in llama.cpp's library, since its server has only decoders.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        import xllamacpp.xllamacpp

        self.library = library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
        library.llama_model_default_params.restype = library.llama_batch_get_one.restype = Opaque
        library.llama_context_default_params.restype = ContextSettings
        library.llama_model_load_from_file.restype = library.llama_init_from_model.restype = ctypes.c_void_p
        library.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
        self.model = ctypes.c_void_p(
            library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        )
        assert self.model, path
        self.start = library.llama_model_decoder_start_token(self.model)

    def go_on(self, tokens: list[int], count: int, vocabulary: int) -> tuple[list[int], Tensor]:
        """As that of `LlamaCpp`: the encoder reads the tokens, the decoder goes on after its first."""
        settings = self.library.llama_context_default_params()
        assert (settings.context, settings.flash_attention, settings.keys, settings.values) == (512, -1, 1, 1)
        settings.flash_attention = settings.keys = settings.values = 0  # none; float32
        context = ctypes.c_void_p(self.library.llama_init_from_model(self.model, settings))
        self._run(self.library.llama_encode, context, tokens)
        following, rows = [self.start], []
        for _ in range(count):
            self._run(self.library.llama_decode, context, following[-1:])
            rows.append(torch.tensor(self.library.llama_get_logits_ith(context, -1)[:vocabulary]))
            following.append(int(rows[-1].argmax()))
        self.library.llama_free(context)
        return following[1:], torch.stack(rows).log_softmax(-1)

    def _run(self, function: Any, context: ctypes.c_void_p, tokens: list[int]) -> None:
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        batch = self.library.llama_batch_get_one(array, ctypes.c_int32(len(tokens)))
        assert function(context, batch) == 0, function.__name__


def rewritten(source: Path, target: Path, vocabulary: Vocabulary | None = None) -> None:
    """The same GGUF file with every tensor in float32, or if a vocabulary is given with that instead of its own."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())  # which writes that field
    left_out = ("GGUF.", "general.architecture", *(() if vocabulary is None else ("tokenizer.",)))
    for name, field in reader.fields.items():
        if not name.startswith(left_out):
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    if vocabulary is not None:
        vocabulary.add_to(writer)
    for tensor in reader.tensors:
        if vocabulary is None:
            writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def _logits(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> Tensor:
    """What the model gives at each of the tokens that follow a prompt."""
    if model.config.is_encoder_decoder:
        read = torch.tensor([[model.config.decoder_start_token_id, *tokens[:-1]]])
        return model(torch.tensor([prompt]), decoder_input_ids=read).logits[0]
    return model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]


def compare(
    model: PreTrainedModel, other: LlamaCpp | EncoderDecoder, prompts: Sequence[list[int]], count: int
) -> dict[str, Any]:
    """How far llama.cpp's probabilities are from the model's."""
    ours, theirs, agreed = [], [], []
    for prompt in prompts:
        tokens, logarithms = other.go_on(prompt, count, model.config.vocab_size)
        logits = _logits(model, prompt, tokens)
        ours.append(logits.double().log_softmax(-1))
        theirs.append(logarithms)
        agreed.append(logits.argmax(-1) == logarithms.argmax(-1))
    # the server adds up 49,152 probabilities in float32, one after the other: normalized anew
    one, another = torch.cat(ours), torch.cat(theirs).double().log_softmax(-1)
    return {
        "largest_difference": round((one - another).abs().max().item(), 6),
        "mean_difference": round((one - another).abs().mean().item(), 6),
        "kl_divergence": round((one.exp() * (one - another)).sum(-1).mean().item(), 8),
        "same_most_probable_token": round(torch.cat(agreed).float().mean().item(), 4),
    }


def main() -> None:
    """Measure, write the result file, print it as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32, help="how far each text is continued")
    arguments = parser.parse_args()
    if importlib.util.find_spec(BUILD) is None:
        print("skipped, llama.cpp is not here: uv run --with xllamacpp python benchmarks/llama_cpp.py")
        return
    texts = python_help_texts()
    config = CPTQuantConfig(
        target_bits=5,
        bits=(2, 3, 4, 5, 6, 8, 16),
        group_size=64,
        quality="fast",
        dataset=texts[:20],
        num_samples=4,
        sequence_length=128,
        bits_override={"model.layers.0.mlp.down_proj": 16, "model.layers.1.mlp.down_proj": 6},
    )
    with tempfile.TemporaryDirectory() as work:
        original, folder = Path(work, "original"), Path(work, "quantized")
        file, control = Path(work, "model.gguf"), Path(work, "float32.gguf")
        write_bundled_model(original)
        tokenizer = AutoTokenizer.from_pretrained(original)
        AutoModelForCausalLM.from_pretrained(original, quantization_config=config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        report = export_gguf(folder, file)
        rewritten(file, control)

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        prompts = [tokenizer(text)["input_ids"][:PROMPT_LENGTH] for text in texts[-PROMPTS:]]
        length = PROMPT_LENGTH + arguments.tokens + 8
        exported = LlamaCpp(file, length)
        for text in TEXTS:
            assert exported.tokenize(text) == tokenizer(text)["input_ids"], text
        found = {
            "as exported": compare(model, exported, prompts, arguments.tokens),
            "dequantized to float32": compare(model, LlamaCpp(control, length), prompts, arguments.tokens),
        }
        plan = BitPlan.load(folder)
        checkpoint = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    result = {
        "command": f"python benchmarks/llama_cpp.py --tokens {arguments.tokens}",
        "model": "SmolLM2-135M-Instruct",
        "tokens": PROMPTS * arguments.tokens,
        "group_size": config.group_size,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "modules": {f"{scheme} as {kind}": count for (scheme, kind), count in sorted(report.modules.items())},
        "modules_not_exact": len(report.largest_difference),
        "checkpoint_bytes": checkpoint,
        "gguf_bytes": report.nbytes,
        "results": found,
        BUILD: importlib.metadata.version(BUILD),
        **environment(),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
