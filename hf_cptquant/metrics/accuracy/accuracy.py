"""Accuracy, as a module of the `evaluate` library that needs no network, for `evaluate.evaluator` too.

    from hf_cptquant.evaluate import METRIC_MODULES

    accuracy = evaluate.load(str(METRIC_MODULES / "accuracy"))
    task = evaluate.evaluator("text-classification")
    task.compute(model, dataset, tokenizer=tokenizer, metric=accuracy, label_mapping=model.config.label2id)

`evaluate` copies this file to its cache and reads its imports line by line: each stands on one line.
"""

import datasets
import evaluate
import numpy

INPUTS = """
Args:
    predictions: classes, as numbers.
    references: labels, as numbers.
Returns:
    accuracy: share of the predictions that are the label.
"""


class Accuracy(evaluate.Metric):
    """Share of the predictions that are right."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references):
        return {"accuracy": float(numpy.mean(numpy.equal(predictions, references)))}
