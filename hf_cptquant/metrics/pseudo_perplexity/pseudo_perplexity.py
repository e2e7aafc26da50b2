"""Pseudo-perplexity of a masked language model in memory, as a module of the `evaluate` library that needs no network.

    from hf_cptquant.evaluate import METRIC_MODULES

    pseudo_perplexity = evaluate.load(str(METRIC_MODULES / "pseudo_perplexity"))
    pseudo_perplexity.compute(predictions=texts, model=model, tokenizer=tokenizer, sequence_length=512)

`evaluate` copies this file to its cache and reads its imports line by line: each stands on one line.
"""

import datasets
import evaluate

from hf_cptquant.evaluate import figure_of_texts

INPUTS = """
Args:
    predictions: texts, which are joined and cut into windows.
    model: a loaded masked language model, quantized or not.
    tokenizer: by default the model's own.
    num_samples, sequence_length, batch_size, seed: as in `CPTQuantConfig`.
Returns:
    pseudo_perplexity; low, high: limits of its 95 % confidence interval (bootstrap over windows); windows; tokens.
"""


class PseudoPerplexity(evaluate.Metric):
    """exp of the mean negative log-likelihood of the tokens of all windows, each masked in turn."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="Salazar et al. 2020, Masked Language Model Scoring, arXiv 1910.14659",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, model, **settings):
        return figure_of_texts("pseudo_perplexity", list(predictions), model, **settings)
