"""Results of a model → `.eval_results/*.yaml`, from which the Hub fills the leaderboards of benchmarks.

The Hub takes them for datasets alone that are benchmarks, which have an `eval.yaml` that names their tasks
(huggingface.co/docs/hub/eval-results); so it is asked when a model is pushed. Only accuracies go there: what a
perplexity is depends on tokens and windows, and ours are on the card.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from .recipe import HUB_IDS, IMAGE_DATASETS
from .record import QuantizationRecord
from .results import EvaluationResult

RESULTS_FILE = ".eval_results/hf-cptquant.yaml"


def leaderboard_files(record: QuantizationRecord, api: HfApi) -> dict[str, bytes]:
    """Path in the repository → content; empty where no result is one of a benchmark."""
    on_hub = (result for result in record.evaluation if result.metric == "accuracy" and result.dataset in HUB_IDS)
    entries = [entry for result in on_hub for entry in _entries(result, api)]
    return {RESULTS_FILE: yaml.safe_dump(entries, sort_keys=False).encode()} if entries else {}


def _entries(result: EvaluationResult, api: HfApi) -> list[dict[str, Any]]:
    """The result as an entry for every task of the dataset on the same configuration and split."""
    dataset, configuration = HUB_IDS[result.dataset]
    try:
        benchmark = Path(api.hf_hub_download(dataset, "eval.yaml", repo_type="dataset"))
    except (EntryNotFoundError, RepositoryNotFoundError):
        return []
    place = (configuration or "default", result.split)
    of_length = "images" if result.dataset in IMAGE_DATASETS else f"texts of at most {result.sequence_length} tokens"
    notes = f"accuracy on {result.windows} {of_length}, seed {result.seed}"
    return [
        {"dataset": {"id": dataset, "task_id": task["id"]}, "value": result.value, "notes": notes}
        for task in yaml.safe_load(benchmark.read_bytes())["tasks"]
        if (task.get("config", "default"), task.get("split")) == place
    ]
