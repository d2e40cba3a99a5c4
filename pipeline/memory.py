"""How much memory there is, and how the C library keeps that of freed tensors."""

import ctypes
import os
import sys
from pathlib import Path

# Parameters of `mallopt`, as glibc's malloc.h numbers them, and their values in bytes.
M_TRIM_THRESHOLD, KEPT = -1, 2**31 - 1
M_MMAP_THRESHOLD, LARGEST = -3, 2**30


def keep_freed_memory() -> None:
    """Have this process keep up to 2 GiB of freed memory to use it again, in pieces of up to 1 GiB.

    glibc returns every large tensor to the system and asks for zeroed pages for the next one, which on the CPU can cost
    as much as the network itself (benchmarks/README.md). Where the C library is another one, nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, KEPT)


def memory_bytes() -> int:
    """Return the memory of this machine, or of the control group (a container, a cluster job) where that is less."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [*Path("/sys/fs/cgroup").glob("memory.max"), *Path("/sys/fs/cgroup/memory").glob("memory.limit_in_bytes")]
    found = [file.read_text().strip() for file in limits]
    return min(physical, *(int(limit) for limit in found if limit.isdigit()), physical)
