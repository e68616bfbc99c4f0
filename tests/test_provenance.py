"""The record of where a result came from, also if the package runs from a checkout."""

from importlib import metadata

from olmoscope import __version__, provenance


def test_versions_of_what_is_there_and_null_for_the_rest(monkeypatch):
    def version(name):
        if name in ("olmoscope", "numba"):
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(provenance.metadata, "version", version)
    found = provenance.provenance()
    assert found["olmoscope"] == __version__
    assert found["libraries"]["numba"] is None and found["libraries"]["torch"] == "1.0"
