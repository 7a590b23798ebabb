"""Code blocks of a Markdown document, and the shell commands in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks_of(document: str, language: str) -> list[str]:
    """The texts of all blocks in a language, from top to bottom; `document` is a path from the root of the project."""
    text = (ROOT / document).read_text()
    return [found[2] for found in _BLOCK.finditer(text) if found[1] == language]


def commands_of(block: str) -> list[str]:
    """The shell commands of a block in order; a line that ends with a backslash goes on, comments are left out."""
    lines = (line.partition(" #")[0].strip() for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]
