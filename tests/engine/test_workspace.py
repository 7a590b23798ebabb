import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from penstock.engine.workspace import own_folder

HOLD = """
import sys
from pathlib import Path
from penstock.engine.workspace import own_folder
with own_folder(Path(sys.argv[1]), sys.argv[2]) as folder:
    (folder / "rows").write_text(sys.argv[2])
    print(folder, flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(parent: Path, key: str) -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """A process that holds a folder, with something in it, until its input ends."""
    command = [sys.executable, "-c", HOLD, str(parent), key]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())


def folders(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir() if path.is_dir())


def test_each_has_a_folder_of_its_own(tmp_path: Path) -> None:
    with holder(tmp_path, "a") as (_, theirs), own_folder(tmp_path, "a") as mine, own_folder(tmp_path, "b") as other:
        assert len({theirs, mine, other}) == 3 and not (mine / "rows").exists()
        assert (theirs / "rows").read_text() == "a"
    assert folders(tmp_path) == []


def test_what_a_kill_left_is_continued_or_deleted(tmp_path: Path) -> None:
    for key in ("a", "b"):
        with holder(tmp_path, "a") as (process, left):
            process.send_signal(signal.SIGKILL)
        assert (left / "rows").exists()
        with own_folder(tmp_path, key) as folder:
            assert (folder == left) == (folder / "rows").exists() == (key == "a")
            assert folders(tmp_path) == [folder.name]
        assert folders(tmp_path) == []


def test_an_error_leaves_what_is_there_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(KeyError), own_folder(tmp_path, "a") as folder:
        raise KeyError
    assert folders(tmp_path) == []
    with pytest.raises(KeyError), own_folder(tmp_path, "a") as folder:
        (folder / "rows").touch()
        raise KeyError
    with own_folder(tmp_path, "a") as again:
        assert again == folder and (again / "rows").exists()
