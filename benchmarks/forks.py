"""Work in a process of its own that inherits what is imported: whatever it does, crashes included, others go on."""

from __future__ import annotations

import multiprocessing
import re
import traceback
from collections.abc import Callable, Sequence
from typing import Any

Step = tuple[str, Callable[[], Any]]
LONGEST_REASON = 150


def run_steps(steps: Sequence[Step], seconds: float) -> dict[str, str | None]:
    """Name of a step → why it failed, or None if it did not. A step is only tried if all before it have gone well.

    Args:
        steps: in order.
        seconds: for all of them; then the process is killed.
    """
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def work() -> None:
        for name, step in steps:
            reason = None
            try:
                step()
            except Exception as error:  # noqa: BLE001, whatever goes wrong is what is to be found out
                traceback.print_exc()
                reason = in_one_line(error)
            send.send((name, reason))
            if reason is not None:
                break
        send.close()

    process = context.Process(target=work)
    process.start()
    send.close()
    found: dict[str, str | None] = {}
    try:
        for name, _ in steps:
            if not receive.poll(seconds):
                return {**found, name: f"took longer than {seconds:.0f} s"}
            try:
                done, found[name] = receive.recv()
            except EOFError:
                return {**found, name: "the process died"}
            assert done == name
            if found[name] is not None:
                break
        return found
    finally:
        process.kill()
        process.join()


def in_one_line(error: BaseException) -> str:
    """Class and first line of an error, without what differs from run to run."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")
    text = re.sub(r"/tmp/\S*?/([\w.-]+)(?=['\s]|$)", r"\1", text)
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"
