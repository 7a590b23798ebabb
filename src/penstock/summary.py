"""What came of a run, in rows for people: made of `result.json`, for the terminal and the report."""

from collections.abc import Mapping
from typing import Any

from penstock.live import format_rate

Row = tuple[str, str]
_SCORED = ("valid", "test")
_PARTS = ("prepare", "train", "test", "save")


def format_seconds(seconds: float) -> str:
    """Seconds as people say them: `0.42 s`, `3 min 12 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes} min {second} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def result_rows(result: Mapping[str, Any]) -> list[Row]:
    """How training ended, valid before test, how fast, and where the time went."""
    return [*_end_rows(result), *score_rows(result), *_speed_rows(result)]


def _end_rows(result: Mapping[str, Any]) -> list[Row]:
    metrics, train = result["metrics"], result["config"]["train"]
    if "epochs" not in metrics:
        return []
    done, asked, best = metrics["epochs"], train["epochs"], metrics.get("best_epoch")
    text = f"{done} of {asked}"
    if metrics.get("stopped_early"):
        text += f": stopped early, {done - best} epochs without a better valid {_words(train['metric'])}"
    return [("epochs", text), *([("best epoch", str(best))] if best else [])]


def score_rows(result: Mapping[str, Any]) -> list[Row]:
    """Accuracies, and the metric that was judged by, valid before test."""
    metrics, metric = result["metrics"], result["config"]["train"]["metric"]
    names = dict.fromkeys(("accuracy", metric))
    if all(metrics.get(f"{split}_{metric}") == metrics.get(f"{split}_accuracy") for split in _SCORED):
        names.pop(metric)  # with one label per node micro F1 is the accuracy
        names["accuracy"] = None
    keys = [f"{split}_{name}" for split in _SCORED for name in names]
    return [(_words(key), f"{metrics[key]:.4f}") for key in keys if key in metrics]


def _speed_rows(result: Mapping[str, Any]) -> list[Row]:
    rate, times = result.get("throughput", {}).get("items_per_s"), result.get("timings", {})
    rows = [("training", f"{format_rate(rate, 'items')} over all epochs")] if rate else []
    if "total_s" in times:
        parts = ", ".join(f"{name} {format_seconds(times[f'{name}_s'])}" for name in _PARTS)
        rows.append(("time", f"{format_seconds(times['total_s'])}: {parts}"))
    return rows


def _words(name: str) -> str:
    return name.replace("_", " ")


class Result(dict[str, Any]):
    """What `result.json` says, as a dict, which shows itself as the lines that the command line ends with."""

    def __repr__(self) -> str:
        if not {"config", "metrics", "status"} <= set(self) or not self["config"]:
            return super().__repr__()
        rows = [*result_rows(self), ("keys", ", ".join(self))]
        width = max(len(name) for name, _ in rows)
        lines = [f"  {name:<{width}}  {value}" for name, value in rows]
        return "\n".join([f"run {self['config']['run_dir']}: {self['status']}", *lines])
