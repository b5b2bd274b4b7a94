"""The documentation site: ``sphinx-build docs FOLDER``. Pages are Markdown, the interface comes from docstrings."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

from crlseq._version import __version__

project = "crlseq"
author = "The crlseq authors"
project_copyright = f"2026, {author}"
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"crlseq {version}"
html_show_sourcelink = False

# Markdown as GitHub reads it: ```math, and links to headings.
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # the tests run the notebook

default_role = "py:obj"  # `fit` in a docstring
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 100
napoleon_google_docstring = False
napoleon_use_rtype = False


def inline_equations(app: Sphinx, page: str, source: list[str]) -> None:
    """GitHub's $`x`$ as MyST's $x$."""
    source[0] = re.sub(r"\$`([^`]+)`\$", r"$\1$", source[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", inline_equations)
