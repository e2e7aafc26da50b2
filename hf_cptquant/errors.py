"""Every error that the package raises on purpose.

One base class, so that a caller can catch all of them, and a `ValueError`, because each says that
something given (a setting, a text, a model, a file) cannot be used. A message names the thing, what
was found, and the way out. The inner layers raise bare facts; `in_module` adds the module's name
where it is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CPTQuantError(ValueError):
    """Base of all errors raised by hf-cptquant."""


class ConfigError(CPTQuantError):
    """A setting of `CPTQuantConfig` has a wrong name, type, range or combination."""


class CalibrationError(CPTQuantError):
    """The calibration data or its tokenizer cannot be used with the model."""


class ModelError(CPTQuantError):
    """The model has no structure that can be quantized, or is quantized already."""


class PlanError(CPTQuantError):
    """A bit plan contradicts itself or does not fit the model."""


class CheckpointError(CPTQuantError):
    """Files on disk are damaged, foreign, or do not say what the model needs."""


class EvaluationError(CPTQuantError):
    """A model cannot be evaluated as asked: no such task, another original, no room for its predictions."""


class HubError(CPTQuantError):
    """The Hub refused something, or could not be reached."""


@contextmanager
def in_module(name: str) -> Iterator[None]:
    """Prefix a `CPTQuantError` raised inside with the name of the module it is about."""
    try:
        yield
    except CPTQuantError as error:
        raise type(error)(f"{name}: {error}") from error
