"""Names of routers and balancers, as configs write them."""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes by name: those registered here, and those of other people's files and packages.

    Args:
        kind: what they are, in messages; installed packages offer theirs under the entry-point group
            ``moe_testbed.<kind>s``.
        base: class that every class from outside must derive from, and its ``Config`` from that of ``base``.
    """

    def __init__(self, kind: str, base: type[Any] = object) -> None:
        self.kind = kind
        self.base = base
        self._classes: dict[str, type[T]] = {}
        self._outside: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that makes a class known as ``name``. Raises ValueError if the name is taken."""

        def add(cls: type[T]) -> type[T]:
            if name in self._classes:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            self._classes[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """All registered names, sorted; without those of installed packages."""
        return sorted(self._classes)

    def get(self, name: str) -> type[T]:
        """The class that ``name`` means: a registered name, ``package.module:Class``, ``path/to/file.py:Class`` or the
        name of an entry point of an installed package.

        A file's path is relative to the working directory. The working directory is also looked through for a package,
        after all else, so that nothing in it hides an installed one.

        Raises:
            ValueError: no such name or class, a class of another kind, or its module cannot be imported.
        """
        if name in self._classes:
            return self._classes[name]
        module, colon, class_name = str(name).rpartition(":")
        if not colon:
            return self._installed(str(name))
        if not (module and class_name.isidentifier()):
            raise ValueError(f"'{name}' names no {self.kind}; write package.module:Class or path/to/file.py:Class")
        is_file = module.endswith(".py")
        key = f"{Path(module).resolve()}:{class_name}" if is_file else name
        if key not in self._outside:
            imported = self._imported(_import_file if is_file else _import_module, module, name)
            self._outside[key] = self._class_of(imported, class_name, name)
        return self._outside[key]

    def _installed(self, name: str) -> type[T]:
        """The class of an entry point."""
        found = self._entry_points()
        if name not in found:
            known = [*self._classes, *found]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            available = ", ".join([*self.names(), *sorted(found)])
            raise ValueError(
                f"Unknown {self.kind} '{name}'.{hint} Available: {available}; or write package.module:Class or "
                "path/to/file.py:Class"
            )
        entry_point = found[name]
        if entry_point.value not in self._outside:
            module = self._imported(importlib.import_module, entry_point.module, name)
            self._outside[entry_point.value] = self._class_of(module, entry_point.attr, name)
        return self._outside[entry_point.value]

    def _entry_points(self) -> dict[str, metadata.EntryPoint]:
        """What installed packages offer, by name. Raises ValueError if one name means two things."""
        group = f"moe_testbed.{self.kind}s"
        found: dict[str, metadata.EntryPoint] = {}
        for entry_point in metadata.entry_points(group=group):
            name = entry_point.name
            taken = "a built-in one" if name in self._classes else None
            if name in found and found[name].value != entry_point.value:
                taken = found[name].value
            if taken:
                raise ValueError(
                    f"the entry point '{name}' of group {group} ({entry_point.value}) has the name of another "
                    f"{self.kind} ({taken}); rename it in its package, or uninstall that"
                )
            found[name] = entry_point
        return found

    def _class_of(self, module: ModuleType, class_name: str, name: str) -> type[T]:
        """The class in an imported module, checked."""
        cls = getattr(module, class_name, None)
        if cls is None:
            classes = [
                key for key, value in vars(module).items() if self._fits(value) and value.__module__ == module.__name__
            ]
            near = difflib.get_close_matches(class_name, classes, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            there = f"the {self.kind}s there: {', '.join(classes)}" if classes else f"there is no {self.kind} in it"
            raise ValueError(f"'{name}': {module.__file__} has no '{class_name}'.{hint} ({there})")
        if not self._fits(cls):
            raise ValueError(
                f"'{name}' is no {self.kind}: it must be a subclass of {self.base.__module__}.{self.base.__qualname__}"
            )
        wanted = getattr(self.base, "Config", object)
        if not (isinstance(cls.Config, type) and issubclass(cls.Config, wanted)):
            raise ValueError(
                f"'{name}' has a Config that is no subclass of {wanted.__module__}.{wanted.__qualname__}; derive it "
                "from that, or leave it out"
            )
        return cls

    def _fits(self, value: Any) -> bool:
        return isinstance(value, type) and issubclass(value, self.base) and value is not self.base

    def _imported(self, load: Callable[[str], ModuleType], module: str, name: str) -> ModuleType:
        """The module; whatever goes wrong becomes one line."""
        try:
            return load(module)
        except (Exception, SystemExit) as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing is not None and f"{module}.".startswith(f"{missing}."):
                raise ValueError(
                    f"the {self.kind} '{name}': there is no module '{missing}', neither installed nor in {Path.cwd()}; "
                    "correct the name, install its package, or start in the folder that holds it"
                ) from None
            if isinstance(error, FileNotFoundError) and error.filename == module:
                raise ValueError(
                    f"the {self.kind} '{name}': there is no file {Path(module).resolve()}; correct the path, which is "
                    "relative to the working directory"
                ) from None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"importing the {self.kind} '{name}' raises {reason}; mend its module") from error


@contextlib.contextmanager
def _working_directory_last() -> Iterator[None]:
    """The working directory at the end of sys.path."""
    folder = str(Path.cwd())
    sys.path.append(folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        # Only the last one: the folder may have been there before.
        del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]


def _import_module(name: str) -> ModuleType:
    with _working_directory_last():
        return importlib.import_module(name)


def _import_file(file: str) -> ModuleType:
    path = Path(file).resolve()
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no file", file)
    # The same module for all classes of a file, under a name that no other file has.
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "files that end in .py have a loader"
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pydantic look the module up while it runs.
    sys.modules[name] = module
    try:
        with _working_directory_last():
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
