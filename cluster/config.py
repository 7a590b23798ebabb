"""How wide training runs and what it survives; nothing here imports Ray."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from penstock.storage.budget import parse_bytes


class ClusterConfig(BaseModel):
    """Replicas of the model, feeders that sample and pack for them, and the failure policy.

    `address` is a Ray cluster's (`auto`: the one of this machine or of RAY_ADDRESS, `local`: one started for this run,
    or `host:port`); without it replicas are processes of this machine. `feeder_disk` is bytes per feeder. Resources
    are Ray's custom ones, for example `{"feeder": 0.1}` on nodes that were started with `--resources`. GPUs are asked
    for where `train.device` is one: `gpus_per_replica`, or one for each of its ranks; less than one is shared.
    `retries` is how often all replicas start anew from the newest checkpoint; `timeout_s` is for how long nothing may
    move, `wait_s` for how long a Ray cluster may have no room: an autoscaler takes minutes to bring a node.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    replicas: int = Field(default=1, ge=1)
    address: str | None = None
    feeders: int = Field(default=0, ge=0)
    feeder_threads: int = Field(default=1, ge=1)
    feeder_disk: int | None = None
    feeder_resources: dict[str, float] = Field(default_factory=dict)
    replica_resources: dict[str, float] = Field(default_factory=dict)
    gpus_per_replica: float | None = Field(default=None, gt=0)
    retries: int = Field(default=3, ge=0)
    timeout_s: float = Field(default=300.0, gt=0)
    wait_s: float = Field(default=600.0, ge=0)

    @field_validator("feeder_disk", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> int | None:
        return None if value is None else parse_bytes(value)
