"""A strict validator for Kubernetes' structural schemas: what the API server would prune without a word is an error."""

import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Validate = Callable[[str, dict[str, Any]], list[str]]

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}
_CHECKED = {
    "type",
    "properties",
    "additionalProperties",
    "required",
    "items",
    "enum",
    "pattern",
    "minimum",
    "minLength",
}
_CHECKED |= {"maxLength", "minItems", "x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields"}
# `x-kubernetes-validations` are programs (CEL), which only an API server runs; `anyOf` goes with int-or-string
_UNCHECKED = {"anyOf", "default", "format", "nullable", "x-kubernetes-validations"}
_UNCHECKED |= {"x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-map-type"}


def violations(value: Any, schema: dict[str, Any], at: str = "") -> Iterator[str]:
    """What is wrong with a value, and where."""
    unknown = set(schema) - _CHECKED - _UNCHECKED
    assert not unknown, f"{at}: the validator does not know {unknown}"
    if schema.get("x-kubernetes-int-or-string"):
        if isinstance(value, bool) or not isinstance(value, int | str):
            yield f"{at}: {value!r} is neither a number nor a text"
    elif "type" in schema:
        is_bool = isinstance(value, bool)
        if not isinstance(value, _TYPES[schema["type"]]) or (is_bool and schema["type"] != "boolean"):
            yield f"{at}: {value!r} is no {schema['type']}"
            return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at}: {value!r} is none of {schema['enum']}"
    if isinstance(value, str):
        yield from _text_violations(value, schema, at)
    elif isinstance(value, int | float) and value < schema.get("minimum", value):
        yield f"{at}: {value} is less than {schema['minimum']}"
    elif isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            yield f"{at}: too short"
        for number, item in enumerate(value):
            yield from violations(item, schema["items"], f"{at}[{number}]")
    elif isinstance(value, dict):
        yield from _object_violations(value, schema, at)


def _text_violations(value: str, schema: dict[str, Any], at: str) -> Iterator[str]:
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{at}: {value!r} does not match {schema['pattern']}"
    if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        yield f"{at}: {value!r} has the wrong length"


def _object_violations(value: dict[str, Any], schema: dict[str, Any], at: str) -> Iterator[str]:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties")
    for key in schema.get("required", ()):
        if key not in value:
            yield f"{at}: {key} is missing"
    for key, item in value.items():
        if key in properties:
            yield from violations(item, properties[key], f"{at}.{key}")
        elif isinstance(others, dict):
            yield from violations(item, others, f"{at}.{key}")
        elif not others and not schema.get("x-kubernetes-preserve-unknown-fields") and at != ".metadata":
            yield f"{at}.{key}: unknown field"  # of the object's own metadata the schema says nothing


@pytest.fixture(scope="session")
def crds() -> dict[str, dict[str, Any]]:
    """KubeRay's schemas by kind."""
    folder = Path(__file__).parent
    kinds = {"RayJob": "rayjob", "RayCluster": "raycluster"}
    return {
        kind: json.loads(gzip.decompress((folder / f"kuberay-1.7.0-{name}-crd.json.gz").read_bytes()))
        for kind, name in kinds.items()
    }


@pytest.fixture(scope="session")
def pod_schema(crds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Kubernetes' own pod template, as the RayJob embeds it."""
    schema: dict[str, Any] = crds["RayJob"]["properties"]["spec"]["properties"]["submitterPodTemplate"]
    return schema


@pytest.fixture(scope="session")
def validate(crds: dict[str, dict[str, Any]]) -> Validate:
    """Check a document against the schema of a kind."""
    return lambda kind, value: list(violations(value, crds[kind]))


@pytest.fixture(scope="session")
def validate_pod(pod_schema: dict[str, Any]) -> Callable[[dict[str, Any]], list[str]]:
    """Check a pod template."""
    return lambda value: list(violations(value, pod_schema))
