"""Take secrets out of what is written down: configuration, results, logs, error messages.

| found | becomes |
|---|---|
| a value under a name like `api_token`, `password`, `aws_secret_access_key` | `***` |
| `scheme://user:password@host` | `scheme://***@host` |
| signatures and tokens in the query of a URI | `***` |
| `NAME=value` and `"name": "value"` in text, by the same names | `NAME=***` |
| `Bearer ...`, keys of known shapes, and what environment variables of such names hold | `***` |

A configuration may hold no secret at all, see `refuse_secrets`: it is compared, copied and shown everywhere.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
_WORDS = {"secret", "secrets", "token", "password", "passwd", "passphrase", "credential", "credentials", "apikey"}
_PAIRS = {("api", "key"), ("access", "key"), ("account", "key"), ("private", "key"), ("shared", "key")}
_IN_QUERIES = {"sig", "signature", "x-amz-signature", "x-amz-credential", "x-goog-signature", "x-goog-credential"}
_LEAST_LENGTH = 8  # of an environment variable's value: a shorter one would blot out ordinary words

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_USER_INFO = re.compile(r"(?P<scheme>\b[a-zA-Z][\w+.-]*://)[^\s/:@'\"]*:[^\s/'\"]*@")
_QUERY = re.compile(r"(?P<start>[?&;])(?P<name>[\w.-]+)=(?P<value>[^\s&;#'\"]+)")
_NAME = re.compile(r"(?<![\w.-])(?P<name>[A-Za-z][\w.-]*)['\"]?[ \t]*(?:=|:(?!//))[ \t]*")
_VALUE = re.compile(r"\"[^\"]*\"|'[^']*'|[^\s,;&'\"(){}\[\]]+")
_BEARER = re.compile(r"(?P<kind>\bBearer|(?i:\bauthorization['\"]?[ \t]*[:=][ \t]*['\"]?\w+))\s+[\w.~+/=-]{8,}")
_SHAPES = re.compile(
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_\w{20,}|\bhf_\w{20,}|\bxox[abprs]-[\w-]{10,}"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)


def names_secret(name: str) -> bool:
    """Whether what stands under a name is a secret: `apiToken` and `AWS_SECRET_ACCESS_KEY` are, `tokenizer` is not."""
    words = [word.lower() for word in _WORD.findall(name)]
    return bool(_WORDS & set(words)) or bool(_PAIRS & set(zip(words, words[1:], strict=False)))


def _is_secret(name: str, value: Any) -> bool:
    """A number is one only where its name ends in the word, so that `token_dim: 16` is none."""
    if value is None or isinstance(value, bool) or value in ("", HIDDEN) or not names_secret(name):
        return False
    return not isinstance(value, int | float) or names_secret(" ".join(_WORD.findall(name)[-1:]))


def redact(value: Any) -> Any:
    """A copy of nested mappings, lists and texts without secrets."""
    if isinstance(value, Mapping):
        return {key: HIDDEN if _is_secret(str(key), item) else redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """The text without secrets."""
    for secret in _environment_secrets():
        text = text.replace(secret, HIDDEN)
    return _redact_patterns(text)


def _redact_patterns(text: str) -> str:
    text = _SHAPES.sub(HIDDEN, text)
    text = _USER_INFO.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _BEARER.sub(rf"\g<kind> {HIDDEN}", text)
    text = _QUERY.sub(_hide_in_query, text)
    return _redact_pairs(text)


def _environment_secrets() -> list[str]:
    """What the environment keeps secret, the longest first: one may be part of another."""
    found = {value for name, value in os.environ.items() if len(value) >= _LEAST_LENGTH and names_secret(name)}
    return sorted((value for value in found if not _is_path(value)), key=len, reverse=True)


def _is_path(value: str) -> bool:
    """Whether a value tells where a secret lies (AWS_SHARED_CREDENTIALS_FILE), which errors had better say."""
    folder = os.path.dirname(value)
    return folder not in ("", "/") and os.path.isdir(folder)


def _hide_in_query(match: re.Match[str]) -> str:
    name = match["name"]
    hides = names_secret(name) or name.lower() in _IN_QUERIES
    return f"{match['start']}{name}={HIDDEN}" if hides else match[0]


def _redact_pairs(text: str) -> str:
    """Hide what follows names of secrets; a name may stand in another's value, as in `error: token=x`."""
    parts, at = list[str](), 0
    for name in _NAME.finditer(text):
        value = _VALUE.match(text, name.end()) if name.start() >= at and names_secret(name["name"]) else None
        if value is None or value[0] in ("Bearer", "Basic"):
            continue
        quote = value[0][0] if value[0][0] in "'\"" else ""
        parts += [text[at : value.start()], f"{quote}{HIDDEN}{quote}"]
        at = value.end()
    return "".join([*parts, text[at:]])


def _find_secrets(value: Any, place: str, name: str) -> Iterator[str]:
    """Dotted keys below `place` that hold a secret; `name` is the last one."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _find_secrets(item, f"{place}.{key}" if place else str(key), str(key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _find_secrets(item, f"{place}.{number}", name)
    elif _is_secret(name, value) or (isinstance(value, str) and _redact_patterns(value) != value):
        yield place


def refuse_secrets(config: Mapping[str, Any]) -> None:
    """Raise ValueError where a configuration, nested or with dotted keys, holds a secret, naming keys and no value."""
    if found := list(_find_secrets(config, "", "")):
        raise ValueError(
            f"the configuration holds what looks like a secret under {', '.join(found)}; everybody who can read the "
            "run folder could read it: put it into the environment, which your code and the storage libraries read"
        )
