"""Perplexity of a language model in memory, as a module of the `evaluate` library that needs no network.

    from hf_cptquant.evaluate import METRIC_MODULES

    perplexity = evaluate.load(str(METRIC_MODULES / "perplexity"))
    perplexity.compute(predictions=texts, model=model, tokenizer=tokenizer, sequence_length=512)

`evaluate` copies this file to its cache and reads its imports line by line: one import a line.
"""

import datasets
import evaluate

from hf_cptquant import CPTQuantConfig
from hf_cptquant import CPTQuantError
from hf_cptquant import evaluate_model

INPUTS = """
Args:
    predictions: texts, which are joined and cut into windows.
    model: a loaded causal language model or encoder-decoder, quantized or not.
    tokenizer: by default the model's own.
    num_samples, sequence_length, batch_size, seed: as in `CPTQuantConfig`.
Returns:
    perplexity, with low and high, the limits of its 95 % confidence interval (bootstrap over windows); windows; tokens.
"""


class Perplexity(evaluate.Metric):
    """exp of the mean negative log-likelihood of the tokens of all windows but the first of each."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, model, tokenizer=None, **settings):
        config = CPTQuantConfig(dataset=list(predictions), tokenizer=tokenizer, **settings)
        found = {result.metric: result for result in evaluate_model(model, config)}
        if "perplexity" not in found:
            raise CPTQuantError(f"{type(model).__name__} has no perplexity; it has: {', '.join(found)}")
        result = found["perplexity"]
        return {
            "perplexity": result.value,
            "low": result.low,
            "high": result.high,
            "windows": result.windows,
            "tokens": result.tokens,
        }
