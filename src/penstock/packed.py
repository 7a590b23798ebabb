"""Folders in which a trace was planned and packed: what their plan says, and whether their packs will do."""

from dataclasses import fields
from pathlib import Path

from penstock.sampler.estimate import DiskRates, PlanSummary
from penstock.sampler.plan import PlanConfig
from penstock.storage.budget import Budgets
from penstock.storage.graph import GraphStore
from penstock.storage.manifest import read_json
from penstock.storage.pack import is_complete


def read_plan(folder: Path) -> PlanSummary:
    """What `plan.json` says; FormatError where it is missing or damaged."""
    names = tuple(field.name for field in fields(PlanSummary))
    value = read_json(folder / "plan.json", keys=names)
    known = {name: value[name] for name in names}
    return PlanSummary(**{**known, "disk_rates": DiskRates(**value["disk_rates"])})


def packs_fit(folder: Path, graph: GraphStore, config: PlanConfig, budgets: Budgets) -> bool:
    """Whether `packs/` is complete, was planned as `config` wants it, and keeps within these budgets."""
    packs = folder / "packs"
    if not is_complete(packs):
        return False
    plan = read_plan(folder)
    row_dtype = config.row_dtype or graph.meta.feature_dtype
    return (
        (plan.policy, plan.row_dtype) == (config.policy, row_dtype)
        and plan.host_needed_bytes <= budgets.host_bytes
        and 4 * graph.meta.num_features * plan.device_slots <= budgets.device_bytes
        and sum(file.stat().st_size for file in packs.iterdir()) <= budgets.disk_bytes
    )
