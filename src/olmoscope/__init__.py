"""Olmoscope: collect activations of a language model, train sparse coders on them, measure, read and share them.

    load(address)             a coder from anywhere: a run, a SAELens folder, the hub
    open_store(path)          an activation store, to read its rows
    attach(model, coder)      a coder in a running model: read, replace, attribute
    collect, train, evaluate, index      what the commands of these names do
    Site, SparseCoder, SparseCodes       the types

docs/api.md shows each in use. Nothing heavy is imported here, so that `olmoscope --help` and `import olmoscope` stay
quick: each name is imported when it is first used. To read the source, take the folders from text/ to release/, which
is the order in which data flows.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from olmoscope.threads import set_threads

if TYPE_CHECKING:
    from olmoscope.activations.store.reader import open_store
    from olmoscope.api import collect, evaluate, index, train
    from olmoscope.sae.attach import attach
    from olmoscope.sae.coder import SparseCoder
    from olmoscope.sae.codes import SparseCodes
    from olmoscope.sae.io.open import load
    from olmoscope.site import Site

__version__ = "0.2.0"
__all__ = ["Site", "SparseCoder", "SparseCodes", "attach", "collect", "evaluate", "index", "load", "open_store",
           "train"]

_MODULES = {"Site": "site", "SparseCoder": "sae.coder", "SparseCodes": "sae.codes", "attach": "sae.attach",
            "collect": "api", "evaluate": "api", "index": "api", "load": "sae.io.open",
            "open_store": "activations.store.reader", "train": "api"}
"""Where each public name is."""

set_threads()  # before torch is loaded


if not TYPE_CHECKING:  # a type checker must report names that do not exist

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used (PEP 562)."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


class _Package(ModuleType):
    """Keeps `train` and `evaluate` as functions, although two folders have the same names.

    Importing a folder would set its name in the package; here the names stay those of the functions, whatever is
    imported before or after. `from olmoscope.train.run import ...` finds the folder all the same.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
