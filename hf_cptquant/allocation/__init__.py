"""Allocation: (unit → score, bit widths) → unit → bits, by name. No model, no torch."""

from __future__ import annotations

from .clusters import kmeans

ALLOCATIONS = {"kmeans": kmeans}
