"""How much memory there is, how the C library keeps that of freed tensors, and what Python does not collect."""

import atexit
import ctypes
import gc
import importlib
import mmap
import os
import sys
from pathlib import Path
from types import ModuleType

# Parameters of `mallopt`, as glibc's malloc.h numbers them, and their values in bytes.
M_TRIM_THRESHOLD, KEPT = -1, 2**31 - 1
M_MMAP_THRESHOLD, LARGEST = -3, 2**30
M_ARENA_MAX, HEAPS = -8, 2
# Advice of `madvise`, as Linux numbers it.
MADV_COLD, MADV_POPULATE_READ = 20, 22


def keep_freed_memory() -> None:
    """Have this process keep up to 2 GiB of freed memory to use it again, in pieces of up to 1 GiB.

    glibc returns every large tensor to the system and asks for zeroed pages for the next one, which on the CPU can cost
    as much as the network itself (benchmarks/README.md). Threads share two heaps, so that each uses again what another
    one freed: glibc would give each its own. Where the C library is another one, nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, KEPT)
        mallopt(M_ARENA_MAX, HEAPS)


def release_freed_memory() -> None:
    """Return freed memory to the system, for a process that goes on to something else."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def read_pages(address: int, size: int) -> None:
    """Read the memory-mapped pages of `size` bytes from `address` on, so that using them does not wait for the disk."""
    _advise(address, size, MADV_POPULATE_READ)


def release_pages(address: int, size: int) -> None:
    """Let the system take the pages of these bytes first where it needs memory; they keep their values."""
    _advise(address, size, MADV_COLD)


def _advise(address: int, size: int, advice: int) -> None:
    """Call `madvise` on the pages of these bytes; a system that does not know the advice goes on without."""
    if sys.platform == "linux" and size:
        start = address // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + size - start), advice)


def import_for_good(name: str) -> ModuleType:
    """Import a module with all that it imports, and leave these out of garbage collection, at the exit too.

    The half a million objects of torch and its like live as long as the process. Searching them for garbage, again and
    again while they are made, is a fifth of the time of their import; and at the exit it takes a second.
    """
    if name in sys.modules:
        return sys.modules[name]
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        atexit.register(gc.freeze)  # what is imported later; called before the interpreter's last collection
        if was_enabled:
            gc.enable()


def free_bytes() -> int:
    """Return the memory that programs can have on this machine now; at most that of the control group."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return min([memory_bytes(), *free])


def memory_bytes() -> int:
    """Return the memory of this machine, or of the control group (a container, a cluster job) where that is less."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [*Path("/sys/fs/cgroup").glob("memory.max"), *Path("/sys/fs/cgroup/memory").glob("memory.limit_in_bytes")]
    found = [file.read_text().strip() for file in limits]
    return min(physical, *(int(limit) for limit in found if limit.isdigit()), physical)
