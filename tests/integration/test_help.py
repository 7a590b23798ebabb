"""What the command line says of itself: help by groups, the table of keys, completion."""

import json
from pathlib import Path

import pytest

from penstock.__main__ import app, main
from penstock.effects import EFFECTS
from penstock.explanation import find_keys, keys, markdown
from penstock.meanings import MEANINGS

DOCUMENT = Path(__file__).parents[2] / "docs" / "command-line.md"


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    told = capsys.readouterr()
    return int(ended.value.code or 0), told.out, told.err


def test_the_table_of_the_document_is_the_one_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert markdown() in DOCUMENT.read_text()
    assert said(capsys, "config", "--markdown")[1] == markdown()


def test_every_key_has_a_meaning_and_no_other() -> None:
    assert [key.key for key in keys() if not key.meaning] == [] and len(keys()) == len(MEANINGS)


def test_what_a_key_is_read_with_is_what_refuses_it() -> None:
    by_name = {key.key: key.read_with for key in keys()}
    for row in EFFECTS:
        covered = [name for name in by_name if row.covers(name)]
        assert covered and all(row.where in by_name[name] for name in covered)
    assert by_name["train.lr"] == "every run" and by_name["train.momentum"] == "train.optimizer sgd or rmsprop"


def test_a_key_or_a_section_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "config", "--explain", "train.lr")
    assert code == 0 and "0.003" in out and "learning rate" in out and "| " not in out
    found = json.loads(said(capsys, "config", "budgets", "--json")[1])
    assert [key["key"] for key in found] == ["budgets.device_memory", "budgets.host_memory", "budgets.disk"]
    code, _, err = said(capsys, "config", "train.learning_rate")
    assert code == 2 and "unknown key 'train.learning_rate'" in err
    with pytest.raises(ValueError, match=r"did you mean 'train\.lr'"):
        find_keys("lr")


def test_help_is_in_groups_and_has_the_flags_of_its_verb_alone(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "help", "train")
    groups = ["Model and training", "Machine", "Sampled training", "Full graph", "Replicas and cluster", "Watching"]
    places = [out.index(group) for group in groups]
    assert code == 0 and places == sorted(places)
    assert places[2] < out.index("--fanouts") < places[3] < out.index("--chunks") < places[4] < out.index("--feeders")
    assert said(capsys, "train", "--help")[1] == out
    render = said(capsys, "help", "k8s", "render")[1]
    assert "--volume" in render and not {"--force", "--quiet", "--result-json"} & set(render.split())
    assert "--chunks" not in said(capsys, "help", "infer")[1]
    code, out, _ = said(capsys, "help")
    assert code == 0 and all(verb in out for verb in ("quickstart", "config", "bench"))
    code, _, err = said(capsys, "help", "trian")
    assert code == 2 and "did you mean 'train'" in err
    assert said(capsys, "help", "k8s", "x")[0] == 2


def test_completion_is_installed_where_the_shell_looks(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/bin/bash")
    code, _, _ = said(capsys, "--install-completion", "--shell", "bash")
    scripts = [path for path in tmp_path.rglob("*") if path.is_file() and "penstock" in path.read_text()]
    assert code == 0 and scripts
    assert "--host-memory" in app.generate_completion(shell="bash")
