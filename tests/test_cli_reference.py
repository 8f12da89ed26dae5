"""The reference of the command line is what its tool writes, and scripts that documents run are there."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_reference_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("cli_reference", ROOT / "tools/cli_reference.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    written = tool.PAGE.read_text(encoding="utf-8")
    assert written == tool.page(), "run: python tools/cli_reference.py"
    assert "## fewstep generate" in written and "### fewstep distill flash" in written


def test_scripts_that_documents_run_are_there() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    found = {script for block in blocks for script in re.findall(r"^gpu/[\w.]+", block, re.MULTILINE)}
    assert found
    assert not [script for script in found if not os.access(ROOT / script, os.X_OK)]
