import re
from pathlib import Path

import pytest

from penstock.storage import extras

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for folder in ("src/penstock", "kernels", "storage", "sampler", "engine", "cluster", "docs", "examples")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".md")
] + [ROOT / "README.md"]


def declared() -> dict[str, tuple[str, ...]]:
    """Packages by extra, as pyproject.toml has them, without markers."""
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    found = re.findall(r"^(\w+) = \[(.+)\](?: +#.*)?$", section, re.MULTILINE)
    return {name: tuple(text.partition(";")[0] for text in re.findall(r'"([^"]+)"', body)) for name, body in found}


def test_what_messages_name_is_what_the_extras_bring() -> None:
    assert len(declared()) == 9 and extras._PACKAGES == declared()


@pytest.mark.parametrize("extra", sorted(extras._PACKAGES))
def test_commands_name_packages_of_the_index_and_not_ours(extra: str) -> None:
    command = extras.install_command(extra)
    assert command.startswith("pip install '") and "penstock" not in command


def test_nothing_tells_people_to_install_penstock_from_the_index() -> None:
    assert len(SOURCES) > 200
    assert [path for path in SOURCES if re.search(r"pip install ['\"]?penstock", path.read_text())] == []
