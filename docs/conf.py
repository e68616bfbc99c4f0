"""How Sphinx builds the documentation: `make docs`. Nothing here needs a network."""

import sys
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "extensions"), str(HERE.parent / "src")]

import olmoscope  # noqa: E402

project = "Olmoscope"
author = "The Olmoscope authors"
copyright = "2026, the Olmoscope authors"
release = version = olmoscope.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_nb",
    "sphinx_design",
    "generated_pages",  # docs/extensions
    "repository_links",
]
nb_output_stderr = "remove"
exclude_patterns = ["extensions", "_build"]
nitpicky = True

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4  # as GitHub names headings, so that links work in both places
nb_execution_mode = "off"  # tests/test_tutorials.py executes the notebook; the site shows what it printed

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
nitpick_ignore = [  # of ours, and not public
    ("py:class", "olmoscope.features.format.Info"),
    ("py:class", "olmoscope.kernels.interface.Kernels"),
    ("py:class", "olmoscope.recipe.schema.Recipe"),
    ("py:class", "olmoscope.sae.normalize.RowStatistics"),
    ("py:class", "olmoscope.activations.store.format.Manifest"),
    ("py:class", "Manifest"),
    ("py:class", "Info"),
]
nitpick_ignore_regex = [  # of other libraries, whose documentation is not here
    ("py:.*", r"(torch|numpy|transformers|pathlib|collections|pydantic|nn|np)\..*"),
    ("py:.*", r"Path|Tensor|Sequence|Iterator|Mapping|Any|Literal|ndarray|dtype|device|optional|slice|ValueError|Self"),
]

default_role = "code"  # docstrings have `code` in single marks

html_theme = "pydata_sphinx_theme"
html_title = f"Olmoscope {release}"
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "header_links_before_dropdown": 6,
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars: dict[str, list[str]] = {"index": []}
html_show_sourcelink = False
html_copy_source = False


def returns_are_sentences(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Napoleon takes what is before a colon, in the first line of what is returned, for a type; ours are sentences.
    So the first word gets a line of its own."""
    for number, line in enumerate(lines):
        if line.strip() in ("Returns:", "Yields:"):
            first = lines[number + 1]
            indent = first[:len(first) - len(first.lstrip())]
            word, _, rest = first.strip().partition(" ")
            lines[number + 1:number + 2] = [indent + word, indent + rest]
            return


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", returns_are_sentences, priority=400)  # before napoleon
