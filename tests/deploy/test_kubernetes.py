import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.__main__ import main
from penstock.config import load_config
from penstock.kubernetes import cautions, render
from penstock.launch_options import KubernetesOptions

Json = dict[str, Any]
DEPLOY = Path(__file__).parents[2] / "deploy"
FLAGS = {"dataset": "s3://graphs/papers", "run_dir": "s3://runs/papers"}
SHARED = {"dataset": "/runs/papers.graph", "run_dir": "/runs/deep"}


def rendered(options: KubernetesOptions | None = None, **flags: Any) -> dict[str, Json]:
    config = load_config(flags={**FLAGS, **{key.replace("__", "."): value for key, value in flags.items()}})
    return {found["kind"]: found for found in yaml.safe_load_all(render(config, options or KubernetesOptions()))}


def pod_templates(value: Any) -> Iterator[Json]:
    if isinstance(value, dict):
        if "containers" in value.get("spec", {}):
            yield value
        for item in value.values():
            yield from pod_templates(item)
    elif isinstance(value, list):
        for item in value:
            yield from pod_templates(item)


def documents() -> dict[str, list[Json]]:
    return {
        "rayjob.yaml": list(yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text())),
        "raycluster.yaml": list(yaml.safe_load_all((DEPLOY / "raycluster.yaml").read_text())),
        "job": list(rendered().values()),
        "feeders": list(rendered(cluster__feeders=2, cluster__replicas=2).values()),
    }


def test_the_example_is_what_render_prints(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["k8s", "render", "-c", str(DEPLOY / "run-cluster.yaml"), "--ray-version", "2.60.0"])
    said = capsys.readouterr()
    assert ended.value.code == 0
    assert said.out == (DEPLOY / "rayjob.yaml").read_text()
    assert "is in no registry" in said.err


@pytest.mark.parametrize(
    "options",
    [
        KubernetesOptions(),
        KubernetesOptions(storage_class="local-nvme", gpus=2, volume=["data:/data:ro"], env_secret="s3", name="n"),
        KubernetesOptions(service_account="trainer", auth_secret="token", namespace="ml", workers=3, memory="10GiB"),
    ],
)
def test_rayjobs_are_valid(options: KubernetesOptions, validate: Callable[[str, Json], list[str]]) -> None:
    wide = {"cluster__replicas": 3, "cluster__feeders": 2}
    assert validate("RayJob", rendered(options, **wide)["RayJob"]) == []
    shared = replace(options, volume=[*options.volume, "runs:/runs"])
    assert validate("RayJob", rendered(shared, **SHARED, mode="chunked", chunked__backend="ray")["RayJob"]) == []


def test_example_files_are_valid(validate: Callable[[str, Json], list[str]]) -> None:
    files = documents()
    assert validate("RayJob", files["rayjob.yaml"][1]) == []
    assert validate("RayCluster", files["raycluster.yaml"][0]) == []


def _misspell(job: Json) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["volumeMount"] = []


def _mistype(job: Json) -> None:
    job["spec"]["backoffLimit"] = "2"


def _forget(job: Json) -> None:
    del job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["groupName"]


def _invent(job: Json) -> None:
    job["spec"]["rayClusterSpec"]["authOptions"]["mode"] = "password"


def _nest(job: Json) -> None:
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["securityContext"]["privileged"] = False


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_misspell, "volumeMount: unknown field"),
        (_mistype, "'2' is no integer"),
        (_forget, "groupName is missing"),
        (_invent, "'password' is none of"),
        (_nest, "privileged: unknown field"),
    ],
)
def test_the_check_can_fail(
    harm: Callable[[Json], None], said: str, validate: Callable[[str, Json], list[str]]
) -> None:
    job = copy.deepcopy(documents()["rayjob.yaml"][1])
    harm(job)
    (found,) = validate("RayJob", job)
    assert said in found


@pytest.mark.parametrize("name", documents())
def test_pods_have_no_privileges(name: str) -> None:
    pods = [pod for document in documents()[name] for pod in pod_templates(document)]
    assert pods
    for pod in pods:
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert spec["terminationGracePeriodSeconds"] >= 60
        mounted = {mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
        for container in spec["containers"]:
            confined = container["securityContext"]
            assert confined["allowPrivilegeEscalation"] is False and confined["readOnlyRootFilesystem"] is True
            assert confined["capabilities"] == {"drop": ["ALL"]} and "privileged" not in confined
            assert not any("hostPath" in volume for volume in spec["volumes"])
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycluster.yaml"])
def test_ray_wants_a_token_and_nobody_else_reaches_it(name: str) -> None:
    found = {document["kind"]: document for document in documents()[name]}
    spec = found["RayCluster"]["spec"] if "RayCluster" in found else found["RayJob"]["spec"]["rayClusterSpec"]
    assert spec["authOptions"]["mode"] == "token"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    policy = found["NetworkPolicy"]["spec"]
    for document in found.values():
        for pod in pod_templates(document):
            assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    allowed = [rule for rule in policy["ingress"] if {"podSelector": policy["podSelector"]} not in rule["from"]]
    assert [port["port"] for rule in allowed for port in rule["ports"]] == [8265, 8080]


def test_sizes_follow_the_configuration() -> None:
    found = rendered(
        KubernetesOptions(storage_class="nvme"),
        cluster__replicas=3,
        cluster__feeders=2,
        cluster__feeder_threads=5,
        train__threads=6,
        train__device="cuda",
        budgets__host_memory="40GiB",
        budgets__disk="80GiB",
    )["RayJob"]["spec"]["rayClusterSpec"]
    head, (workers, feeders) = found["headGroupSpec"], found["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (3, 3, 3)
    assert (feeders["replicas"], feeders["resources"]) == (2, {"feeder": "1"})
    limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in (head, workers, feeders)]
    assert [found["cpu"] for found in limits] == ["6", "6", "5"]
    assert [found["memory"] for found in limits] == ["8Gi", "52Gi", "26Gi"]
    assert [found.get("nvidia.com/gpu") for found in limits] == [None, "1", None]
    assert head["rayStartParams"]["num-cpus"] == "0"
    scratch = next(volume for volume in workers["template"]["spec"]["volumes"] if volume["name"] == "scratch")
    claim = scratch["ephemeral"]["volumeClaimTemplate"]["spec"]
    assert claim["resources"]["requests"]["storage"] == "100Gi" and claim["storageClassName"] == "nvme"


def test_a_pod_is_as_large_as_its_run_was_planned(tmp_path: Path) -> None:
    memory = {"predicted_peak_bytes": 700 * 1024**2 - 5, "phase": "train", "components": {}, "phases": {}}
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "plan.json").write_text(json.dumps({"memory": memory}))
    (tmp_path / "machine.json").write_text(json.dumps({"budgets": {"host_bytes": 256 * 1024**2}, "disk_rates": {}}))

    def limit(**flags: Any) -> int:
        flags = {"run_dir": str(tmp_path), "dataset": str(tmp_path / "graph"), "train__device": "cpu", **flags}
        job = rendered(KubernetesOptions(kind="job", volume=[f"runs:{tmp_path}"]), **flags)["Job"]
        found = job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
        return int(normal(found)["memory"])

    assert limit(budgets__host_memory="256MiB") == 700
    assert limit(budgets__host_memory="512MiB") == 512 + 128 + 2048  # another run than was planned
    assert limit(budgets__host_memory="256MiB", train__device="cuda") == 256 + 64 + 2048


@pytest.mark.parametrize(
    ("options", "times"),
    [
        (KubernetesOptions(kind="job"), 3),
        (KubernetesOptions(kind="rayjob"), 1),
        (KubernetesOptions(kind="rayjob", workers=2), 2),
    ],
)
def test_a_pod_has_what_all_its_replicas_need(options: KubernetesOptions, times: int) -> None:
    sizes = {"train__threads": 2, "train__device": "cuda", "budgets__host_memory": "8GiB", "budgets__disk": "40GiB"}
    found = rendered(options, cluster__replicas=3, **sizes)
    if "Job" in found:
        pod = found["Job"]["spec"]["template"]["spec"]
    else:
        pod = found["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {
        "cpu": str(2 * times),
        "memory": f"{12 * times}Gi",
        "nvidia.com/gpu": "1" if options.kind == "job" else str(times),
    }
    assert pod["containers"][0]["resources"]["requests"]["ephemeral-storage"] == f"{50 * times}Gi"


@pytest.mark.parametrize(
    ("replicas", "stages", "parts", "devices", "pods"), [(1, 4, 2, None, 8), (1, 1, 1, 6, 6), (2, 3, 1, None, 6)]
)
def test_full_graph_ranks_have_a_pod_each(
    replicas: int, stages: int, parts: int, devices: int | None, pods: int
) -> None:
    flags: dict[str, Any] = {"chunked__stages": stages, "chunked__parts": parts, "chunked__devices": devices}
    flags["cluster__replicas"] = replicas
    flags |= {"budgets__host_memory": "48GiB", "train__threads": 16, "train__device": "cuda", **SHARED}
    options = KubernetesOptions(volume=["runs:/runs"])
    cluster = rendered(options, mode="chunked", chunked__backend="ray", model__num_layers=8, **flags)["RayJob"]["spec"][
        "rayClusterSpec"
    ]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == pods
    limits = [pod["spec"]["containers"][0]["resources"]["limits"] for pod in pod_templates(cluster)]
    share = {"cpu": str(16 // pods), "memory": f"{60 * 1024 // pods + 2048}Mi", "nvidia.com/gpu": "1"}
    whole = {"cpu": str(16 // pods), "memory": "62Gi"}  # the driver, which cuts the graph with all of the budget
    assert [normal(found) for found in limits] == [normal(whole), normal(share)]


def normal(limits: Json) -> Json:
    memory = limits["memory"]
    return limits | {"memory": int(memory[:-2]) * (1024 if memory.endswith("Gi") else 1)}


@pytest.mark.parametrize(("gpus", "workers", "wanted"), [(None, 2, "2"), (0.5, 2, "1"), (0.25, None, "1")])
def test_pods_have_the_gpus_that_ray_is_asked_for(gpus: float | None, workers: int | None, wanted: str) -> None:
    flags = {"cluster__replicas": 4, "cluster__address": "auto", "cluster__gpus_per_replica": gpus}
    found = rendered(KubernetesOptions(workers=workers), train__device="cuda", **flags)["RayJob"]
    pod = found["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    assert pod["resources"]["limits"]["nvidia.com/gpu"] == wanted


def test_gpus_that_nobody_uses_are_refused() -> None:
    with pytest.raises(ValueError, match="cluster.gpus_per_replica=0.5 has no effect here"):
        rendered(cluster__replicas=2, cluster__address="auto", cluster__gpus_per_replica=0.5)
    with pytest.raises(ValueError, match="cluster.gpus_per_replica=1.0 has no effect here"):
        rendered(cluster__replicas=2, train__device="cuda", cluster__gpus_per_replica=1)


def test_ranks_that_share_no_files_are_refused() -> None:
    flags: dict[str, Any] = {"mode": "chunked", "chunked__backend": "ray"}
    with pytest.raises(
        ValueError, match="dataset=s3://graphs/papers, run_dir=s3://runs/papers with mode=chunked: .*--volume"
    ):
        rendered(**flags)
    with pytest.raises(ValueError, match="^dataset=s3://graphs/papers with mode=chunked"):
        rendered(KubernetesOptions(volume=["runs:/runs"]), **flags, run_dir="/runs/deep")
    assert "RayJob" in rendered(KubernetesOptions(volume=["runs:/runs"]), **flags, **SHARED)
    with pytest.raises(ValueError, match="run_dir=/runs/deep is on runs:/runs:ro; mount it without `:ro`"):
        rendered(KubernetesOptions(volume=["runs:/runs:ro"]), **flags, **SHARED)
    assert "Job" in rendered(mode="chunked", chunked__backend="processes", chunked__stages=2)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("s3://a/daily", "s3://b/daily"),
        ("s3://a/x/daily", "s3://a/y/daily"),
        ("/runs/Daily!", "/runs/daily?"),
        ("s3://a/" + "long-" * 30 + "1", "s3://a/" + "long-" * 30 + "2"),
        ("/runs/тест", "/runs/запуск"),
        ("/runs/123", "/runs/-123-"),
    ],
)
def test_runs_of_one_name_have_manifests_of_two(one: str, other: str) -> None:
    names = []
    for run in (one, other, other):
        found = rendered(KubernetesOptions(allow_unmounted=True), run_dir=run, cluster__replicas=2)
        assert {document["metadata"]["name"].removesuffix("-config") for document in found.values()} == {
            name := found["RayJob"]["metadata"]["name"]
        }
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= 47  # DNS, and KubeRay's limit
        names.append(name)
    assert names[0] != names[1] == names[2]


def test_experiments_of_a_run_are_two_jobs() -> None:
    names = [rendered(experiment=name)["Job"]["metadata"]["name"] for name in (None, "wide", "deep")]
    assert len(set(names)) == 3
    found = yaml.safe_load(rendered(experiment="wide")["ConfigMap"]["data"]["run.yaml"])
    assert found["experiment"] == "wide" and found["run_dir"] == FLAGS["run_dir"]


def test_the_example_fits_the_cluster_that_it_names() -> None:
    text = (DEPLOY / "run-cluster.yaml").read_text()
    assert "four nodes with a GPU and one without, of\n# 16 cores, 64 GiB and 900 GiB" in text
    spec = documents()["rayjob.yaml"][1]["spec"]["rayClusterSpec"]
    pods = [(spec["headGroupSpec"]["template"], 1)]
    pods += [(group["template"], group["replicas"]) for group in spec["workerGroupSpecs"]]
    wanted = [needs(pod) for pod, count in pods for _ in range(count)]
    free = [{"cpu": 15.0, "memory": 58.0, "disk": 850.0, "gpu": float(n < 4)} for n in range(5)]  # less the system's
    for need in sorted(wanted, key=lambda need: (-need["gpu"], -need["memory"])):
        rooms = [node for node in free if all(node[name] >= amount for name, amount in need.items())]
        assert rooms, (need, free)
        room = min(rooms, key=lambda node: node["gpu"])
        room.update({name: room[name] - amount for name, amount in need.items()})


def needs(pod: Json) -> dict[str, float]:
    found = pod["spec"]["containers"][0]["resources"]["requests"]
    memory, disk = (int(found[name].removesuffix("Gi")) for name in ("memory", "ephemeral-storage"))
    return {"cpu": float(found["cpu"]), "memory": memory, "disk": disk, "gpu": float(found.get("nvidia.com/gpu", 0))}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--force"], "--force"),
        (["--result-json", "r.json"], "--result-json"),
        (["--quiet"], "--quiet"),
        (["--workers", "2"], "--workers: of no effect in a Job"),
        (["--auth-secret", "t", "--ray-version", "2.60.0"], "--ray-version, --auth-secret: of no effect in a Job"),
    ],
)
def test_options_without_effect_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["k8s", "render", "s3://graphs/papers", "--run-dir", "s3://runs/papers", *words])
    told = capsys.readouterr()
    assert ended.value.code == 2 and said in told.err and told.out == ""


def test_a_result_is_not_copied_before_there_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["submit", "g", "--run-dir", "r", "--no-wait", "--result-json", "r.json", "--address", "127.0.0.1:1"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and "--result-json r.json with --no-wait" in capsys.readouterr().err


def test_the_mounted_configuration_is_the_same_run(tmp_path: Path) -> None:
    flags = {"cluster.replicas": 2, "cluster.feeders": 1, "train.lr": 0.125, "budgets.host_memory": "3GiB", **FLAGS}
    config = load_config(flags=flags)
    config_map = next(yaml.safe_load_all(render(config, KubernetesOptions())))
    (tmp_path / "run.yaml").write_text(config_map["data"]["run.yaml"])
    mounted = load_config(tmp_path / "run.yaml")
    assert mounted.digest() == config.digest()
    assert (mounted.remote.dataset, mounted.remote.run_dir) == (FLAGS["dataset"], FLAGS["run_dir"])
    assert mounted.remote.stage_dir == Path("/scratch")
    assert mounted.cluster.address == "auto" and mounted.cluster.feeder_resources == {"feeder": 1.0}


# What the RayJob's schema does not embed of batch/v1, by hand.
JOB_FIELDS = {"backoffLimit", "completions", "parallelism", "ttlSecondsAfterFinished", "podFailurePolicy", "template"}


def test_a_run_of_one_machine_is_a_job(validate_pod: Callable[[Json], list[str]]) -> None:
    found = rendered(KubernetesOptions(image="registry/penstock:1"))
    assert set(found) == {"ConfigMap", "Job"}
    job = found["Job"]
    assert (job["apiVersion"], set(job["spec"])) == ("batch/v1", JOB_FIELDS)
    template = job["spec"]["template"]
    assert validate_pod(template) == []
    assert template["spec"]["restartPolicy"] == "Never"  # a pod failure policy wants it
    container = template["spec"]["containers"][0]
    assert [*container["command"], *container["args"]] == ["penstock", "train", "-c", "/etc/penstock/run.yaml"]
    rules = job["spec"]["podFailurePolicy"]["rules"]
    actions = {code: rule["action"] for rule in rules for code in rule.get("onExitCodes", {}).get("values", ())}
    assert actions == {2: "FailJob", 3: "FailJob", 4: "FailJob", 5: "FailJob", 75: "Ignore"}
    for rule in rules:
        (kind,) = set(rule) - {"action"}
        if kind == "onExitCodes":
            assert set(rule[kind]) == {"containerName", "operator", "values"}
            assert rule[kind]["operator"] == "In" and rule[kind]["containerName"] == container["name"]
            assert rule[kind]["values"] == sorted(set(rule[kind]["values"]))
        else:
            assert rule == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def test_the_kind_follows_the_run() -> None:
    assert "RayJob" in rendered(cluster__replicas=2)
    assert "RayJob" in rendered(cluster__address="auto")
    assert "RayJob" in rendered(KubernetesOptions(kind="rayjob"))
    assert "Job" in rendered(KubernetesOptions(kind="job"), cluster__replicas=2)  # replicas as processes of one pod
    with pytest.raises(ValueError, match="one pod without a cluster"):
        rendered(KubernetesOptions(kind="job"), cluster__replicas=2, cluster__feeders=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (KubernetesOptions(name="Papers"), "--name 'Papers'"),
        (KubernetesOptions(name="p" * 48), "at most 47"),
        (KubernetesOptions(volume=["data"]), "claim:/path"),
        (KubernetesOptions(memory="much"), "'much' is not a size"),
    ],
)
def test_wrong_options_are_refused(options: KubernetesOptions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rendered(options)


def test_secrets_are_refused_and_the_environment_stays_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2-hunter2")
    config = load_config(flags={**FLAGS, "cluster.replicas": 2})
    assert "hunter2" not in render(config, KubernetesOptions(env_secret="s3"))
    with pytest.raises(ValueError, match="what looks like a secret under model.kwargs.api_token"):
        rendered(model__kind="custom", model__module="m:M", model__kwargs={"api_token": "hunter2-hunter2"})


def test_folders_that_pods_do_not_have_are_told() -> None:
    config = load_config(flags={"dataset": "/data/papers.graph", "run_dir": "/home/me/run"})
    dataset, run_dir, image = cautions(config, KubernetesOptions())
    assert "/data/papers.graph is on no mounted volume" in dataset and "is not in the pods" in dataset
    assert "/home/me/run is on no mounted volume" in run_dir and "is lost with its pod" in run_dir
    assert "penstock:" in image
    mounted = KubernetesOptions(volume=["data:/data:ro", "runs:/home/me"], image="r/p:1")
    assert cautions(config, mounted) == []


def test_errors_reach_the_command_line_as_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["k8s", "render", "g", "--run-dir", "r", "--name", "Bad_Name"])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and "--name 'Bad_Name'" in said.err


def test_documents_have_no_aliases() -> None:
    text = render(load_config(flags={**FLAGS, "cluster.replicas": 2}), KubernetesOptions())
    assert "*id" not in text and "&id" not in text
    assert json.loads(json.dumps(list(yaml.safe_load_all(text))))[1]["apiVersion"] == "ray.io/v1"


def test_paths_that_no_pod_has_are_refused_unless_told_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["k8s", "render", "/data/papers.graph", "--run-dir", "/data/runs/papers"]
    codes = []
    for more in ([], ["--volume", "data:/data"], ["--allow-unmounted"], ["--volume", "data:/data/runs"]):
        with pytest.raises(SystemExit) as ended:
            main([*words, *more])
        codes.append(int(ended.value.code or 0))
        said = capsys.readouterr()
        assert ("is not in the pods" in said.err) == ("data:/data" not in more) and bool(said.out) == (codes[-1] == 0)
    assert codes == [2, 0, 0, 2]
