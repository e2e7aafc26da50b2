"""hf-cptquant: mixed-precision quantization for Hugging Face transformers, every layer with the bits that it needs.

Importing the package registers it: `from_pretrained(..., quantization_config=CPTQuantConfig(...))` quantizes, and
checkpoints that it wrote reload packed.
"""

from .config import CPTQuantConfig
from .errors import CPTQuantError
from .evaluate import evaluate_model
from .modules import explain_choice
from .pipeline import make_plan, measure_frontier, measure_sensitivity, solve
from .plan import BitPlan
from .table import SensitivityTable
from .transformers_backend import register

__version__ = "0.1.0"
__all__ = [
    "BitPlan",
    "CPTQuantConfig",
    "CPTQuantError",
    "SensitivityTable",
    "evaluate_model",
    "explain_choice",
    "make_plan",
    "measure_frontier",
    "measure_sensitivity",
    "solve",
]

register()
