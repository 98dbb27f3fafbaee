"""The native CPU kernels, or why there are none."""

from importlib import import_module
from typing import Any

missing: str | None = None
kernels: Any = None

try:
    kernels = import_module("onchip._native")
except ImportError as error:
    missing = f"the native CPU kernels are not installed ({error}); a C++20 compiler at install time builds them"
