"""What the verbs do that run something elsewhere: submit a run to a Ray cluster, print manifests for Kubernetes."""

import calendar
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import fsspec
import xxhash
import yaml

from penstock import __version__
from penstock.config import RunConfig
from penstock.exit_codes import INTERNAL, INTERRUPTED, OK, RETRY
from penstock.identity import Trained, has_all_epochs, require_same, settle
from penstock.kubernetes import cautions, render
from penstock.launch_options import KubernetesOptions, SubmitOptions
from penstock.locations import experiment_place, require_writable
from penstock.portable import portable_config, spans_ray
from penstock.report import copy_result
from penstock.storage.errors import MissingDependency
from penstock.storage.extras import install_command
from penstock.storage.graph import GraphMeta, GraphStore, open_graph
from penstock.storage.manifest import write_json
from penstock.storage.redaction import redact_text
from penstock.storage.remote.files import open_remote
from penstock.storage.remote.stage import read_remote_manifest

if TYPE_CHECKING:
    from penstock.cluster.jobs import Job, Jobs

_CONFIG_NAME = "penstock.yaml"
_PROCESS_BYTES = 768 << 20  # of the driver beside its budget, as of ranks
How = Literal["resume", "if_changed", "force"]
_FLAGS: dict[How, str] = {"resume": "", "if_changed": " --if-changed", "force": " --force"}
Say = Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """How a submission ended; `--json` prints it."""

    submission_id: str
    status: str
    exit_code: int
    already_done: bool
    attached: bool
    address: str
    result: str


def run_submit(config: RunConfig, options: SubmitOptions, *, how: How, copy: Path | str | None, quiet: bool) -> int:
    """`penstock submit`; returns the exit code of the run."""
    if copy is not None:
        require_writable(copy)
    value = portable_config(config)
    if spans_ray(config) and config.cluster.address is None:
        value["cluster"]["address"] = "auto"
    try:
        from penstock.cluster.jobs import open_jobs  # no other verb needs Ray's client
    except ImportError as error:
        raise MissingDependency(
            f"penstock submit needs Ray's job client ({error}); {install_command('ray')}"
        ) from error

    def say(text: str) -> None:
        if not quiet:
            print(text, end="", flush=True, file=sys.stderr if options.json else sys.stdout)

    if copy is not None and not options.wait:
        raise ValueError(f"--result-json {copy} with --no-wait: there is no result yet; leave one of them out")
    jobs = open_jobs(options.address)
    try:
        submitted = _submit(jobs, value, wait=options.wait, how=how, say=say)
    except ConnectionError as error:  # what became of the run, the same command will find out
        print(f"penstock: {redact_text(str(error))}; run the same command again", file=sys.stderr)
        return RETRY
    if copy is not None:
        _copy_result(submitted, copy)
    if options.json:
        print(json.dumps(asdict(submitted)))
    return submitted.exit_code


def submission_id(config: RunConfig) -> str:
    """The same for the same run: of what decides its weights, as far as it is configured, and of its folder."""
    dataset = config.remote.dataset or str(config.dataset)
    place = f"{config.results_place.rstrip('/')} {dataset.rstrip('/')} {config.train.epochs}"
    return f"penstock-{config.digest()}-{xxhash.xxh3_64_hexdigest(place.encode())[:8]}"


def is_done(config: RunConfig) -> bool:
    """Whether the run folder, as far as it can be read from here, has the result of this very run.

    Where it cannot, or is gone, the job is submitted again: whoever can read it says at once what is done.
    """
    value = _read_result(f"{config.results_place}/result.json")
    if value is None or value.get("status") != "ok":
        return False
    try:
        trained = Trained(keys=value["identity"], epochs=value["metrics"]["epochs"], result=value)
        config = settle(config, trained)
        require_same(config, _graph_of(config), trained)
    except (ValueError, KeyError, OSError):
        return False
    return has_all_epochs(config, trained)


def _graph_of(config: RunConfig) -> GraphStore:
    """The graph, of which no more is read than its manifest."""
    if config.remote.dataset is None:
        return open_graph(config.dataset)
    _, manifest = read_remote_manifest(open_remote(config.remote.dataset))
    return GraphStore(config.dataset, manifest, GraphMeta(**manifest.meta))


def _submit(jobs: "Jobs", value: dict[str, Any], *, wait: bool, how: How, say: Say) -> Submitted:
    job, is_new = _find_or_submit(jobs, value, how)
    result = f"{experiment_place(value['run_dir'], value['experiment']).rstrip('/')}/result.json"
    status, code, already_done = job.status, OK, job.succeeded and not is_new
    if already_done:
        say(f"{job.id}: already done; the result is in {result}\n")
    elif not wait:
        say(f"{job.id}: {status.lower()} at {jobs.address}; to stop it: {_stop_command(jobs, job)}\n")
    else:
        say(f"{job.id}: {'submitted' if is_new else 'runs already'} at {jobs.address}; its log follows\n")
        status, code = _follow(jobs, job, result, say)
        say(f"{job.id}: {status.lower()}, exit code {code}{'' if code else f'; the result is in {result}'}\n")
    return Submitted(
        submission_id=job.id,
        status=status,
        exit_code=code,
        already_done=already_done,
        attached=not is_new,
        address=jobs.address,
        result=result,
    )


def _find_or_submit(jobs: "Jobs", value: dict[str, Any], how: How) -> tuple["Job", bool]:
    """The job of this run that runs or has succeeded, else a new one, and whether it is new."""
    config = RunConfig.model_validate(value)
    base = submission_id(config)
    while True:
        attempts = jobs.attempts(base)
        last = attempts[-1] if attempts else None
        if last is not None and how == "force" and not last.is_over:
            raise ValueError(
                f"{last.id} is {last.status.lower()}, and --force would delete its files; "
                f"stop it first: {_stop_command(jobs, last)}"
            )
        if last is not None and how != "force" and (is_done(config) if last.succeeded else not last.is_over):
            return last, False
        number = 1 if last is None else int(last.id[len(base) + 2 :] or 1) + 1
        job_id = base if number == 1 else f"{base}-r{number}"
        if _submit_new(jobs, job_id, config, value, how):
            return jobs.find(job_id), True
        how = "resume"  # another process was first: what it submitted is what we want


def _submit_new(jobs: "Jobs", job_id: str, config: RunConfig, value: dict[str, Any], how: How) -> bool:
    """Submit a job that has nothing but the configuration; a run of one process gets its cores and GPU from Ray."""
    is_alone = not spans_ray(config)
    command = f"python -m penstock train -c {_CONFIG_NAME}{_FLAGS[how]}"
    with tempfile.TemporaryDirectory(prefix="penstock-submit-") as folder:
        (Path(folder) / _CONFIG_NAME).write_text(yaml.safe_dump(value, sort_keys=False))
        return jobs.submit(
            job_id,
            command,
            Path(folder),
            num_cpus=(config.train.threads or 1) if is_alone else 0,
            num_gpus=1 if is_alone and config.train.device.startswith("cuda") else 0,
            memory_bytes=(config.budgets.host_memory or 0) + _PROCESS_BYTES if is_alone else 0,
            metadata={"penstock": __version__, "config": config.digest(), "run_dir": value["run_dir"]},
        )


def _follow(jobs: "Jobs", job: "Job", result: str, say: Say) -> tuple[str, int]:
    """Show a job's log until it ends; its status and exit code."""
    try:
        job = jobs.follow(job.id, say)
    except KeyboardInterrupt:
        print(f"penstock: the job goes on; to stop it: {_stop_command(jobs, job)}", file=sys.stderr)
        return "RUNNING", INTERRUPTED
    if job.exit_code is None and not job.succeeded and job.message:
        print(f"penstock: {redact_text(job.message.splitlines()[-1])}", file=sys.stderr)
    return job.status, job_exit_code(job, result)


def job_exit_code(job: "Job", result: str) -> int:
    """The exit code of a job that is over: the driver's, else what `result.json` says, else 1."""
    if job.succeeded:
        return OK
    if job.exit_code is not None:
        return job.exit_code or INTERNAL
    found = _read_result(result)
    if found is None or _finished_at(found) < job.started_at - 1.0:  # an earlier attempt's, to the second
        return INTERNAL
    return RETRY if found["status"] == "stopped" else int((found.get("error") or {}).get("exit_code", INTERNAL))


def _read_result(result: str) -> dict[str, Any] | None:
    """`result.json` at a path or URI; None where it cannot be read from here."""
    try:
        with fsspec.open(result) as file:
            value: dict[str, Any] = json.load(file)
    except (OSError, ImportError, ValueError):
        return None
    return value


def _finished_at(result: dict[str, Any]) -> float:
    try:
        return float(calendar.timegm(time.strptime(result["finished_at"], "%Y-%m-%dT%H:%M:%SZ")))
    except (KeyError, ValueError):
        return 0.0


def _copy_result(submitted: Submitted, copy: Path | str) -> None:
    """Copy `result.json`, with how it was submitted; ValueError where a run that went well has none to be read here."""
    value = _read_result(submitted.result)
    if value is None:
        if submitted.exit_code == OK:
            raise ValueError(f"{submitted.result} cannot be read from here; give --run-dir a URI that can")
        value = {"status": "failed", "error": {"exit_code": submitted.exit_code}}
    with tempfile.TemporaryDirectory(prefix="penstock-submit-") as folder:
        path = Path(folder) / "result.json"
        write_json(path, value | {"submission": asdict(submitted)})
        copy_result(path, copy)


def _stop_command(jobs: "Jobs", job: "Job") -> str:
    return f"ray job stop {job.id} --address {jobs.address}"


def run_render(config: RunConfig, options: KubernetesOptions) -> None:
    """`penstock k8s render`: manifests on stdout, cautions on stderr."""
    text = render(config, options)
    for caution in cautions(config, options):
        print(f"penstock: {caution}", file=sys.stderr)
    print(text, end="")
