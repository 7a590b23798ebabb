"""Runs as jobs of a Ray cluster, through the Ray Jobs API: submitted once, followed, and asked how they ended.

A job's id is made of what decides its outcome, so that the same command finds the same job again. Ray forgets nothing
of a job but with its cluster, and takes no id twice: a job that failed is submitted again as `...-r2`, `...-r3`.
"""

import asyncio
import logging
import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

logger = logging.getLogger(__name__)

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_CONNECT_S = 8.0  # for a connection, and for the first answers
_REQUEST_S = 60.0  # for an answer: a busy dashboard takes many seconds to start a job
_LOST_S = 60.0  # for how long the dashboard may be silent before the cluster counts as lost
_CHECK_S = 3.0  # between looks at a job that logs nothing
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_END = "\0"  # no log has a line of it
_SIGNALLED = 128  # a shell's exit code for a process that a signal ended, less the signal


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as the cluster tells it. `exit_code` is the driver's, None where Ray does not know it."""

    id: str
    status: str
    message: str
    exit_code: int | None
    started_at: float

    @property
    def is_over(self) -> bool:
        """Whether it has ended, well or not."""
        return JobStatus(self.status).is_terminal()

    @property
    def succeeded(self) -> bool:
        """Whether it has ended with exit code 0."""
        return self.status == "SUCCEEDED"


class _Client(JobSubmissionClient):
    """Ray's client, with an end to every request: its own waits forever for a cluster that went away silently."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        timeout = (_CONNECT_S, _CONNECT_S if endpoint == "/api/version" else _REQUEST_S)
        try:
            return super()._do_request(method, endpoint, timeout=timeout, **options)
        except requests.RequestException as error:
            raise ConnectionError(f"the dashboard at {self.get_address()} does not answer: {error}") from error


class Jobs:
    """The jobs of one cluster; made by `open_jobs`."""

    def __init__(self, client: JobSubmissionClient, address: str) -> None:
        self._client, self.address = client, address

    def attempts(self, base: str) -> list[Job]:
        """Jobs of a run, in the order they were submitted: `base`, `base-r2`, ..."""
        found = {}
        for info in self._client.list_jobs():
            match = re.fullmatch(rf"{re.escape(base)}(?:-r(\d+))?", info.submission_id or "")
            if match:
                found[int(match[1] or 1)] = _job(info)
        return [found[number] for number in sorted(found)]

    def find(self, job_id: str) -> Job:
        """How a job is now."""
        return _job(self._client.get_job_info(job_id))

    def submit(
        self,
        job_id: str,
        entrypoint: str,
        folder: Path,
        *,
        num_cpus: float = 0,
        num_gpus: float = 0,
        memory_bytes: int = 0,
        metadata: dict[str, str] | None = None,
    ) -> bool:
        """Submit a job that works in a copy of `folder`; False where another process was first with this id.

        ConnectionError where the cluster takes none, as in its first seconds.
        No environment variable of this process goes with it, so no secret does.
        """
        environment = {"working_dir": str(folder), "env_vars": {"PYTHONSAFEPATH": "1"}}
        try:
            self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=job_id,
                runtime_env=environment,
                metadata=metadata,
                entrypoint_num_cpus=num_cpus,
                entrypoint_num_gpus=num_gpus,
                entrypoint_memory=memory_bytes,
            )
        except RuntimeError as error:
            if "No available agent" in str(error):
                raise ConnectionError(
                    f"the cluster at {self.address} takes no job yet: no node's agent has reported to its dashboard; "
                    "where that stays so, another cluster on the node has the port (--dashboard-agent-listen-port)"
                ) from error
            if "already exists" not in str(error):
                raise
            return False
        return True

    def follow(self, job_id: str, write: Callable[[str], object]) -> Job:
        """Hand on a job's log until it is over; ConnectionError where the cluster is silent for a minute.

        The log is read from its beginning, also that of a job that has run for long.
        """
        return asyncio.run(self._follow(job_id, write))

    async def _follow(self, job_id: str, write: Callable[[str], object]) -> Job:
        log = _Log(write)
        heard_at = time.monotonic()
        while True:
            try:
                await self._tail(job_id, log)
                job = await asyncio.to_thread(self.find, job_id)
            except (OSError, ClientError, RuntimeError) as error:
                silent_s = time.monotonic() - heard_at
                if silent_s > _LOST_S:
                    raise ConnectionError(
                        f"the cluster at {self.address} has not answered for {silent_s:.0f} s ({error}); "
                        f"if it is gone, start it again and submit the same: the run goes on from its newest checkpoint"
                    ) from error
                logger.warning("%s does not answer (%s); trying again", self.address, error)
            else:
                if job.is_over:
                    await self._finish(job_id, log)
                    return job
                heard_at = time.monotonic()
            await asyncio.sleep(1.0)

    async def _finish(self, job_id: str, log: "_Log") -> None:
        """Hand on the last lines: Ray's stream may end with the job and before them."""
        log.rewind()
        with suppress(OSError, RuntimeError):
            log.add(await asyncio.to_thread(self._client.get_job_logs, job_id))

    async def _tail(self, job_id: str, log: "_Log") -> None:
        """Hand on the log until it ends, or until the job has ended and it has not."""
        log.rewind()
        stream = self._client.tail_job_logs(job_id)
        ask = asyncio.ensure_future(anext(stream, _END))
        try:
            while True:
                done, _ = await asyncio.wait({ask}, timeout=_CHECK_S)
                if not done:  # a silent job, or a silent cluster: a websocket does not tell
                    if (await asyncio.to_thread(self.find, job_id)).is_over:
                        return
                    continue
                lines = ask.result()
                if lines == _END:
                    return
                log.add(lines or "")
                ask = asyncio.ensure_future(anext(stream, _END))
        finally:
            ask.cancel()
            await asyncio.gather(ask, return_exceptions=True)
            await stream.aclose()  # type: ignore[attr-defined]  # an async generator, though Ray says iterator


class _Log:
    """Writes a log that is read from its beginning after every new connection, once."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._seen = self._written = 0

    def rewind(self) -> None:
        self._seen = 0

    def add(self, text: str) -> None:
        new = text[max(0, self._written - self._seen) :]
        self._seen += len(text)
        if new:
            self._write(new)
            self._written = self._seen


def open_jobs(address: str | None = None) -> Jobs:
    """Connect to the dashboard of a cluster: `address`, else RAY_API_SERVER_ADDRESS, else this machine's.

    ValueError within 30 s where none answers there, or where it wants another token.
    """
    address = (address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS).rstrip("/")
    parts = urlsplit(address if "://" in address else f"http://{address}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--address {address!r}: write the dashboard's address, like {DEFAULT_ADDRESS}")
    port = parts.port or (443 if parts.scheme == "https" else 8265)
    address = f"{parts.scheme}://{parts.netloc if parts.port else f'{parts.hostname}:{port}'}{parts.path}"
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)  # they set INFO for themselves, and tell of every upload
    try:
        socket.create_connection((parts.hostname, port), timeout=_CONNECT_S).close()
        return Jobs(_Client(address, headers=_token_header()), address)
    except AuthenticationError as error:
        raise ValueError(
            f"the cluster at {address} refuses this token: {' '.join(str(error).split())[:200]}; copy the cluster's "
            "token to ~/.ray/auth_token, or set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        ) from error
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"no Ray dashboard answers at {address} ({error}); start a cluster with `ray start --head`, or give "
            "--address http://HOST:8265 of one (for KubeRay: kubectl port-forward service/NAME-head-svc 8265)"
        ) from error


def _token_header() -> dict[str, str]:
    """The token in the home folder where RAY_AUTH_MODE is not set: `ray start` takes it then, Ray's client does not."""
    path = Path(os.path.expanduser("~")) / ".ray" / "auth_token"  # no error where there is no home
    if "RAY_AUTH_MODE" in os.environ or "RAY_AUTH_TOKEN" in os.environ or not path.is_file():
        return {}
    return {"Authorization": f"Bearer {path.read_text().strip()}"}


def _job(info: Any) -> Job:
    code = info.driver_exit_code
    return Job(
        id=info.submission_id,
        status=str(info.status.value),
        message=info.message or "",
        exit_code=_SIGNALLED - code if code is not None and code < 0 else code,
        started_at=(info.start_time or 0) / 1000,
    )
