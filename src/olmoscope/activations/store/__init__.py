"""The activation store. `open_store` opens a finished store for reading."""

from olmoscope.activations.store.reader import Store, open_store

__all__ = ["Store", "open_store"]
