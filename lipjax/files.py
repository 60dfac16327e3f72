"""Files: written in one move, so that a killed process leaves the old one or the new one."""

from __future__ import annotations

import pathlib


def replace_text(path: pathlib.Path, text: str) -> None:
    """Write a file in one move."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
