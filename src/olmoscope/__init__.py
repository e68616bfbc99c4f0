"""Olmoscope: collect activations, train TopK sparse autoencoders, measure, read and share them.

Nothing heavy is imported here, so that `olmoscope --help` stays quick; read the folders from text/ to release/,
which is the order in which data flows.
"""

from olmoscope.threads import set_threads

__version__ = "0.1.0"

set_threads()
