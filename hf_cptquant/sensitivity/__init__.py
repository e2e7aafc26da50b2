"""Sensitivity methods: (model, plan, calibration set, recipe) → `SensitivityTable`, by name."""

from __future__ import annotations

from . import cmpq, pmpq, tdmpq

METHODS = {"cmpq": cmpq.score, "pmpq": pmpq.score, "tdmpq": tdmpq.score}
