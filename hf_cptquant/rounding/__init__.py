"""Rounding methods: (weight, scheme) → integers, scales, zero points, by name."""

from __future__ import annotations

from .nearest import round_nearest

ROUNDINGS = {"nearest": round_nearest}
