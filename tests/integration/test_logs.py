"""Logs that people read and logs that machines read, of the program and of the ranks it starts."""

import io
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from penstock.storage import logs
from penstock.storage.generate import GenerateConfig, generate_graph


@pytest.fixture(autouse=True)
def plain_logger() -> Iterator[None]:
    logger = logging.getLogger("penstock")
    before = logger.level, list(logger.handlers)
    yield
    logger.handlers = before[1]
    logger.setLevel(before[0])


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_say_who_and_where() -> None:
    stream = io.StringIO()
    logs.configure(level="INFO", format="json", rank=3, stage=1, replica=0, host="node-7", stream=stream)
    logger = logging.getLogger("penstock.engine.feed")
    logger.debug("not this")
    logger.info("read %d rows\nof two lines", 5)
    try:
        raise KeyError("api_token=hidden-value")
    except KeyError:
        logger.exception("it failed")
    first, second = lines(stream)
    at = datetime.fromisoformat(first.pop("time"))
    assert at.utcoffset() == timedelta(0) and abs(datetime.now(timezone.utc) - at) < timedelta(minutes=5)
    assert first == {
        "level": "INFO",
        "logger": "penstock.engine.feed",
        "message": "read 5 rows\nof two lines",
        "rank": 3,
        "stage": 1,
        "replica": 0,
        "host": "node-7",
        "pid": os.getpid(),
    }
    assert second["level"] == "ERROR" and second["exception"].startswith("Traceback")
    assert "KeyError" in second["exception"] and "hidden-value" not in second["exception"]


def test_text_names_the_rank_and_a_second_call_replaces_the_first() -> None:
    early, late = io.StringIO(), io.StringIO()
    logs.configure(stream=early)
    logs.configure(rank=2, level="info", format="text", stream=late)
    logging.getLogger("penstock.x").info("hello")
    assert early.getvalue() == "" and late.getvalue() == "INFO rank 2 penstock.x: hello\n"


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setenv("PENSTOCK_LOG", "error")
    monkeypatch.setenv("PENSTOCK_LOG_FORMAT", "json")
    logs.configure(stream=stream)
    logging.getLogger("penstock").warning("no")
    logging.getLogger("penstock").error("yes")
    (line,) = lines(stream)
    assert line["message"] == "yes" and line["host"] == platform.node() and "rank" not in line
    monkeypatch.setenv("PENSTOCK_LOG_FORMAT", "xml")
    with pytest.raises(ValueError, match="PENSTOCK_LOG_FORMAT='xml'.*text or json"):
        logs.configure()
    monkeypatch.setenv("PENSTOCK_LOG_FORMAT", "")
    monkeypatch.setenv("PENSTOCK_LOG", "loud")
    with pytest.raises(ValueError, match="PENSTOCK_LOG='LOUD'"):
        logs.configure()


@pytest.mark.slow
def test_every_line_of_a_run_with_ranks_is_json(tmp_path: Path) -> None:
    graph = tmp_path / "graph"
    generate_graph(graph, GenerateConfig(num_nodes=600, num_features=8, train=0.3, valid=0.1), host_memory=64 << 20)
    words = f"train {graph} --run-dir {tmp_path / 'run'} --mode chunked --chunks 4 --layers 2 --hidden 8 --epochs 2"
    command = [sys.executable, "-m", "penstock", *words.split(), "--stages", "2", "--backend", "processes"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PENSTOCK_LOG": "DEBUG", "PENSTOCK_LOG_FORMAT": "json"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stderr.splitlines()]
    shown = [line["progress"] for line in found if "progress" in line]
    trained = [line for line in shown if line["stage"] == "train"]
    assert trained[-1]["done"] == trained[-1]["total"] == 2 and trained[-1]["unit"] == "epochs"
    assert trained[-1]["loss"] > 0
    assert {line["host"] for line in found} == {platform.node()}
