"""Sensitivity methods: (model, plan, calibration set, recipe) → `SensitivityTable`, by name."""

from __future__ import annotations

from . import tdmpq

METHODS = {"tdmpq": tdmpq.score}
