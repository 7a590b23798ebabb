"""Every file that a run leaves, damaged in every way: found by the step that reads it, and never another result."""

import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from penstock.config import RunConfig, load_config
from penstock.exit_codes import DATA, exit_code
from penstock.inference import infer
from penstock.inspection import describe
from penstock.records import epoch_records
from penstock.storage.budget import MIB
from penstock.storage.errors import DataError
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.manifest import checksum_file
from penstock.training import train

DAMAGES = ("flipped", "cut", "missing", "swapped")
SAMPLED = {
    "sampler.fanouts": (3, 3),
    "sampler.batch_size": 40,
    "sampler.window_items": 3,
    "model.kind": "sage",
}
MODES: dict[str, dict[str, Any]] = {
    "reuse": {**SAMPLED, "plan.mode": "reuse", "evaluate.mode": "sampled"},
    "rolling": {**SAMPLED, "plan.mode": "rolling", "evaluate.mode": "sampled"},
    "memory": {**SAMPLED, "feed": "memory", "evaluate.mode": "exact"},
    "chunked": {
        "mode": "chunked",
        "model.kind": "gcn",
        "chunked.chunks": 3,
        "chunked.history_storage": "disk",
        "chunked.partition": "random",
    },
}
IGNORED = {".lock"}  # empty
# what a run that is cut off may lack yet
OPTIONAL = {"result.json", "machine.json", "plan.json", "manifest.json", "made-of.json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A graph, a run of it that was stopped half way, and what the whole run ends with.

    All is tried in `work`, where graph and run were made: a run knows where its dataset lies.
    """

    graph: Path
    work: Path
    stopped: Path
    finished: Path
    settings: dict[str, Any]

    def config(self) -> RunConfig:
        shared = {
            "dataset": self.work / "graph",
            "run_dir": self.work / "run",
            "budgets.host_memory": "64MiB",
            "budgets.disk": "1GiB",
            "model.hidden": 8,
            "train.epochs": 4,
            "train.threads": 1,
            "train.lr": 0.01,
            "train.keep_checkpoints": 2,
        }
        return load_config(flags={**shared, **self.settings})


def outcome(run: Path, result: dict[str, Any]) -> tuple[Any, ...]:
    """What must not depend on damage."""
    metrics = {key: value for key, value in result["metrics"].items() if "per_s" not in key and not key.endswith("_s")}
    return metrics, checksum_file(run / "model" / "model.safetensors")


def stop_half_way(config: RunConfig) -> None:
    stop = threading.Event()

    def progress(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        if stage == "train" and 2 * done >= total:
            stop.set()

    with pytest.raises(RuntimeError, match="stopped (at|after)"):
        train(config, progress=progress, stop_requested=stop)


_CASES: dict[str, Case] = {}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("damage")
    config = GenerateConfig(num_nodes=600, num_features=24, avg_degree=5, num_classes=3, train=0.3, valid=0.1, test=0.1)
    generate_graph(folder / "graph", config, host_memory=64 * MIB)
    yield folder
    _CASES.clear()


def case_of(base: Path, mode: str) -> Case:
    """The runs of a mode, made when they are first wanted."""
    if mode not in _CASES:
        folder = base / mode
        shutil.copytree(base / "graph", folder / "work" / "graph")
        places = {"graph": base / "graph", "work": folder / "work"}
        case = Case(**places, stopped=folder / "stopped", finished=folder / "finished", settings=MODES[mode])
        stop_half_way(case.config())
        shutil.copytree(case.work / "run", case.stopped)
        train(case.config())
        shutil.move(case.work / "run", case.finished)
        _CASES[mode] = case
    return _CASES[mode]


def damage(path: Path, how: str, others: list[Path], seed: int) -> bool:
    """Damage one file; False where there is nothing to damage it with."""
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return True
    if how == "swapped":
        same = [o for o in others if o != path and o.suffix == path.suffix and o.read_bytes() != data]
        if not same:
            return False
        same.sort(key=lambda o: (abs(o.stat().st_size - len(data)), str(o)))  # the more alike the worse
        other = same[0].read_bytes()
        same[0].write_bytes(data)
        path.write_bytes(other)
        return True
    if not data:
        return False
    if how == "cut":
        path.write_bytes(data[: len(data) * 2 // 3])
    else:
        rng = random.Random(f"{path.name}{seed}")
        used = [n for n, byte in enumerate(data) if byte] or [0]  # not in padding, which nothing reads
        data[rng.choice(used)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    return True


def apply_remedy(message: str, work: Path, graph: Path) -> None:
    """Do what a message says."""
    assert str(work) in message, f"the file is not named: {message}"
    if str(work / "graph") in message:
        assert "copy the file anew" in message or "restore it" in message, message
        shutil.rmtree(work / "graph")
        shutil.copytree(graph, work / "graph")
        return
    found = re.search(r"delete (\S+?)[,;:]?(?: |$|\))", message)
    if found is not None:
        path = Path(found[1])
        if found[1] == "it":
            path = Path(message.split(" ")[0].rstrip(":,"))
        elif found[1] == "the":  # the folder
            path = Path(message.split(" ")[0].rstrip(":,"))
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    else:
        assert "run the same command again" in message, message


def survives(case: Case) -> str:
    """Train to the end, by the remedies that the errors name; returns what was said on the way."""
    said = []
    for _ in range(4):
        try:
            result = train(case.config())
        except Exception as error:
            assert exit_code(error) == DATA, repr(error)
            said.append(str(error))
            apply_remedy(str(error), case.work, case.graph)
            continue
        done = describe(case.finished)
        expected = (done["metrics"], checksum_file(case.finished / "model" / "model.safetensors"))
        found = outcome(case.work / "run", result)
        assert found[1] == expected[1], f"other weights after {said}"
        return "\n".join(said)
    raise AssertionError(f"it never ends: {said}")


def files_of(case: Case, folder: str) -> list[str]:
    root = {"run": case.stopped, "graph": case.graph, "done": case.finished}[folder]
    found = [path for path in sorted(root.rglob("*")) if path.is_file() and path.name not in IGNORED]
    return [str(path.relative_to(root)) for path in found]


def renew(case: Case) -> None:
    """Bring everything back to where it was half way."""
    shutil.rmtree(case.work, ignore_errors=True)
    shutil.copytree(case.graph, case.work / "graph")
    shutil.copytree(case.stopped, case.work / "run")


def try_all(base: Path, mode: str, folder: str, how: str, pick: Callable[[list[str]], list[str]]) -> None:
    case = case_of(base, mode)
    for number, name in enumerate(pick(files_of(case, folder))):
        renew(case)
        root = case.work / folder
        if (root / name).is_file() and damage(root / name, how, [p for p in root.rglob("*") if p.is_file()], number):
            try:
                survives(case)
            except Exception as error:
                raise AssertionError(f"{folder}/{name} {how}: {error}") from error


def one_of_a_kind(names: list[str]) -> list[str]:
    """The first of those that differ in numbers only."""
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "#", name), name)
    return list(kinds.values())


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("folder", ["run", "graph"])
@pytest.mark.parametrize("mode", MODES)
def test_every_file(base: Path, mode: str, folder: str, how: str) -> None:
    """Of a rolling run one file of each kind: every try starts a producer."""
    try_all(base, mode, folder, how, one_of_a_kind if mode == "rolling" else list)


QUICK = [
    ("graph", "features.npy", "flipped"),
    ("graph", "indices.npy", "flipped"),
    ("graph", "train_ids.npy", "swapped"),
    ("run", "config.yaml", "flipped"),
    ("run", "train/packs/window-000000.pack", "flipped"),
    ("run", "train/packs/window-000001.residents.npy", "swapped"),
    ("run", "train/packs/window-000003.wrap.npy", "missing"),
    ("run", "train/packs/window-000002.json", "cut"),
    ("run", "train/plan.json", "swapped"),
    ("run", "valid/packs/window-000000.pack", "missing"),
    ("run", "checkpoints/step-000000010/model.safetensors", "swapped"),
]


def test_a_sample_of_files(base: Path) -> None:
    """The full product is slow."""
    names = files_of(case_of(base, "reuse"), "run") + files_of(case_of(base, "reuse"), "graph")
    assert all(name in names for _, name, _ in QUICK), "a file that is to be tried has another name now"
    for folder, name, how in QUICK:
        try_all(base, "reuse", folder, how, lambda names, name=name: [name])  # type: ignore[misc]


@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_inspect_finds_every_damaged_file_of_a_run(base: Path, how: str) -> None:
    """All but pictures, logs and what has nothing to compare with."""
    case = case_of(base, "reuse")
    renew(case)
    run = case.work / "run"
    sound = describe(run, validate=True)
    assert sound["files_without_checksum"] == ["metrics.jsonl"] and sound["files_checked"] > 30
    for name in files_of(case, "run"):
        if name in sound["files_without_checksum"] or (how == "missing" and Path(name).name in OPTIONAL):
            continue
        before = (run / name).read_bytes()
        damage(run / name, how, [], 1)
        try:
            describe(run, validate=True)
        except DataError as error:
            assert Path(name).name.split(".")[0] in str(error)
        else:
            pytest.fail(f"{name}, {how}, was not found")
        (run / name).write_bytes(before)
    assert describe(run, validate=True) == sound


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_models_are_not_used(base: Path, tmp_path: Path, how: str) -> None:
    case = case_of(base, "reuse")
    renew(case)
    shutil.copytree(case.finished, case.work / "run", dirs_exist_ok=True)
    run, out = case.work / "run", tmp_path / "out.parquet"
    for name in ("model/model.safetensors", "model/model.json", "config.yaml"):
        before = (run / name).read_bytes()
        if not damage(run / name, how, [path for path in run.rglob("*") if path.is_file()], 2):
            continue
        with pytest.raises(DataError, match=re.escape(str(run))):
            infer(run, out)
        assert not out.exists()
        shutil.rmtree(run)
        shutil.copytree(case.finished, run)
        assert (run / name).read_bytes() == before
    infer(run, out)
    assert out.is_file()


def test_damaged_lines_of_metrics_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        '{"epoch": 1, "train_loss": 0.5}',
        '{"epoch": 2, "tra',
        "\x00\x00",
        "7",
        '{"epoch": 3, "train_loss": 0.25}',
    ]
    path.write_text("\n".join(lines) + "\n")
    assert [record["epoch"] for record in epoch_records(path)] == [1, 3]
    assert [f", line {number} is damaged" in caplog.text for number in range(1, 6)] == [False, True, True, True, False]
