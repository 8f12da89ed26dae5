"""Sphinx configuration: Markdown by MyST, the theme furo."""

from __future__ import annotations

import tomllib
from pathlib import Path

project = "fewstep"
author = "The fewstep maintainers"
_pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
release = _pyproject["project"]["version"]

extensions = ["myst_parser"]
myst_heading_anchors = 4
source_suffix = {".md": "markdown"}
nitpicky = True

html_theme = "furo"
html_title = f"fewstep {release}"
html_copy_source = False
html_show_copyright = False
