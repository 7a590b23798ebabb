"""Code blocks of a Markdown document, and the shell commands in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks_of(document: str, language: str) -> list[str]:
    """The texts of all blocks in a language, from top to bottom; `document` is a path from the root of the project."""
    text = (ROOT / document).read_text()
    return [found[2] for found in _BLOCK.finditer(text) if found[1] == language]


def commands_of(document: str) -> list[str]:
    """Every shell command of a document in order; lines that end with a backslash go on, comments are left out."""
    text = "\n".join(blocks_of(document, "bash")).replace("\\\n", " ")
    lines = (line.partition(" #")[0].strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]
