import errno
import hashlib
import http.server
import importlib.util
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from penstock.storage.errors import MissingDependency
from penstock.storage.remote.config import RemoteConfig, local_copy
from penstock.storage.remote.files import RemoteError, RemoteFolder, open_remote
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


class Slow(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A store whose first write lands when `go` is set, long after it was given up."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.go, self.landed = threading.Event(), threading.Event()
        self._first = threading.Lock()

    def _late(self, write: Callable[[], object]) -> None:
        if self._first.acquire(blocking=False):
            self.go.wait(30)
            write()
            self.landed.set()
        else:
            write()

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        self._late(lambda: MemoryFileSystem.pipe_file(self, path, value, **options))

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        data = Path(lpath).read_bytes()
        self._late(lambda: MemoryFileSystem.pipe_file(self, rpath, data))

    def rm(self, path: str, **options: Any) -> None:
        self._late(lambda: MemoryFileSystem.rm(self, path, **options) if self.exists(path) else None)


def change(remote: RemoteFolder, verb: str, name: str, data: bytes, tmp_path: Path) -> None:
    if verb == "write":
        remote.write(name, data)
    elif verb == "upload":
        (tmp_path / data.decode()).write_bytes(data)
        remote.upload(tmp_path / data.decode(), name)
    else:
        remote.delete(name)


@pytest.mark.parametrize("second", ["write", "upload"])
@pytest.mark.parametrize("first", ["write", "upload", "delete"])
def test_a_write_that_was_given_up_cannot_land_on_a_newer_one(first: str, second: str, tmp_path: Path) -> None:
    slow, root = Slow(), f"/{tmp_path.name}-{first}-{second}"
    remote = RemoteFolder(f"memory:/{root}", slow, root, tries=5, timeout_s=0.2)
    change(remote, first, "run/state.json", b"old", tmp_path)  # the second try did it
    other = RemoteFolder(f"memory:/{root}/run", slow, f"{root}/run", tries=9, timeout_s=60.0)
    newer = threading.Thread(target=change, args=(other, second, "state.json", b"new", tmp_path))
    newer.start()
    assert not slow.landed.wait(0.2) and newer.is_alive()  # it waits: the first try is still under way
    slow.go.set()
    newer.join(60)
    assert slow.landed.is_set() and remote.read("run/state.json") == b"new"


def test_a_write_behind_one_that_does_not_end_fails_and_says_so(tmp_path: Path) -> None:
    slow, root = Slow(), f"/{tmp_path.name}-stuck"
    remote = RemoteFolder(f"memory:/{root}", slow, root, tries=2, timeout_s=0.1)
    remote.write("state.json", b"old")
    remote.write("other.json", b"at once")
    with pytest.raises(RemoteError, match="an earlier write, which was given up, has not ended within"):
        remote.write("state.json", b"new")
    assert remote.read("state.json") == b"old"
    slow.go.set()


class Lossy(MemoryFileSystem):  # type: ignore[misc]
    """Creates files exclusively, but the first answer is lost."""

    cachable = False
    lost = False

    async def _pipe_file(self, path: str, value: bytes, mode: str = "overwrite") -> None:
        """As in libraries that know `mode`."""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        super().pipe_file(path, value, mode=mode)
        if not self.lost:
            self.lost = True
            raise ConnectionResetError("the answer was lost")


def test_a_file_that_we_created_is_ours_although_the_answer_was_lost(tmp_path: Path) -> None:
    root = f"/{tmp_path.name}-lossy"
    remote = RemoteFolder(f"s3:/{root}", Lossy(), root, tries=3, timeout_s=5.0)
    assert remote.creates_atomically
    assert remote.create("lock", b"mine") and not remote.create("lock", b"another's")
    assert remote.read("lock") == b"mine" and remote.creates_atomically


class Careless(Lossy):
    """A server that ignores the condition."""

    lost = True

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        MemoryFileSystem.pipe_file(self, path, value)


class Old(MemoryFileSystem):  # type: ignore[misc]
    """A library as s3fs was before 2024.12: the wish goes to its server, which does not know it."""

    cachable = False

    async def _pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        """Without `mode`."""

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        super().pipe_file(path, value)


def test_whether_files_are_created_exclusively_is_found_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    careless = RemoteFolder("s3://bucket/run", Careless(), f"/{tmp_path.name}-careless", tries=1, timeout_s=5.0)
    assert careless.create("lock", b"mine") and not careless.creates_atomically
    assert "lets two create one file; locks there are settled by waiting" in caplog.text
    old = RemoteFolder("s3://bucket/run", Old(), f"/{tmp_path.name}-old", tries=1, timeout_s=5.0)
    assert not old.creates_atomically


class Conditional(MemoryFileSystem):  # type: ignore[misc]
    """What S3 and s3fs do: ETags, conditions on writes, and their errors. The first write may be held back."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.held: threading.Event | None = None

    async def _pipe_file(self, path: str, value: bytes, mode: str = "overwrite") -> None:
        """As in libraries that know `mode`."""

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = super().info(path)
        return found | {"ETag": hashlib.md5(self.cat_file(path)).hexdigest()}

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", IfMatch: str = "", **_: Any) -> Any:
        held, self.held = self.held, None
        if held is not None:
            held.wait(30)
        if IfMatch and (not self.exists(path) or self.info(path)["ETag"] != IfMatch):
            raise OSError(errno.EINVAL, "At least one of the pre-conditions you specified did not hold")
        super().pipe_file(path, value, mode=mode)
        return {"ETag": self.info(path)["ETag"]}


def test_a_late_write_of_another_process_fails(tmp_path: Path) -> None:
    store, root, go = Conditional(), f"/{tmp_path.name}-conditional", threading.Event()
    ours, theirs = (RemoteFolder("s3://bucket/run", store, root, tries=1, timeout_s=0.2) for _ in range(2))
    ours.write("result.json", b"stopped")
    ours.write("result.json", b"stopped")
    store.held = go
    with pytest.raises(RemoteError, match="no answer within"):
        ours.write("result.json", b"failed")
    store.pipe_file(f"{root}/result.json", b"ok")  # of another process, which has taken the run over
    go.set()
    with pytest.raises(RemoteError, match="result.json was written by somebody else meanwhile and is left so"):
        ours.write("result.json", b"failed")
    assert theirs.read("result.json") == b"ok"
    theirs.write("result.json", b"ok, again")
    theirs.delete("result.json")
    theirs.write("result.json", b"ok, anew")
    assert ours.read("result.json") == b"ok, anew"
