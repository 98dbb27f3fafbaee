"""The native CPU kernels, or why there are none."""

from types import ModuleType

missing: str | None = None
kernels: ModuleType

try:
    from onchip import _native as kernels
except ImportError as error:
    missing = f"the native CPU kernels are not installed ({error}); a C++20 compiler at install time builds them"
