"""The device that a program runs on, the type it computes in, and its memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys

import torch

from configurator import ConfigError
from runs.console import warn


def pick_device(wanted: str, local_rank: int = 0) -> str:
    """'auto' and 'cuda' to the name of a device that is here; ConfigError where it is not."""
    if wanted == 'auto':
        wanted = (
            'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
        )
    if not re.fullmatch(r'cpu|mps|cuda(:\d+)?', wanted):
        raise ConfigError(f'device={wanted!r}: auto, cpu, mps, cuda or one of several, such as cuda:1')
    if wanted.startswith('cuda') and not torch.cuda.is_available():
        raise ConfigError(f'device={wanted!r}, but torch sees no CUDA device here: use --device=cpu')
    if wanted.startswith('cuda:') and int(wanted[5:]) >= torch.cuda.device_count():
        raise ConfigError(f'device={wanted!r}, but torch sees {torch.cuda.device_count()} CUDA devices here')
    if wanted == 'mps' and not torch.backends.mps.is_available():
        raise ConfigError("device='mps', but torch sees no Apple GPU here: use --device=cpu")
    return f'cuda:{local_rank}' if wanted == 'cuda' else wanted


def pick_dtype(wanted: str, device: str) -> str:
    """bf16 where the device computes it natively; fp16 with a loss scaler on older GPUs; else fp32."""
    if wanted == 'auto':
        if device.startswith('cuda'):
            return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
        return 'bfloat16' if device == 'cpu' and cpu_has_bf16() else 'float32'
    if wanted == 'float16' and not device.startswith('cuda'):
        raise ConfigError(f"dtype='float16' needs CUDA, the device is {device}: use bfloat16 or float32")
    if wanted == 'bfloat16' and device == 'cpu' and not cpu_has_bf16():
        warn(
            'warning: dtype=bfloat16, but this processor has no instructions for it: it takes about 3 times '
            'as long as float32'
        )
    return wanted


def cpu_has_bf16() -> bool:
    return getattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)()


def total_memory(device: str) -> int | None:
    """Bytes of memory that the device has; None where that is not known."""
    if device.startswith('cuda'):
        return torch.cuda.get_device_properties(device).total_memory
    if device == 'cpu' and hasattr(os, 'sysconf'):
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return None


def set_up(k, local_rank: int) -> tuple[str, str]:
    """Make this process ready to train as the knobs say -> the device and the type of its products."""
    device = pick_device(k.device, local_rank)
    dtype = pick_dtype(k.dtype, device)
    if k.threads:
        torch.set_num_threads(k.threads)
    if device == 'cpu':
        keep_memory()
    torch.set_float32_matmul_precision('high')
    torch.use_deterministic_algorithms(k.deterministic)  # an operation that cannot be is an error
    if k.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # which cuBLAS asks for then
    if device.startswith('cuda'):
        torch.cuda.set_device(device)
    return device, dtype


def autocast_for(device: str, dtype: str):
    """A new context in which matrix products run in dtype; weights stay as they are."""
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(device.split(':')[0], dtype=getattr(torch, dtype))


def keep_memory(keep: bool = True):
    """Whether the process keeps the memory of freed tensors for the next ones. Linux with glibc only.

    By default malloc hands large blocks back to the system, which clears every page anew at the next step:
    a training step on CPU takes 1.2 (6 layers, 128 wide, 4096 tokens) to 1.9 times (512 wide, 50304) as long.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
        mallopt(M_MMAP_MAX, 0 if keep else 65536)
        mallopt(M_TRIM_THRESHOLD, -1 if keep else 2**26)  # what malloc's own tuning arrives at …
        mallopt(M_MMAP_THRESHOLD, 2**25)  # … once a large block was freed
