"""The figures that the paper prints (arXiv 2412.03599, tables 1 and 2), to stand beside ours."""

from __future__ import annotations

DEVIATIONS = {  # standard deviation from the mean sensitivity: first 30 % of the layers, middle, remaining
    "OPT-125M": (3.573, 3.183, None),
    "OPT-350M": (4.108, 3.451, 3.662),
    "OPT-1.3B": (7.681, 5.724, 3.662),
}

DROPS = {  # model → method → accuracy drop and CR on IMDB, perplexity drop and CR on WikiText
    "BERT base": {
        "CMPQ": (0.03, 2.18, 5, 3.019), "PMPQ": (0.03, 4.0, 4, 3.21),
        "TDMPQ": (0.12, 3.2, 8, 3.644), "FP16": (0.9, 3.2, 12, 2.0),
    },
    "BERT large": {
        "CMPQ": (0.0036, 3.2, 2, 3.055), "PMPQ": (0.1, 2.9, 7, 3.45),
        "TDMPQ": (0.0084, 2.45, 6, 3.7), "FP16": (0.38, 2.0, 12, 2.0),
    },
    "BERT multilingual": {
        "CMPQ": (0.01, 3.1, 10, 3.33), "PMPQ": (0.00136, 2.29, 5, 2.17),
        "TDMPQ": (0.0172, 2.67, 7, 3.85), "FP16": (0.345, 2.0, 12, 2.0),
    },
    "OPT-125M": {
        "CMPQ": (0.002, 3.05, 6, 2.91), "PMPQ": (0.00184, 3.59, 6, 3.89),
        "TDMPQ": (0.00184, 3.15, 3, 2.86), "FP16": (0.4, 2.5, 12, 2.0),
    },
    "OPT-350M": {
        "CMPQ": (0.004, 2.81, 7, 4.33), "PMPQ": (0.002, 2.60, 6, 3.85),
        "TDMPQ": (0.002, 3.25, 8, 3.14), "FP16": (0.3, 2.5, 10, 2.0),
    },
    "OPT-1.3B": {
        "CMPQ": (0.02, 2.57, 7, 4.33), "PMPQ": (0.01681, 2.60, 8, 3.85),
        "TDMPQ": (0.017, 4.53, 9, 3.14), "FP16": (0.4, 2.35, 12, 2.0),
    },
    "OPT-2.7B": {
        "CMPQ": (0.0176, 2.4, 6, 4.25), "PMPQ": (0.014, 2.43, 5, 3.88),
        "TDMPQ": (0.015, 4.55, 4, 3.34), "FP16": (0.3, 2.5, 10, 2.0),
    },
}  # fmt: skip

COUNTERPARTS = {  # our name of a model → the paper's model that is the same, or the nearest
    "SmolLM2-135M-Instruct": "OPT-125M",
    "all-MiniLM-L6-v2": "BERT base",
    "bert-base-uncased": "BERT base",
    "bert-large-uncased": "BERT large",
    "bert-base-multilingual-cased": "BERT multilingual",
    "facebook/opt-125m": "OPT-125M",
    "facebook/opt-350m": "OPT-350M",
    "facebook/opt-1.3b": "OPT-1.3B",
    "facebook/opt-2.7b": "OPT-2.7B",
}
