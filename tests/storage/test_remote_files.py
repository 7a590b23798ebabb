import http.server
import importlib.util
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.storage.errors import MissingDependency
from penstock.storage.remote.config import RemoteConfig, local_copy
from penstock.storage.remote.files import RemoteError, open_remote
from penstock.storage.remote.uris import check_uri


class Flaky(http.server.BaseHTTPRequestHandler):
    """A web server of one file that fails, hangs or answers, as told."""

    plan: list[str] = []
    data = bytes(range(256)) * 40

    def do_GET(self) -> None:
        doing = self.plan.pop(0) if self.plan else "answer"
        if doing == "hang":
            time.sleep(1.5)
        if doing != "answer":
            self.send_error(503)
            return
        lo, hi = 0, len(self.data)
        if found := self.headers.get("Range"):
            first, last = found.removeprefix("bytes=").split("-")
            lo, hi = int(first), int(last) + 1
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(hi - lo))
        self.end_headers()
        self.wfile.write(self.data[lo:hi])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    pytest.importorskip("aiohttp")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Flaky) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}/store"
        found.shutdown()
        thread.join()


def test_a_call_that_fails_is_tried_again(server: str) -> None:
    Flaky.plan = ["fail", "fail"]
    assert open_remote(server).read("x", 10, 20) == Flaky.data[10:20]
    assert Flaky.plan == []


def test_a_call_that_keeps_failing_ends_with_its_uri_and_the_cause(server: str) -> None:
    Flaky.plan = ["fail"] * 3
    with pytest.raises(RemoteError, match=rf"cannot read {server}/x: 3 tries in .* 503") as raised:
        open_remote(server, tries=3).read("x", 0, 10)
    assert raised.value.__cause__ is not None
    assert Flaky.plan == []


def test_a_server_that_does_not_answer_is_given_up(server: str) -> None:
    Flaky.plan = ["hang", "hang"]
    with pytest.raises(RemoteError, match="2 tries .* TimeoutError: no answer within"):
        open_remote(server, tries=2, timeout_s=0.2).read("x", 0, 10)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAKEY:hunter2@bucket/folder",
        "s3://hunter2@bucket/folder",
        "https://hunter2@host/folder",
        "sftp://me:hunter2@host/folder",
        "https://host/folder?sig=hunter2",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ValueError, match="holds credentials") as raised:
        open_remote(uri)
    assert "hunter2" not in str(raised.value)
    assert "hunter2" not in str(local_copy(uri.partition("?")[0], "datasets", None))
    with pytest.raises(ValueError):
        RemoteConfig(dataset=uri)


def test_names_that_are_part_of_an_address_are_allowed() -> None:
    assert (
        check_uri("abfs://container@account.dfs.core.windows.net/x/")
        == "abfs://container@account.dfs.core.windows.net/x"
    )
    assert check_uri("s3://bucket/x") == "s3://bucket/x"


@pytest.mark.parametrize("uri", ["s3://tellnobody@b/x", "https://user:tellnobody@h/x", "gs://b/x?a=tellnobody"])
def test_what_is_refused_is_not_repeated(uri: str) -> None:
    with pytest.raises(ValueError, match="holds credentials or a query") as raised:
        check_uri(uri)
    assert "tellnobody" not in str(raised.value) and uri.partition("://")[0] in str(raised.value)


@pytest.mark.parametrize("uri", ["nowhere://x/y", "simplecache::s3://b/x", "s3://", "file:///"])
def test_what_is_no_uri_of_a_folder_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="fsspec knows|is no URI"):
        open_remote(uri)


def test_without_a_home_the_folder_of_copies_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/dev/null")
    with pytest.raises(ValueError, match="/dev/null/.cache/penstock, which cannot be written to; give --stage-dir"):
        local_copy("s3://bucket/graph", "datasets", None)
    assert local_copy("s3://bucket/graph", "datasets", tmp_path).parent == tmp_path / "datasets"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_copy("s3://bucket/graph", "datasets", None).parent == tmp_path / ".cache" / "penstock" / "datasets"


def test_a_missing_library_is_named_with_its_extra() -> None:
    if importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed here")
    with pytest.raises(MissingDependency, match=r"pip install 'gcsfs>=2024.12'"):
        open_remote("gs://bucket/folder")


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_files_are_written_listed_read_and_deleted(protocol: str, tmp_path: Path) -> None:
    remote = open_remote(f"{protocol}://{tmp_path}/folder")
    assert remote.names() == [] and remote.read_if_there("a/x") is None and remote.size("a/x") is None
    remote.write("a/x", b"one")
    remote.write("a/x", b"three")
    (tmp_path / "local").write_bytes(b"12345678")
    remote.upload(tmp_path / "local", "a/y")
    assert remote.names() == ["a"] and remote.names("a") == ["x", "y"]
    assert (remote.read("a/x"), remote.read("a/y", 2, 5), remote.size("a/y")) == (b"three", b"345", 8)
    assert remote.create("lock", b"1") and not remote.create("lock", b"2") and remote.read("lock") == b"1"
    remote.download("a/y", tmp_path / "back" / "y")
    assert (tmp_path / "back" / "y").read_bytes() == b"12345678"
    remote.delete("a")
    remote.delete("a")
    assert remote.names() == ["lock"]
