"""No secret in what a run writes, prints or logs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from penstock.config import load_config
from penstock.report import write_config, write_result
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.redaction import names_secret, redact, redact_text, refuse_secrets

SECRET = "s3cr3t-Va1ue/of+mine"


@pytest.mark.parametrize(
    "name", ["token", "api_token", "apiToken", "API-KEY", "AWS_SECRET_ACCESS_KEY", "db.password", "credentials"]
)
def test_names_of_secrets(name: str) -> None:
    assert names_secret(name)
    assert redact({"a": [{name: SECRET}], "b": 1}) == {"a": [{name: "***"}], "b": 1}


@pytest.mark.parametrize("name", ["tokenizer", "key", "num_keys", "secretary", "path", "passes", "accessed_keys"])
def test_names_of_other_things(name: str) -> None:
    assert not names_secret(name) and redact({name: "x"}) == {name: "x"}


def test_numbers_are_secret_only_under_the_word_itself() -> None:
    assert redact({"password": 12345678, "token_dim": 16, "use_token": True, "token": None}) == {
        "password": "***",
        "token_dim": 16,
        "use_token": True,
        "token": None,
    }


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"s3://key:{SECRET.replace('/', '%2F')}@host/bucket", "s3://***@host/bucket"),
        ("ftp://user:p@ss@host:21/x failed", "ftp://***@host:21/x failed"),
        ("https://h/x?X-Amz-Signature=ab12&part=3#top", "https://h/x?X-Amz-Signature=***&part=3#top"),
        ("https://h/x?sv=1&sig=a%2Fb", "https://h/x?sv=1&sig=***"),
        ("https://h/x?token=abc", "https://h/x?token=***"),
        (f"run with API_TOKEN={SECRET} please", "run with API_TOKEN=*** please"),
        (f"{{'api_token': '{SECRET}', 'n': 3}}", "{'api_token': '***', 'n': 3}"),
        (f'{{"password": "{SECRET}"}}', '{"password": "***"}'),
        (f"password: {SECRET}\nnext", "password: ***\nnext"),
        (f"Authorization: Bearer {SECRET}x", "Authorization: Bearer ***"),
        ("{'Authorization': 'Basic dXNlcjpwYXNz'}", "{'Authorization': 'Basic ***'}"),
        ("key AKIAABCDEFGHIJKLMNOP is bad", "key *** is bad"),
        (f"error: token={SECRET}, KeyError: 'token={SECRET}'", "error: token=***, KeyError: 'token=***'"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY----- end", "*** end"),
    ],
)
def test_text_is_cleaned(text: str, clean: str) -> None:
    assert redact_text(text) == clean
    assert redact_text(clean) == clean


@pytest.mark.parametrize(
    "text",
    [
        "abfss://container@account.dfs.core.windows.net/graph",
        "http://localhost:8265/jobs/a@b",
        "lr=0.1 and step: 3, tokens done",
        "s3://bucket/path?region=eu",
        "Basic statistics of the bearer",
        "unknown key 'token'; known keys: lr, seed",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert redact_text(text) == text


def test_what_the_environment_keeps_secret_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OUR_DB_PASSWORD", SECRET)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    assert redact_text(f"the server said: {SECRET}!") == "the server said: ***!"
    assert str(tmp_path) in redact_text(f"{tmp_path}/credentials is missing")


def test_a_configuration_with_secrets_is_refused_without_telling_them() -> None:
    config = {"dataset": f"s3://k:{SECRET[:6]}@h/x", "model": {"kwargs": {"api_token": SECRET, "heads": 4}}}
    with pytest.raises(ValueError, match="dataset, model.kwargs.api_token; .*environment") as caught:
        refuse_secrets(config)
    assert SECRET[:6] not in str(caught.value)
    refuse_secrets({"dataset": "s3://bucket/x", "model": {"kwargs": {"tokenizer": "words", "token_dim": 8}}})


def test_neither_result_nor_configuration_holds_a_secret(tmp_path: Path) -> None:
    flags = {"dataset": "graph", "run_dir": "run", "model.kind": "custom", "model.module": "m:f"}
    plain = load_config(None, (), flags)
    config = plain.model_copy(update={"model": plain.model.model_copy(update={"kwargs": {"api_token": SECRET}})})
    with pytest.raises(ValueError, match="model.kwargs.api_token"):
        write_config(tmp_path / "config.yaml", config, "1234")
    assert not (tmp_path / "config.yaml").exists()
    error = ValueError(f"the store refused token={SECRET} at s3://user:{SECRET[:6]}@host/graph")
    result = write_result(
        tmp_path / "result.json",
        status="failed",
        config=config,
        metrics={"loss": 1.5},
        copy=tmp_path / "c",
        error=error,
    )
    for text in (json.dumps(result), *(path.read_text() for path in tmp_path.iterdir())):
        assert SECRET not in text and SECRET[:6] not in text
    assert result["config"]["model"]["kwargs"] == {"api_token": "***"} and result["metrics"] == {"loss": 1.5}
    write_config(tmp_path / "config.yaml", plain, "1234")
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert load_config(tmp_path / "config.yaml") == plain and stored == plain.model_dump(mode="json")


LOUD = f"""
import logging
from torch import nn

class Model(nn.Module):
    def __init__(self, num_features, num_classes):
        super().__init__()
        self.linear = nn.Linear(num_features, num_classes)

    def forward(self, blocks, x):
        if len(x) > 20:  # not on the few nodes on which a module is tried first
            logging.getLogger("penstock.loud").warning("logging in with api_token={SECRET}")
            raise ValueError("https://user:{SECRET[:6]}@host refused password={SECRET}")
        return self.linear(x[: blocks[-1].num_dst])
"""


@pytest.mark.slow
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_failing_run_tells_no_secret(tmp_path: Path, log_format: str) -> None:
    graph, run = tmp_path / "graph", tmp_path / "run"
    generate_graph(graph, GenerateConfig(num_nodes=500, num_features=8), host_memory=64 << 20)
    (tmp_path / "loud.py").write_text(LOUD)
    words = ["train", graph, "--run-dir", run, "--set", "model.module=loud:Model", "--model", "custom"]
    words += ["--host-memory", "64MiB"]
    environment = {
        **os.environ,
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": str(tmp_path),
        "PENSTOCK_LOG_FORMAT": log_format,
        "SERVICE_TOKEN": SECRET,
    }
    command = [sys.executable, "-m", "penstock", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    written = [path.read_text(errors="replace") for path in run.rglob("*") if path.is_file()]
    for text in (done.stdout, done.stderr, *written):
        assert SECRET not in text and SECRET[:6] not in text
    error = json.loads((run / "result.json").read_text())["error"]
    assert error["message"] == "https://***@host refused password=***"
    if log_format == "json":
        lines = [json.loads(line) for line in done.stderr.splitlines()]
        assert "logging in with api_token=***" in [line["message"] for line in lines]
        assert lines[-1]["level"] == "ERROR" and lines[-1]["message"] == f"penstock: {error['message']}"
