"""`import …` of another library finding onchip: a finder on Python's import path, and nothing written to disk."""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NamedTuple


class Emulated(NamedTuple):
    """A top-level package that onchip stands in for, as its clients know it.

    `modules` are the names of its modules and of onchip's in their place, None for a package of nothing but modules;
    `distribution` and `version` those that its metadata show.
    """

    package: str
    distribution: str
    version: str
    modules: Mapping[str, str | None]


def install(packages: Sequence[Emulated], *, replace: bool = False) -> None:
    """Make imports of these find onchip's modules, in this process.

    Raises:
        RuntimeError: a real one is installed or imported, and `replace` does not say to go before it.
    """
    finder = _Finder(packages)
    for name in finder.packages:
        if not replace and (name in sys.modules or importlib.util.find_spec(name) is not None):
            raise RuntimeError(f"{name} is already installed: install(replace=True) goes before it, in this process")
    finder.displaced = _taken(finder.packages)
    sys.meta_path.insert(0, finder)
    importlib.invalidate_caches()


def uninstall(packages: Sequence[str]) -> None:
    """Undo `install` of any of these; what was imported from onchip stays where it was imported to."""
    for finder in [finder for finder in sys.meta_path if isinstance(finder, _Finder)]:
        if finder.packages.keys() & set(packages):
            sys.meta_path.remove(finder)
            _taken(finder.packages)
            sys.modules.update(finder.displaced)


def _taken(packages: Iterable[str]) -> dict[str, ModuleType]:
    """The modules of these packages, which are no longer imported."""
    names = [name for name in sys.modules if name.partition(".")[0] in packages]
    return {name: sys.modules.pop(name) for name in names}


class _Finder(importlib.metadata.DistributionFinder):
    """Finds onchip's modules under other names, and the distributions that these come from."""

    def __init__(self, packages: Sequence[Emulated]) -> None:
        self.packages = {emulated.package: emulated for emulated in packages}
        self.displaced: dict[str, ModuleType] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        emulated = self.packages.get(fullname.partition(".")[0])
        if emulated is None or fullname not in emulated.modules:
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in emulated.modules)
        loader = _Loader(emulated.modules[fullname], emulated.version)
        return ModuleSpec(fullname, loader, origin="onchip", is_package=is_package)

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterator[importlib.metadata.Distribution]:
        wanted = None if context is None or context.name is None else context.name.replace("_", "-").lower()
        for _, emulated in sorted(self.packages.items()):
            if wanted in (None, emulated.distribution):
                yield _Distribution(emulated)


class _Loader(Loader):
    """Fills a module with what onchip's module offers."""

    def __init__(self, source: str | None, version: str) -> None:
        self.source, self.version = source, version

    def exec_module(self, module: ModuleType) -> None:
        if self.source is None:
            return
        source = importlib.import_module(self.source)
        names = [name for name in source.__all__ if name not in ("install", "uninstall")]
        module.__dict__.update({name: getattr(source, name) for name in names})
        module.__doc__, module.__version__ = source.__doc__, self.version  # type: ignore[attr-defined]


class _Distribution(importlib.metadata.Distribution):
    """The metadata of a package's distribution, as far as libraries ask for it."""

    def __init__(self, emulated: Emulated) -> None:
        self.emulated = emulated

    def read_text(self, filename: str) -> str | None:
        package, name, version, _ = self.emulated
        files = {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: computed by onchip\n",
            "top_level.txt": f"{package}\n",
        }
        return files.get(filename)

    def locate_file(self, path: object) -> None:  # type: ignore[override]
        raise FileNotFoundError(f"{path}: {self.emulated.package} is onchip's and has no files of its own")
