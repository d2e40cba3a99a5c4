"""Registers the accelerator of device.cpp with torch, for the whole process: import it before anything else of torch.

It replaces parameters when a module moves, as NPU, MLU and XLA do and CUDA does not. With ACCELERATOR_STREAMS in the
environment it has streams, which copy as late as they may: what reads a copy too early, or gives its memory up, fails.
"""

import importlib.machinery
import os
import sys
import types
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

NAME = "mlu"
"""accelerate asks backends by name whether they are there; with this one, a module of the vendor's name suffices."""
BUILD = "ACCELERATOR_BUILD"
"""Environment variable: the folder that the extension is built in, and found in again."""
FREE_BYTES = 1 << 30


class Backend:
    """What torch and accelerate ask of `torch.mlu`."""

    is_available = is_bf16_supported = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    set_device = staticmethod(lambda index: None)
    synchronize = staticmethod(lambda *args: None)
    empty_cache = staticmethod(lambda: None)
    mem_get_info = staticmethod(lambda *args: (FREE_BYTES, FREE_BYTES))
    manual_seed = manual_seed_all = staticmethod(torch.default_generator.manual_seed)
    get_rng_state = staticmethod(lambda *args: torch.get_rng_state())
    get_rng_state_all = staticmethod(lambda: [torch.get_rng_state()])
    set_rng_state = staticmethod(lambda state, *args: torch.set_rng_state(state))
    set_rng_state_all = staticmethod(lambda states: torch.set_rng_state(states[0]))
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


vendor = types.ModuleType(f"torch_{NAME}")
vendor.__spec__ = importlib.machinery.ModuleSpec(vendor.__name__, None)
sys.modules[vendor.__name__] = vendor
torch.utils.rename_privateuse1_backend(NAME)
device = load(
    "test_accelerator",
    [str(Path(__file__).with_name("device.cpp"))],
    build_directory=os.environ[BUILD],
    extra_cflags=["-O1"],
)
torch._register_device_module(NAME, Backend)
torch.utils.generate_methods_for_privateuse1_backend()
