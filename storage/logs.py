"""How every process of a run logs: text for people, or one JSON object per line for a log collector.

| field of a line | is |
|---|---|
| `time` | ISO 8601, UTC, microseconds |
| `level`, `logger`, `message`, `exception` | of the record; `exception` only where there is one |
| `host`, `pid` | of the process |
| `rank`, `stage`, `replica` | where the process has one |
| `progress` | of progress lines: what `Progress` was told |

PENSTOCK_LOG is the level, PENSTOCK_LOG_FORMAT `text` or `json`; child processes and actors inherit both. Nothing that
looks like a secret gets through, see redaction.
"""

import json
import logging
import os
import platform
import sys
import traceback
from datetime import datetime, timezone
from typing import Any, Literal, TextIO, get_args

from penstock.storage.redaction import redact, redact_text

LogFormat = Literal["text", "json"]
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class TextFormatter(logging.Formatter):
    """`WARNING rank 3 penstock.engine.feed: message`."""

    def __init__(self, place: dict[str, Any]) -> None:
        rank = "" if place.get("rank") is None else f" rank {place['rank']}"
        super().__init__(f"%(levelname)s{rank} %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The line, and the traceback where there is one."""
        return redact_text(super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object per record; `place` is what all records of this process have in common."""

    def __init__(self, place: dict[str, Any]) -> None:
        super().__init__()
        self._place = {key: value for key, value in place.items() if value is not None}

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        value: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="microseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._place,
            "pid": record.process,
        }
        if shown := getattr(record, "progress", None):
            value["progress"] = shown
        if record.exc_info:
            value["exception"] = self.formatException(record.exc_info)
        return json.dumps(redact(value), default=str)


class _OwnHandler(logging.StreamHandler[TextIO]):
    """The handler that `configure` puts in place, so that a second call replaces it.

    Without a stream it writes to what is stderr at the time: a live view has its own, which keeps lines apart from it.
    """

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__(stream or sys.stderr)
        self._follows = stream is None

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        if self._follows:
            self.stream = sys.stderr
        super().emit(record)


def log_format() -> LogFormat:
    """What PENSTOCK_LOG_FORMAT says; ValueError where it is neither."""
    found = os.environ.get("PENSTOCK_LOG_FORMAT") or "text"
    if found not in get_args(LogFormat):
        raise ValueError(f"PENSTOCK_LOG_FORMAT={found!r} is unknown; write text or json")
    return found  # type: ignore[return-value]  # it is one of its two values


def configure(
    *,
    level: str | None = None,
    format: LogFormat | None = None,
    rank: int | None = None,
    stage: int | None = None,
    replica: int | None = None,
    host: str | None = None,
    stream: TextIO | None = None,
) -> None:
    """Log what this process does to `stream` (stderr); for processes that are ours alone. A second call replaces the
    first.

    What is not given comes from the environment. ValueError for a level or format that does not exist.
    """
    level = (level or os.environ.get("PENSTOCK_LOG") or "WARNING").upper()
    if level not in _LEVELS:
        raise ValueError(f"PENSTOCK_LOG={level!r} is no level; write one of {', '.join(_LEVELS)}")
    place = {"rank": rank, "stage": stage, "replica": replica, "host": host or platform.node()}
    handler = _OwnHandler(stream)
    is_json = (format or log_format()) == "json"
    handler.setFormatter(JsonFormatter(place) if is_json else TextFormatter(place))
    logger = logging.getLogger("penstock")
    logger.setLevel(level)
    for found in [found for found in logger.handlers if isinstance(found, _OwnHandler)]:
        logger.removeHandler(found)
    logger.addHandler(handler)


def writes_json() -> bool:
    """Whether this process logs JSON lines."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger("penstock").handlers)


def emit(name: str, message: str, *, error: BaseException | None = None, **fields: Any) -> None:
    """Write a line whatever the level is: what is printed where nobody collects logs. `fields` are of the record."""
    exception = None if error is None else (type(error), error, error.__traceback__)
    level = logging.INFO if error is None else logging.ERROR
    record = logging.getLogger(name).makeRecord(name, level, "", 0, message, (), exception, extra=fields)
    for handler in logging.getLogger("penstock").handlers:
        handler.handle(record)


def say_error(error: BaseException, *, with_traceback: bool) -> None:
    """Tell the user what ended the program: as the last line of stderr, or as a line of the log where that is JSON."""
    message = f"penstock: {error or type(error).__name__}"
    if writes_json():
        emit("penstock", message, error=error)
        return
    trace = "".join(traceback.format_exception(error)) if with_traceback else ""
    print(redact_text(f"{trace}{message}"), file=sys.stderr, flush=True)
