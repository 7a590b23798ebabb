"""Kernels on an install that cannot be written to, by a user without a home."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def has_namespaces() -> bool:
    return os.getuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


def read_only(command: list[str], tmp: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a command while the package's folder is mounted read-only."""
    script = 'mount --bind "$ROOT" "$ROOT" && mount -o remount,ro,bind "$ROOT" || exit 77; exec "$@"'
    told = {"PATH": os.environ["PATH"], "ROOT": str(ROOT), "PYTHONPATH": str(ROOT / "src"), "PYTHONSAFEPATH": "1"}
    told |= {"HOME": "/dev/null", "TMPDIR": str(tmp), **environment}
    return subprocess.run(
        ["unshare", "-m", "bash", "-c", script, "bash", *command], env=told, capture_output=True, text=True, cwd=tmp
    )


@pytest.mark.slow  # every process compiles its kernels
@pytest.mark.skipif(not has_namespaces(), reason="needs root and mount namespaces")
def test_verbs_work_on_a_read_only_install_without_a_home(tmp_path: Path) -> None:
    penstock = [sys.executable, "-P", "-m", "penstock"]
    made = read_only([*penstock, "generate", "g", "--num-nodes", "300", "--quiet"], tmp_path)
    assert made.returncode == 0, made.stderr
    folder = tmp_path / f"penstock-numba-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700 and list(folder.rglob("*.nbi"))
    told = read_only([*penstock, "doctor", "--json"], tmp_path)
    assert told.returncode == 0 and "penstock-numba" in told.stdout and "set NUMBA_CACHE_DIR" in told.stdout
    folder.chmod(0o777)
    refused = read_only([*penstock, "generate", "h", "--num-nodes", "300", "--quiet"], tmp_path)
    assert refused.returncode == 2 and "others may write to it; delete it, or set NUMBA_CACHE_DIR" in refused.stderr
    own = tmp_path / "own"
    own.mkdir()
    helped = read_only(
        [*penstock, "generate", "h", "--num-nodes", "300", "--quiet"], tmp_path, NUMBA_CACHE_DIR=str(own)
    )
    assert helped.returncode == 0 and list(own.rglob("*.nbi")), helped.stderr


def test_an_install_that_can_be_written_to_is_used_as_ever() -> None:
    code = "import tempfile; from penstock.kernels import cache; print(cache.is_temporary(), cache.cache_folder())"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("False /")
