"""Files that options name."""

import sys
from pathlib import Path


def read(name: str) -> bytes:
    """All bytes of the file `name`, of standard input where it is `-`."""
    return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
