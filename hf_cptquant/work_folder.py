"""Results on disk as soon as they are known, so that a killed run goes on where it was.

A folder belongs to one run: `run.json` holds the facts that decide its results (hashes of weights and data, settings),
and another run is refused by naming the facts that differ. Each process appends to a file of its own, one JSON object a
line; a line that was cut short by the kill is passed over. Floats survive JSON exactly, so a resumed run ends with the
very table of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from . import ranks
from .errors import ConfigError

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it

FACTS_FILE = "run.json"


def fingerprint(facts: Mapping[str, Any]) -> str:
    """SHA-256 of facts that JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class Journal:
    """Key → result, each written at once.

    Args:
        folder: where, or None to keep the results in memory only.
        facts: what decides the results, as JSON values.

    Attributes:
        results: those of earlier runs and of this process.

    Raises:
        ConfigError: the folder holds the results of a run with other facts, or other things.
    """

    def __init__(self, folder: Path | None, facts: Mapping[str, Any]) -> None:
        self.results: dict[str, Any] = {}
        self._file: Path | None = None
        if folder is not None:
            if ranks.rank() == 0:
                _claim(folder, facts)
            ranks.gather(None)  # the others look only after the first has claimed the folder
            _claim(folder, facts)
            for path in sorted(folder.glob("results-*.jsonl")):
                self.results.update(_read(path))
            ranks.gather(None)  # and write only after all have looked
            self._file = folder / f"results-{ranks.rank()}.jsonl"
            if self.results:
                logger.warning(f"Resuming from {folder}: {len(self.results)} results are there already.")

    def add(self, key: str, result: Any) -> None:
        """Remember a result (a JSON value)."""
        self.results[key] = result
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps([key, result]))  # the line break first: ends a line that was cut short
                file.flush()
                os.fsync(file.fileno())


def _claim(folder: Path, facts: Mapping[str, Any]) -> None:
    """Make a folder this run's, or check that it is."""
    path = folder / FACTS_FILE
    if path.exists():
        facts, found = json.loads(json.dumps(facts)), _facts(path)
        differing = [name for name in {**found, **facts} if found.get(name) != facts.get(name)]
        if differing:
            shown = ", ".join(
                f"{name} {_brief(found.get(name))} there, {_brief(facts.get(name))} here" for name in differing
            )
            raise ConfigError(f"work_dir {folder} belongs to another run ({shown}); give another folder or delete it")
        return
    written = path.with_suffix(".new")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"work_dir {folder} is not a folder; give another folder") from error
    if any(entry != written for entry in folder.iterdir()):
        raise ConfigError(f"work_dir {folder} is not a folder of an earlier run and not empty; give another folder")
    written.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    written.replace(path)


def _facts(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}; give another folder or delete it") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is damaged: no JSON object; give another folder or delete it")
    return found


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:12] + "…"


def _read(path: Path) -> dict[str, Any]:
    results = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            key, result = json.loads(line)
        except ValueError:  # empty, or cut short by a kill
            continue
        results[key] = result
    return results
