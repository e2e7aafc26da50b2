"""Calibration text that a causal language model writes itself, for want of other (`dataset="self"`).

Drawn from what the model predicts, at temperature 1 with nothing cut off, from its first token on: text as the model
has learned it, whatever it was trained on, without a network and without a tokenizer (as in LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import find_executable_batch_size
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria
from transformers.utils import logging

from .arithmetic import linears_in_working_dtype

AT_A_TIME = 32  # sequences


class _Progress(StoppingCriteria):
    """Stops nothing; counts the tokens."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._bar.update(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def sample_text(model: PreTrainedModel, count: int, length: int, seed: int) -> Tensor:
    """Sequences that a model writes: int64 `[count, length]` on the CPU.

    Sequences never end before they are full. They begin with the token that texts of the model begin with, or, if it
    has none, with one drawn from its vocabulary. Memory for fewer sequences at a time changes what is drawn, and
    nothing else does.

    Args:
        model: a causal language model in evaluation mode; may be offloaded by accelerate.
        count, length: of the sequences.
        seed: of the draws; the state of torch's generators is restored.
    """
    with torch.random.fork_rng(range(torch.cuda.device_count())), linears_in_working_dtype(model):
        return find_executable_batch_size(_sample, starting_batch_size=min(count, AT_A_TIME))(
            model, count, length, seed
        )


def _sample(batch_size: int, model: PreTrainedModel, count: int, length: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    begin = model.generation_config.bos_token_id
    vocabulary = model.get_input_embeddings().num_embeddings
    first = torch.randint(vocabulary, (count, 1)) if begin is None else torch.full((count, 1), begin)
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    new = {"min_new_tokens": length - 1, "max_new_tokens": length - 1, "pad_token_id": 0}
    rows = []
    with logging.tqdm(total=count * (length - 1), desc="Writing calibration text", unit="token") as bar:
        for start in first.to(model.device).split(batch_size):
            mask = torch.ones_like(start)
            rows.append(
                model.generate(start, attention_mask=mask, stopping_criteria=[_Progress(bar)], **drawn, **new).cpu()
            )
    return torch.cat(rows)
