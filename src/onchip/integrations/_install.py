"""`import flash_attn` finding onchip: a finder on Python's import path, and nothing written to disk."""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType

EMULATED = "2.8.3"
"""The version of flash-attn whose functions these are."""

_HERE = "onchip.integrations.flash_attn"
_FLASH_ATTN_2 = {
    "flash_attn": _HERE,
    "flash_attn.flash_attn_interface": f"{_HERE}.flash_attn_interface",
    "flash_attn.bert_padding": f"{_HERE}.bert_padding",
}
_FLASH_ATTN_3 = {"flash_attn_interface": f"{_HERE}.hopper"}


def install(*, hopper: bool = False, replace: bool = False) -> None:
    """Make `import flash_attn` find onchip's functions, in this process, until `uninstall`.

    Of flash-attn there are then `flash_attn`, `flash_attn.flash_attn_interface` and `flash_attn.bert_padding`, and
    the metadata of a distribution flash-attn 2.8.3, by which libraries recognise it. Call it before the import of
    what looks for flash-attn, as most libraries look once. A second call changes what the first one installed.

    Args:
        hopper: install FlashAttention-3's module too, `flash_attn_interface`.
        replace: go before a flash-attn that is really installed, instead of refusing.

    Raises:
        RuntimeError: a real one is installed or imported.

    >>> from onchip.integrations import flash_attn
    >>> flash_attn.install()
    >>> from flash_attn.bert_padding import pad_input
    >>> pad_input.__module__
    'onchip.integrations.flash_attn.bert_padding'
    >>> flash_attn.uninstall()
    """
    uninstall()
    finder = _Finder(_FLASH_ATTN_2 | (_FLASH_ATTN_3 if hopper else {}))
    for name in finder.packages:
        if not replace and (name in sys.modules or importlib.util.find_spec(name) is not None):
            raise RuntimeError(f"{name} is already installed: install(replace=True) goes before it, in this process")
    finder.displaced = _taken(finder.packages)
    sys.meta_path.insert(0, finder)
    importlib.invalidate_caches()


def uninstall() -> None:
    """Undo `install`; what was imported from onchip stays where it was imported to.

    >>> from onchip.integrations import flash_attn
    >>> flash_attn.uninstall()
    """
    for finder in [finder for finder in sys.meta_path if isinstance(finder, _Finder)]:
        sys.meta_path.remove(finder)
        _taken(finder.packages)
        sys.modules.update(finder.displaced)


def _taken(packages: Iterable[str]) -> dict[str, ModuleType]:
    """The modules of these packages, which are no longer imported."""
    names = [name for name in sys.modules if name.partition(".")[0] in packages]
    return {name: sys.modules.pop(name) for name in names}


class _Finder(importlib.metadata.DistributionFinder):
    """Finds onchip's modules under other names, and the distributions that these come from."""

    def __init__(self, sources: dict[str, str]) -> None:
        self.sources = sources
        self.packages = {name.partition(".")[0] for name in sources}
        self.displaced: dict[str, ModuleType] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.sources:
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in self.sources)
        return ModuleSpec(fullname, _Loader(self.sources[fullname]), origin="onchip", is_package=is_package)

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterator[importlib.metadata.Distribution]:
        wanted = None if context is None or context.name is None else context.name.replace("_", "-").lower()
        for package in sorted(self.packages):
            distribution = _Distribution(package)
            if wanted in (None, distribution.metadata["Name"]):
                yield distribution


class _Loader(Loader):
    """Fills a module with what onchip's module offers."""

    def __init__(self, source: str) -> None:
        self.source = source

    def exec_module(self, module: ModuleType) -> None:
        source = importlib.import_module(self.source)
        names = [name for name in source.__all__ if name not in ("install", "uninstall")]
        module.__dict__.update({name: getattr(source, name) for name in names})
        module.__doc__, module.__version__ = source.__doc__, EMULATED  # type: ignore[attr-defined]


class _Distribution(importlib.metadata.Distribution):
    """The metadata of one of flash-attn's distributions, as far as libraries ask for it."""

    def __init__(self, package: str) -> None:
        self.package = package

    def read_text(self, filename: str) -> str | None:
        name, version = ("flash-attn", EMULATED) if self.package == "flash_attn" else ("flash-attn-3", "3.0.0")
        files = {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: computed by onchip\n",
            "top_level.txt": f"{self.package}\n",
        }
        return files.get(filename)

    def locate_file(self, path: object) -> None:  # type: ignore[override]
        raise FileNotFoundError(f"{path}: {self.package} is onchip's and has no files of its own")
