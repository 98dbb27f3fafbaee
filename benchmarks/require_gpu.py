"""Say in a sentence what this machine lacks for `make test-gpu` and `make bench-gpu`: exit code 2, or 0 if nothing.

Runs before onchip is built.
"""

import sys
from importlib.util import find_spec

NEEDED = (
    "torch", "triton", "numpy", "safetensors", "typer", "rich", "matplotlib", "pytest", "xdist", "hypothesis",
    "nanobind", "scikit_build_core",
)  # fmt: skip


def lacking() -> str | None:
    """What is missing, or None."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)}, which {sys.executable} does not have: make PYTHON=... names another"
    import torch

    if not torch.cuda.is_available():
        return f"a GPU, and torch {torch.__version__} finds none here"
    return None


if __name__ == "__main__":
    found = lacking()
    if found is not None:
        print(f"This needs {found}", file=sys.stderr)
        sys.exit(2)
