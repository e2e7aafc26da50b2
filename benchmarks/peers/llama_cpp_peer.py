"""Tokens per second of llama.cpp, by the package `llama-cpp-python`, for `benchmarks/runtime.py`.

    python benchmarks/peers/llama_cpp_peer.py FILE.gguf THREADS PROMPT TOKENS

A file of its own, since `benchmarks/llama_cpp.py` beside `runtime.py` has the name of that package.
"""

from __future__ import annotations

import json
import sys
import time
from statistics import median

from llama_cpp import Llama


def main() -> None:
    """Load, evaluate a prompt, decode token by token; print JSON."""
    file, *numbers = sys.argv[1:]
    threads, prompt, tokens = map(int, numbers)
    settings = {"n_threads": threads, "n_threads_batch": threads, "n_ctx": prompt + tokens + 8, "n_batch": prompt}
    start = time.perf_counter()
    model = Llama(file, verbose=False, **settings)
    loaded = time.perf_counter() - start
    ids = [100 + index % 1000 for index in range(prompt)]
    prefill = []
    for _ in range(4):
        model.reset()
        start = time.perf_counter()
        model.eval(ids)
        prefill.append(time.perf_counter() - start)
    model.reset()
    model.eval(ids[:32])
    steps = []
    for index in range(tokens + 1):
        start = time.perf_counter()
        model.eval([ids[index]])
        steps.append(time.perf_counter() - start)
    found = {
        "load_seconds": round(loaded, 3),
        "prefill_tokens_per_second": round(prompt / median(prefill[1:]), 2),
        "decode_tokens_per_second": round(tokens / sum(steps[1:]), 2),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
