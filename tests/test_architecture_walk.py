"""A sample of `benchmarks/architectures.py`, which walks through all architectures: what is found here stands in its
results, from which the README's table is made."""

import importlib
import json
from pathlib import Path

import pytest
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import CompressedTensorsConfig

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RECORDED = json.loads((BENCHMARKS / "results" / "architectures.json").read_text(encoding="utf-8"))["architectures"]
SAMPLE = (
    "causal-lm/llama", "causal-lm/gpt2", "causal-lm/mixtral", "causal-lm/falcon", "causal-lm/llama4_text",
    "causal-lm/hy_v4", "causal-lm/lara_mini", "seq2seq-lm/bart", "seq2seq-lm/t5", "seq2seq-lm/t5gemma2",
    "masked-lm/bert", "sequence-classification/roberta", "image-classification/vit", "image-classification/swin",
    "image-classification/swinv2", "image-classification/resnet", "image-classification/efficientnet",
    "image-text-to-text/llava", "image-text-to-text/qwen2_vl", "image-text-to-text/qwen3_omni_moe_thinker",
    "speech-seq2seq/whisper", "ctc/wav2vec2", "audio-classification/hubert",
)  # fmt: skip


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("architectures")


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.filterwarnings("ignore")  # architectures have warnings of their own about what they are made of
def test_an_architecture_comes_as_far_as_the_results_say(name, benchmark, tmp_path, monkeypatch):
    walk = benchmark.Walk(*name.split("/"), tmp_path / "walk")

    def plain() -> None:
        monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "compressed-tensors", CompressedTensorsConfig)
        job = json.loads((tmp_path / "walk" / "job.json").read_text(encoding="utf-8"))
        importlib.import_module("architectures_plain").reload(**job)

    found: dict[str, str | None] = {}
    for step, run in (*walk.steps(), ("reloads plain", plain)):
        found[step] = None
        try:
            run()
        except (AttributeError, RuntimeError, ValueError) as error:
            found[step] = importlib.import_module("forks").in_one_line(error)
            break
    assert found == RECORDED[name]


def test_most_architectures_of_every_task_come_to_the_end(benchmark):
    assert list(RECORDED) == benchmark.all_names()
    for task in benchmark.TASKS:
        of_task = [steps for name, steps in RECORDED.items() if name.startswith(task + "/")]
        loaded = [steps for steps in of_task if steps["loads"] is None]
        assert len(loaded) > len(of_task) / 2, task
        packed = [steps for steps in loaded if steps.get("packs", "") is None]
        assert sum(steps.get("reloads packed", "") is None for steps in packed) > 0.9 * len(packed), task
