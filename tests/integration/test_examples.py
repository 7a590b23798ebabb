import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("custom_module", "torch"),
        pytest.param("deep_custom_model", "torch", marks=pytest.mark.slow),
        pytest.param("dgl_layers", "dgl", marks=pytest.mark.slow),
        pytest.param("dgl_loop", "dgl", marks=pytest.mark.slow),
        pytest.param("pyg_loop", "torch_geometric", marks=pytest.mark.slow),
        pytest.param("pyg_layers", "torch_geometric", marks=pytest.mark.slow),
    ],
)
def test_examples_run_and_learn(name: str, needs: str, tmp_path: Path) -> None:
    pytest.importorskip(needs)
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    losses = [float(value) for value in re.findall(r"loss (\S+)", done.stdout)]
    assert len(losses) == 8
    assert losses[-1] < 0.75 * losses[0]
    if name.endswith("_loop"):
        assert float(done.stdout.partition("accuracy ")[2].split()[0]) > 0.5 and "20000 nodes written" in done.stdout
