"""Keys and values from the command line, and errors of pydantic said in the user's words."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from penstock.storage.redaction import redact_text


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat


def parse_override(text: str) -> tuple[str, Any]:
    """Read `key.path=value`, the value as YAML; ValueError without an equals sign."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set {text!r} is no assignment; write for example --set train.lr=0.01")
    return key.strip(), yaml.safe_load(value)


def assign(value: dict[str, Any], dotted: str, item: Any) -> None:
    """Set a dotted key in nested dictionaries; ValueError where a section is a value."""
    *parents, last = dotted.split(".")
    for parent in parents:
        child = value.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ValueError(f"{dotted}: {parent!r} is a value, not a section")
        value = child
    value[last] = item


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _known_keys(model: type[BaseModel], path: Iterable[Any], *, sections: bool) -> list[str]:
    """Keys at `path`; only sections where one was meant, so that `modle.kind` suggests `model` and not `mode`."""
    for part in path:
        annotation: Any = model.model_fields[str(part)].annotation
        if not _is_section(annotation):
            break
        model = annotation
    named = {name: _is_section(field.annotation) for name, field in model.model_fields.items()}
    return [name for name, is_section in named.items() if is_section or not sections] or list(named)


def _homes(model: type[BaseModel], name: str, prefix: str = "") -> list[str]:
    """Dotted keys that end in a name: who writes `epochs` means `train.epochs`."""
    found = []
    for key, field in model.model_fields.items():
        annotation: Any = field.annotation
        if _is_section(annotation):
            found += _homes(annotation, name, f"{prefix}{key}.")
        elif key == name:
            found.append(f"{prefix}{key}")
    return found


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Say in one line per problem which key is wrong, its value, and what to write instead."""
    lines = []
    for problem in error.errors():
        *path, key = problem["loc"] or ("",)
        dotted = ".".join(str(part) for part in (*path, key))
        if problem["type"] == "extra_forbidden":
            known = _known_keys(model, path, sections=isinstance(problem["input"], dict))
            near = [".".join(map(str, (*path, name))) for name in difflib.get_close_matches(str(key), known, 1, 0.5)]
            near = _homes(model, str(key)) or near
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known keys: {', '.join(known)}"
            lines.append(f"unknown key {dotted!r}; {hint}")
        elif problem["type"] == "missing":
            lines.append(f"{dotted} is missing; give it as a flag, in the YAML file or with --set {dotted}=...")
        elif isinstance(problem["input"], dict):  # keys that do not go together: the message has those that matter
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{dotted}: {message}" if dotted else message)
        else:
            lines.append(f"{dotted}={problem['input']!r}: {problem['msg']}")
    return redact_text("; ".join(lines))
