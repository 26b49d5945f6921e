"""What the import of diffusers, peft and transformers costs every process and no run needs: a third of it.

They import packages because they are installed. For as long as one of the modules below executes, such a package is a
placeholder. What is taken from it is looked up in the real package when it is called, asked for an attribute, or stands
in isinstance: a base that was saved quantized finds its quantizer, and nothing that is installed counts as missing.
A module that does more than name it while it is imported (it calls it, or derives a class) gets the package at once.
Everyone else imports as ever.
"""

import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# Module, with all below it -> packages that it gets late.
_LATE = {
    "accelerate.commands.config.sagemaker": ("boto3",),  # for a cloud's own launcher
    "diffusers.hooks": ("peft",),
    "diffusers.loaders": ("peft", "transformers"),
    "diffusers.models": ("transformers",),
    "diffusers.quantizers": ("bitsandbytes", "torchao"),  # for bases that were saved quantized
    "diffusers.schedulers": ("scipy",),  # for sigmas of a beta distribution
    "peft.helpers": ("bitsandbytes",),  # for a context manager
    "transformers.loss": ("scipy",),  # for object detection
    "transformers.quantizers": ("torchao",),  # for text encoders that were saved quantized
}
_late_now: set[str] = set()

log = logging.getLogger("fluxfill")

_LISTS_FOLDERS = "transformers.utils.import_utils"


def lighten_imports() -> None:
    """In force from now on. Call it before diffusers, peft, transformers or accelerate are imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _LateName:
    """A name of a module that is imported when the name is used."""

    def __init__(self, module: str, name: str) -> None:
        # Read by who registers a class for unpickling, as torch.serialization does.
        self.__module__, self.__qualname__, self.__name__ = module, name, name

    def _real(self) -> Any:
        _end_lateness({_package(self.__module__)})  # if it is used while it is late
        module = importlib.import_module(self.__module__)
        try:
            return getattr(module, self.__name__)
        except AttributeError:  # `from package import module`
            return importlib.import_module(f"{self.__module__}.{self.__name__}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real(), name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._real()(*arguments, **named)

    def __mro_entries__(self, bases: tuple) -> tuple[type]:
        return (self._real(),)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._real())

    def __subclasscheck__(self, other: type) -> bool:
        return issubclass(other, self._real())


class _Placeholder(ModuleType):
    """Stands in sys.modules for a module of a late package; every name can be taken from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _LateName(self.__name__, name)


class _PlaceholderLoader:
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Placeholder(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Finder:
    """First on sys.meta_path: finds placeholders for the packages that are late at this moment."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if _package(name) in _late_now:
            return ModuleSpec(name, _PlaceholderLoader(), is_package=True)  # type: ignore[arg-type]
        packages = _packages_late_in(name)
        if not packages and name != _LISTS_FOLDERS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            # The loader itself stays: inspect and tracebacks ask it for the source.
            execute = partial(_execute, spec.loader.exec_module, packages)
            setattr(spec.loader, "exec_module", execute)  # noqa: B010
        return spec


def _execute(execute: Callable[[ModuleType], None], packages: set[str], module: ModuleType) -> None:
    _execute_with_late(execute, {package for package in packages if package not in sys.modules} - _late_now, module)
    if module.__name__ == _LISTS_FOLDERS:
        _remember_folders(module)


def _execute_with_late(execute: Callable[[ModuleType], None], late: set[str], module: ModuleType) -> None:
    _late_now.update(late)
    try:
        execute(module)
        return
    except Exception as error:
        if not late:
            raise
        # Perhaps it did what no placeholder can, whose sign may be any error: it has the packages themselves for a
        # second try, which raises what is wrong with the module itself.
        log.debug("%s is executed again, with %s: %r", module.__name__, ", ".join(sorted(late)), error)
    finally:
        _end_lateness(late)
    execute(module)


def _end_lateness(packages: set[str]) -> None:
    """From here on the packages are found themselves."""
    _late_now.difference_update(packages)
    for name, module in list(sys.modules.items()):
        if isinstance(module, _Placeholder) and _package(name) in packages:
            del sys.modules[name]


def _remember_folders(module: Any) -> None:
    """It reads the 1,100 folders of transformers' models twice, since its cache has room for 128."""
    if hasattr(module, "create_import_structure_from_path"):
        module.create_import_structure_from_path = cache(module.create_import_structure_from_path)


def _packages_late_in(name: str) -> set[str]:
    return {late for module, packages in _LATE.items() for late in packages if f"{name}.".startswith(f"{module}.")}


def _package(module: str) -> str:
    return module.partition(".")[0]
