"""What a kernel takes of a GPU that is not there: registers, spills, shared memory, read from its machine code.

Triton's compiler needs no GPU, only to be told which. A kernel that holds too much for its registers keeps the rest in
slow memory ("spills"); one that asks for too much shared memory does not start at all. Neither shows in the
interpreter, and both show here.

Figures are read from what the GPU would run, and not from the compiler's messages, which depend on its options: an
instruction counts once, however often it runs.
"""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

from onchip.ops._triton import Launch


class Limits(NamedTuple):
    """What a block of an architecture may have: bytes of shared memory, columns of tensor memory."""

    shared: int
    tensor_memory: int = 0


LIMITS = {
    "sm_80": Limits(shared=163 << 10),
    "sm_90": Limits(shared=227 << 10),
    "sm_100": Limits(shared=227 << 10, tensor_memory=512),
    "gfx942": Limits(shared=64 << 10),
}


class Resources(NamedTuple):
    """What a compiled kernel takes.

    `registers` are a thread's vector registers of 32 bits, on AMD those of the matrix units among them; `spills` the
    bytes that its instructions move to and from registers kept in memory; `shared` a block's bytes; `tensor_memory` a
    block's columns of it; `tensor_core` the matrix instructions, without which a kernel of products runs on the slow
    units; `waits` how often it waits for sm_90's asynchronous ones: where the assembler takes fright it does so after
    each, and nothing overlaps.
    """

    registers: int
    spills: int
    shared: int
    tensor_memory: int
    tensor_core: int
    waits: int
    warps: int


def compile_for(launch: Launch, architecture: str) -> Resources:
    """Compile a launch for an architecture and read off what its kernel takes; no GPU is needed or used.

    The arguments' tensors may be on the device "meta": only their dtypes and the alignment of their addresses count,
    which is there that of a fresh allocation plus the offset. Takes seconds, or half of one where Triton's cache has
    the kernel. Sets Triton's driver meanwhile, so one thread at a time.

    Raises:
        ValueError: `architecture` is not one of `LIMITS`.
        TypeError: the kernel is made for the interpreter: TRITON_INTERPRET was set when its module was imported.
    """
    if architecture not in LIMITS:
        raise ValueError(f"architecture must be one of {', '.join(LIMITS)}, got {architecture!r}")
    if not hasattr(launch.kernel, "device_caches"):
        kind = type(launch.kernel).__name__
        raise TypeError(f"launch.kernel must be a function of triton.jit with TRITON_INTERPRET unset, got a {kind}")
    with _driver_for(architecture):
        compiled = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
    read = _read_amd if architecture.startswith("gfx") else _read_nvidia
    return Resources(
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        warps=compiled.metadata.num_warps,
        **read(compiled.asm),
    )


def exceeded(resources: Resources, architecture: str) -> list[str]:
    """Which limits of the architecture a kernel exceeds, so that it cannot start; one phrase each.

    >>> kernel = Resources(registers=128, spills=0, shared=100_000, tensor_memory=0, tensor_core=16, waits=0, warps=4)
    >>> exceeded(kernel, "sm_80")
    []
    >>> exceeded(kernel, "gfx942")
    ['shared is 100000, and gfx942 has 65536']
    """
    limits = LIMITS[architecture]._asdict()
    taken = {name: getattr(resources, name) for name in limits}
    return [
        f"{name} is {taken[name]}, and {architecture} has {limits[name]}"
        for name in limits
        if taken[name] > limits[name]
    ]


class _AbsentGPU:
    """The part of a Triton driver that its compiler asks. The device's number is the key of the kernel's cache."""

    def __init__(self, architecture: str) -> None:
        self._architecture = architecture

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        if self._architecture.startswith("gfx"):
            return GPUTarget("hip", self._architecture, 64)
        return GPUTarget("cuda", int(self._architecture.removeprefix("sm_")), 32)

    def get_current_device(self) -> str:
        return self._architecture

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def _driver_for(architecture: str) -> Iterator[None]:
    from triton.runtime import driver

    before = driver._active  # `driver.active` raises where there is no GPU
    driver.set_active(_AbsentGPU(architecture))
    try:
        yield
    finally:
        driver.set_active(before)


_NVIDIA_SPILL = re.compile(r"\b(?:LDL|STL)((?:\.\w+)*)")
_NVIDIA_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_AMD_SPILL = re.compile(r"\bscratch_(?:load|store)_dword(?:x(\d))?")


def _read_nvidia(asm: Any) -> dict[str, int]:
    from triton import knobs

    with NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", cubin.name]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    listing = run.stdout + run.stderr
    (registers,) = re.findall(r"\bREG:(\d+)", listing)
    modifiers = [found.split(".") for found in _NVIDIA_SPILL.findall(listing)]
    return {
        "registers": int(registers),
        "spills": sum(next((_NVIDIA_WIDTHS[m] for m in each if m in _NVIDIA_WIDTHS), 4) for each in modifiers),
        "tensor_core": len(re.findall(r"\b[A-Z]+MMA\b", listing)),
        "waits": len(re.findall(r"\bWARPGROUP\.DEPBAR\b", listing)),
    }


def _read_amd(asm: Any) -> dict[str, int]:
    listing = asm["amdgcn"]
    (registers,) = re.findall(r"\.vgpr_count:\s+(\d+)", listing)
    return {
        "registers": int(registers),
        "spills": sum(4 * int(width or 1) for width in _AMD_SPILL.findall(listing)),
        "tensor_core": len(re.findall(r"\bv_s?mfmac?_", listing)),
        "waits": 0,
    }
