"""Giving memory back to the system, so that a process takes no more than its model does, and how much it took.

Two things keep memory that nobody uses: pages that were read of a mapped safetensors file stay for as long as any
tensor of the file is in use, and the C library keeps what lies free between tensors in use. Both can be told to let go
on Linux; elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor


def mapped_ranges() -> list[tuple[int, int]]:
    """Addresses at which safetensors files are mapped into this process."""
    if sys.platform != "linux":
        return []
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    bounds = (line.split(maxsplit=1)[0].split("-") for line in lines if line.endswith(".safetensors"))
    return [(int(start, 16), int(end, 16)) for start, end in bounds]


def release(tensor: Tensor, mapped: Sequence[tuple[int, int]]) -> None:
    """Let go of the pages of a tensor in a mapped file that was only read and is not needed any more.

    Args:
        tensor: nothing else may use its values; one outside mapped files is left alone.
        mapped: what `mapped_ranges` gave.
    """
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    if any(low <= start and end <= high for low, high in mapped):
        start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def trim() -> None:
    """Have the C library return what is free between tensors in use; glibc can."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def peak_bytes() -> dict[str, int]:
    """The most memory that this process has had since it began, in bytes: of the system's, and of each GPU's that it
    has used."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    peaks = {f"cuda:{index}": torch.cuda.max_memory_allocated(index) for index in gpus}
    return {"cpu": _peak_of_process(), **{name: peak for name, peak in peaks.items() if peak}}


def _peak_of_process() -> int:
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":  # whose `ru_maxrss` begins with the peak of the process that started this one
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):  # which sandboxes such as gVisor do not tell
            return 1024 * int(found[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
