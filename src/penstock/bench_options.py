"""Options of `penstock bench`; light, since every start of the command line reads them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cyclopts import Parameter


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """How large and how often, on what, and in what form."""

    scale: float = 1.0
    "Size of the graph, from 0.002 to 10; 1 is that of the published results."
    repeats: int = 5
    "Interleaved repeats; medians are compared, every repeat is in JSON and CSV."
    directory: Path | None = None
    "Folder for the graph and packs; default: a temporary one."
    device: str = "cpu"
    "Where bench epoch trains, cpu or cuda; the others measure the host."
    out_of_core: bool = False
    "Of bench pipeline, the case whose histories do not fit in memory, and no other."
    trace: Path | None = None
    "Of bench policies, accesses of your own: a trace folder, or a Parquet table with columns item and row."
    row_bytes: int | None = None
    "Of bench policies, bytes of a row. Default: 512."
    tiers: str | None = None
    "Of bench policies, shares of the rows that the host tier holds. Default: 0.05,0.1,0.2."
    json: bool = False
    "One JSON object per case and line, the machine last."
    csv: bool = False
    "One line per case under a line of headings."
    quiet: bool = False
    "No progress."

    def arguments(self) -> dict[str, Any]:
        """What `run_bench` takes. ValueError where two forms are asked for, or shares are none."""
        from penstock.benchmarks.run import parse_tiers

        if self.json and self.csv:
            raise ValueError("--json and --csv are two forms of the same; give one")
        return {
            "scale": self.scale,
            "repeats": self.repeats,
            "directory": self.directory,
            "device": self.device,
            "out_of_core": self.out_of_core,
            "trace": self.trace,
            "row_bytes": self.row_bytes,
            "tiers": () if self.tiers is None else parse_tiers(self.tiers),
            "form": "json" if self.json else "csv" if self.csv else "text",
            "quiet": self.quiet,
        }
