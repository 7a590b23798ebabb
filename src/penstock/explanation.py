"""`penstock config`: every key of the configuration with its type, default and meaning, and where it is read."""

import difflib
import json
import re
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from penstock.config import RunConfig
from penstock.display import print_columns, print_table
from penstock.effects import EFFECTS
from penstock.meanings import MEANINGS

_BOUNDS = {"ge": ">= ", "gt": "> ", "le": "<= ", "lt": "< "}
_HEADINGS = ("key", "type", "default", "read with", "meaning")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A key of the configuration; `read_with` is what its effect depends on, "every run" where it always has one."""

    key: str
    type: str
    default: str
    read_with: str
    meaning: str

    def plain(self) -> tuple[str, ...]:
        """Cells without marks of Markdown."""
        return tuple(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cell).replace("`", "") for cell in self.cells())

    def cells(self) -> tuple[str, ...]:
        """In the order of a table."""
        return tuple(asdict(self).values())


def _type(annotation: Any) -> str:
    if annotation is None or annotation is type(None):
        return "none"
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(str(choice) for choice in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(part) for part in inner)
    if origin is tuple:
        return f"list of {_type(inner[0])}" if inner[-1] is Ellipsis else f"list of {len(inner)} {_type(inner[0])}"
    if origin is dict:
        return "mapping"
    if origin is not None:  # Annotated
        bounds = [bound for part in annotation.__metadata__ for bound in _bounds(getattr(part, "metadata", []))]
        return ", ".join([_type(inner[0]), *bounds])
    return {Path: "path", str: "text", bool: "true or false"}.get(annotation, str(annotation.__name__))


def _bounds(metadata: list[Any]) -> list[str]:
    shown = []
    for part in metadata:
        for name, sign in _BOUNDS.items():
            value = getattr(part, name, None)
            if value is not None and value < 1 << 31:
                shown.append(f"{sign}{value:g}")
    return shown


def _default(key: str, field: FieldInfo) -> str:
    told = MEANINGS[key].default
    if told is not None:
        return told
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value in ((), {}):
        return "none"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _read_with(key: str) -> str:
    rows = [row.where for row in EFFECTS if row.covers(key)]
    return "; ".join(dict.fromkeys(rows)) or "every run"


def _fields() -> Iterator[tuple[str, FieldInfo]]:
    for name, field in RunConfig.model_fields.items():
        own: dict[str, FieldInfo] | None = getattr(field.annotation, "model_fields", None)
        if own is None:
            yield name, field
        else:
            yield from ((f"{name}.{key}", part) for key, part in own.items())


def keys() -> list[Key]:
    """All of them, in the order of the models."""
    return [
        Key(
            key=key,
            type=", ".join([_type(field.annotation), *_bounds(field.metadata)]),
            default=_default(key, field),
            read_with=_read_with(key),
            meaning=MEANINGS[key].text,
        )
        for key, field in _fields()
    ]


def find_keys(asked: str | None) -> list[Key]:
    """Those of a section, or one; ValueError names the nearest where there is none."""
    every = keys()
    if asked is None:
        return every
    name = asked.rstrip(".")
    found = [key for key in every if key.key == name or key.key.startswith(f"{name}.")]
    if not found:
        known = [key.key for key in every]
        last = {key.rpartition(".")[2]: key for key in known}
        near = difflib.get_close_matches(name, [*known, *last], 1, 0.5)
        hint = f"did you mean {last.get(near[0], near[0])!r}?" if near else "penstock config lists all"
        raise ValueError(f"unknown key {asked!r}; {hint}")
    return found


def markdown() -> str:
    """The table of docs/command-line.md."""
    lines = [f"| {' | '.join(_HEADINGS)} |", "|---|---|---|---|---|"]
    for key in keys():
        name, *rest = (cell.replace("|", "\\|") for cell in key.cells())
        lines.append(f"| `{name}` | {' | '.join(rest)} |")
    return "\n".join(lines) + "\n"


def run_explain(asked: str | None, *, as_json: bool, as_markdown: bool) -> None:
    """`penstock config`."""
    found = find_keys(asked)
    if as_json:
        print(json.dumps([asdict(key) for key in found]))
    elif as_markdown:
        print(markdown(), end="")
    elif len(found) == 1:
        print_table(found[0].key, list(zip(_HEADINGS[1:], found[0].plain()[1:], strict=True)))
    else:
        print_columns("configuration", _HEADINGS, [key.plain() for key in found])
