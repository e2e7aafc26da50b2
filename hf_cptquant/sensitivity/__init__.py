"""Sensitivity methods: (model, plan, calibration set, recipe) → `SensitivityTable`, by name."""

from __future__ import annotations

from . import pmpq, tdmpq

METHODS = {"pmpq": pmpq.score, "tdmpq": tdmpq.score}
