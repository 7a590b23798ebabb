"""`--quiet` means the same in every verb: no word but warnings and errors, and on stdout only what a machine reads."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from penstock.__main__ import main

Say = Callable[..., tuple[str, str]]
SAMPLED = ["--fanouts", "3,3", "--batch-size", "32", "--hidden", "8", "--epochs", "1", "--host-memory", "8MiB"]
CHUNKED = ["--mode", "chunked", "--chunks", "4", "--layers", "2", "--hidden", "8", "--epochs", "1"]


@pytest.fixture
def say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Say:
    """A function that runs a verb to its end in this process; returns what it said on stdout and stderr."""

    def said(*words: str) -> tuple[str, str]:
        with pytest.raises(SystemExit) as ended:
            main([word.format(tmp=tmp_path) for word in words])
        told = capsys.readouterr()
        assert ended.value.code == 0, told.err
        return told.out, told.err

    return said


def test_quiet_verbs_say_nothing_but_what_machines_read(say: Say, tmp_path: Path) -> None:
    made = ("generate", "{tmp}/g", "--num-nodes", "600", "--set", "num_features=8")
    source = tmp_path / "arrays"
    source.mkdir()
    np.save(source / "features.npy", np.zeros((3, 2), np.float32))
    np.save(source / "edge_index.npy", np.array([[0, 1], [1, 2]]))
    assert say(*made, "--quiet") == ("", "")
    out, err = say("ingest", "{tmp}/arrays", "{tmp}/h", "--quiet")
    assert out == "" and [line.split()[0] for line in err.splitlines()] == ["WARNING"], "it has no splits"
    for shape, run in ((SAMPLED, "{tmp}/s"), (CHUNKED, "{tmp}/c")):
        words = ("{tmp}/g", "--run-dir", run, *shape, "--quiet")
        assert say("plan", *words) == ("", "")
        out, err = say("plan", *words, "--json")
        assert json.loads(out) and err == ""
        assert say("pack", *words) == ("", "")
        assert say("train", *words) == ("", "")
        assert say("train", *words) == ("", ""), "already done"
        out, err = say("infer", run, f"{run}.parquet", "--quiet")
        assert json.loads(out)["rows"] == 600 and err == ""


def test_a_verb_that_has_nothing_to_do_says_so(say: Say) -> None:
    say("generate", "{tmp}/g", "--num-nodes", "600", "--set", "num_features=8")
    words = ("{tmp}/g", "--run-dir", "{tmp}/s", *SAMPLED)
    for verb in ("pack", "train"):
        first, _ = say(verb, *words)
        again, _ = say(verb, *words)
        assert "already done" not in first and again.splitlines()[0].endswith(": already done")
