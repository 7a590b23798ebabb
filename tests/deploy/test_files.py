import ast
import json
import re
import shlex
from importlib import metadata, util
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from penstock import __version__
from penstock.__main__ import app
from penstock.config import load_config

ROOT = Path(__file__).parents[2]
DEPLOY, PIPELINES = ROOT / "deploy", ROOT / "examples" / "pipelines"


def dockerfile_stages(path: Path) -> list[list[tuple[str, str]]]:
    """The instructions of each stage, the lines before the first FROM apart."""
    text = re.sub(r"\\\n", " ", "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#")))
    stages: list[list[tuple[str, str]]] = [[]]
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            stages.append([])
        stages[-1].append((word, rest.strip()))
    return stages[1:]


def test_the_image_runs_without_root_and_pins_what_it_installs() -> None:
    stages = dockerfile_stages(DEPLOY / "Dockerfile")
    known = {"FROM", "ARG", "ENV", "RUN", "COPY", "USER", "WORKDIR", "CMD"}  # no ADD, which fetches URLs
    assert {word for stage in stages for word, _ in stage} <= known
    build, cpu, *others = stages
    assert build[0][1].endswith("AS build") and cpu[0][1].endswith("AS cpu")
    users = [rest for word, rest in cpu if word == "USER"]
    assert users == ["10001:10001"]
    for stage in others:
        assert stage[0][1].split()[0] == "cpu" and not any(word == "USER" for word, _ in stage)
    assert "PYTHONSAFEPATH=1" in dict(cpu)["ENV"] and "RAY_AUTH_MODE=token" in dict(cpu)["ENV"]
    installs = [rest for word, rest in build if word == "RUN" and "pip install" in rest]
    assert len(installs) == 2 and all("-c /src/constraints.txt" in install for install in installs)
    assert not re.search(r"(?i)(token|secret|password|key)=(?!token\b)", (DEPLOY / "Dockerfile").read_text())


def test_the_image_gets_all_packages_and_no_more() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[0] == "*"
    kept = {line[1:] for line in lines if line.startswith("!")}
    folders = {link.resolve().name for link in (ROOT / "src" / "penstock").iterdir() if link.is_symlink()}
    assert {"src", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} | folders == kept
    assert all((ROOT / name).exists() for name in kept)


def test_examples_name_the_versions_of_this_checkout() -> None:
    ray = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert ray is not None
    for name in ("rayjob.yaml", "raycluster.yaml"):
        text = (DEPLOY / name).read_text()
        assert set(re.findall(r"rayVersion: (\S+)", text)) == {ray[1]}
        assert set(re.findall(r"image: penstock:(\d[\d.]*\d)", text)) == {__version__}
    assert f"image: penstock:{__version__}\n" in (DEPLOY / "ray-up.yaml").read_text()


def test_ray_up_is_valid_and_keeps_the_dashboard_to_itself() -> None:
    spec = util.find_spec("ray")
    assert spec is not None and spec.origin is not None
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    config = yaml.safe_load((DEPLOY / "ray-up.yaml").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError, match="head_start_ray_command"):
        jsonschema.validate(config | {"head_start_ray_command": []}, schema)
    starts = [shlex.split(line) for line in config["head_start_ray_commands"] if "--head" in line]
    assert len(starts) == 1 and "--dashboard-host=127.0.0.1" in starts[0]
    options = config["docker"]["run_options"]
    assert {"--cap-drop=ALL", "--security-opt=no-new-privileges", "--env=RAY_AUTH_MODE=token"} <= set(options)
    assert not any("privileged" in option and "no-new" not in option for option in options)
    token = next(option.rsplit("=", 1)[1] for option in options if "RAY_AUTH_TOKEN_PATH" in option)
    assert token in config["file_mounts"]


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("run*.yaml")), ids=lambda path: path.name)
def test_example_configurations_load(path: Path) -> None:
    load_config(path)


def strings(node: ast.AST) -> list[str]:
    """The texts of a list that is written as literals; 0 for variables and templates, which may stand for numbers."""
    if isinstance(node, ast.BinOp):
        return strings(node.left) + strings(node.right)
    if isinstance(node, ast.List):
        texts = [item.value if isinstance(item, ast.Constant) else "0" for item in node.elts]
        return ["0" if text.startswith("{{") else text for text in texts if isinstance(text, str)]
    return []


def commands(path: Path) -> list[list[str]]:
    """The `penstock` commands that an example is made of: a command and its arguments, or one list."""
    found: list[list[str]] = []
    tree = ast.parse(path.read_text(), str(path))
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        values: dict[str | None, list[str]] = {keyword.arg: strings(keyword.value) for keyword in call.keywords}
        words = [*values.get("command", values.get("cmds", [])), *values.get("args", values.get("arguments", []))]
        if words[:1] == ["sh"]:
            words = [found if found[0] != "$" else "0" for found in shlex.split(words[2])]
        if words[:1] == ["penstock"]:
            found.append(words[1:])
    written: list[str] = []
    for statement in ast.walk(tree):
        if isinstance(statement, ast.Assign | ast.AugAssign) and strings(statement.value):
            written += strings(statement.value)
    return found + ([written[1:]] if written[:1] == ["penstock"] else [])


@pytest.mark.parametrize("path", sorted(PIPELINES.glob("*.py")), ids=lambda path: path.name)
def test_pipeline_steps_are_commands_that_exist(path: Path) -> None:
    found = commands(path)
    assert any(words[0] == "train" for words in found)
    for words in found:
        # parsing binds every flag and converts every value, and runs nothing
        function, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
        assert function.__name__ == words[0]
        options = bound.arguments.get("options")
        if words[0] == "train":
            assert options is not None and options.run_dir and options.stage_dir


def test_a_flag_that_does_not_exist_is_found() -> None:
    with pytest.raises(Exception, match="--result-jsn"):
        app.parse_args(["train", "g", "--result-jsn", "x"], exit_on_error=False, print_error=False)


def test_airflow_and_flyte_find_the_result_where_they_look() -> None:
    where = {"airflow_dag.py": "/airflow/xcom/return.json", "flyte.py": "/var/outputs/result"}
    for name, place in where.items():
        words = next(words for words in commands(PIPELINES / name) if words[0] == "train")
        assert words[words.index("--result-json") + 1] == place


def test_the_ray_extra_can_submit_jobs() -> None:
    extra = [text for text in metadata.requires("ray") or () if 'extra == "default"' in text]
    assert any(text.startswith("aiohttp") for text in extra)
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^ray = \["ray\[default\]', text, re.MULTILINE)


def secret_like(value: Any) -> bool:
    return bool(re.search(r"(?i)(password|secret_?key|access_?key)\s*[:=]\s*\S", str(value)))


@pytest.mark.parametrize("path", sorted(p for p in (*DEPLOY.iterdir(), *PIPELINES.iterdir()) if p.is_file()))
def test_examples_hold_no_secret(path: Path) -> None:
    assert not secret_like(path.read_text())
