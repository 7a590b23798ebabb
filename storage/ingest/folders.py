"""A folder of NumPy arrays, by our own convention.

`features.npy` [N, F], `edge_index.npy` [2, E] or `src.npy` and `dst.npy`, and optionally `labels.npy`,
`edge_weights.npy`, `node_ids.npy`, and per split `train_ids.npy` or `train_mask.npy` (valid may be called val or
validation). Where there is `node_ids.npy`, edges and splits name nodes by those ids, else by row.
"""

import logging
from pathlib import Path

from penstock.storage.errors import DataError
from penstock.storage.graph import Split
from penstock.storage.ingest.arrays import ArraySource
from penstock.storage.ingest.columns import ArrayColumn, open_array
from penstock.storage.ingest.inputs import InputFile
from penstock.storage.ingest.source import Column
from penstock.storage.ingest.values import find_split_names

logger = logging.getLogger(__name__)


class _Folder:
    """The arrays of a folder, and which of them were taken."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = {file.stem for file in path.glob("*.npy") if not file.name.startswith(".")}
        self.taken: list[str] = []

    def column(self, name: str) -> ArrayColumn:
        if name not in self.names:
            raise DataError(f"{self.path / name}.npy is missing; the folder has {sorted(self.names)}")
        self.taken.append(name)
        return ArrayColumn(f"{self.path / name}.npy", open_array(self.path / f"{name}.npy"))

    def optional(self, name: str) -> ArrayColumn | None:
        return self.column(name) if name in self.names else None

    def splits(self, suffix: str) -> dict[Split, Column]:
        return {split: self.column(name) for split, name in find_split_names(self.names, suffix).items()}

    def edges(self) -> tuple[Column, Column]:
        if "edge_index" not in self.names:
            return self.column("src"), self.column("dst")
        if "src" in self.names or "dst" in self.names:
            raise DataError(
                f"{self.path} has edge_index.npy and src.npy or dst.npy, which both say the edges; keep one"
            )
        self.column("edge_index")
        path = self.path / "edge_index.npy"
        index = open_array(path)
        if index.ndim != 2 or index.shape[0] != 2:
            hint = ": transpose it" if index.ndim == 2 and index.shape[1] == 2 else ""
            raise DataError(f"{path} has shape {index.shape}, wanted (2, E){hint}")
        return ArrayColumn(f"{path}[0]", index[0]), ArrayColumn(f"{path}[1]", index[1])


def open_numpy_folder(path: Path) -> ArraySource:
    """Find the arrays; DataError where one that must be there is not, or has another shape."""
    folder = _Folder(Path(path))
    features, (src, dst) = folder.column("features"), folder.edges()
    labels, weights, node_ids = (folder.optional(name) for name in ("labels", "edge_weights", "node_ids"))
    masks, split_ids = folder.splits("mask"), folder.splits("ids")
    if unused := sorted(folder.names - set(folder.taken)):
        logger.warning("arrays of %s that are not used: %s", path, ", ".join(f"{name}.npy" for name in unused))
    return ArraySource(
        kind="npy",
        inputs=[InputFile(role=f"{name}.npy", path=folder.path / f"{name}.npy") for name in sorted(folder.taken)],
        features=features,
        src=src,
        dst=dst,
        masks=masks,
        split_ids=split_ids,
        label_column=labels,
        weights=weights,
        node_ids=node_ids,
    )
