"""Measure a quantized model with the lm-evaluation-harness (`pip install lm_eval[hf]`), packed, as it is in use.

Importing hf_cptquant is all that the harness's `hf` models need for it; without the import, `lm_eval --model hf
--model_args pretrained=FOLDER` measures the same weights through compressed-tensors, dense. A folder with task files
may be given beside tasks of the harness; `examples/lm_eval/` holds a task that needs no network:

    python examples/evaluate_with_lm_eval.py smollm2-135m-cptquant hellaswag
    python examples/evaluate_with_lm_eval.py smollm2-135m-cptquant capitals examples/lm_eval
"""

import sys

import lm_eval
import torch
from lm_eval.tasks import TaskManager

import hf_cptquant  # noqa: F401  (loads what it wrote packed)

folder, task, *include = sys.argv[1:]
results = lm_eval.simple_evaluate(
    model="hf",
    model_args={"pretrained": folder, "dtype": "auto"},
    device="cuda" if torch.cuda.is_available() else "cpu",
    tasks=[task],
    task_manager=TaskManager(include_path=include or None),
)
for name, value in results["results"][task].items():
    print(f"{name}: {value}")
