"""Where a run computes, and in which precision."""

from __future__ import annotations

import ctypes
import os
import sys

import torch


def choose_device(name: str | None = None) -> torch.device:
    """The device called `name`; without a name a GPU where there is one, of several this process's own.

    Raises `ValueError` where there is no such device.
    """
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(own if name == "cuda" else name)
    except RuntimeError:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, and got {name!r}") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device: expected one that is here, and got {name!r}")
    return device


def native_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware.

    Elsewhere they are emulated: on an AVX2 processor the product takes 40 to 60 times as long as in float32.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def compute_deterministically(device: torch.device) -> None:
    """Have PyTorch take the implementations that give the same bits on every run, for the rest of the process.

    Costs nothing on a CPU. Where a GPU has no such implementation of an operation, PyTorch warns.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    # By default the switch also fills every fresh tensor with NaN.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_freed_memory() -> None:
    """Have the C library keep the memory that a step frees, for the next step, instead of giving it back to the system.

    A step frees and asks again for some hundred megabytes of activations, and a fresh page costs microseconds. Costs
    no memory beyond the step's peak. Does nothing where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
