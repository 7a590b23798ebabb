"""Feature normalisation at ingest: values against NumPy and PyG, constants that do not depend on the budget."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from penstock.storage.errors import DataError, FormatError
from penstock.storage.graph import GraphStore, open_graph
from penstock.storage.ingest import IngestOptions, ingest_npy
from penstock.storage.ingest.normalise import Moments
from penstock.storage.npyfile import open_npy


def run(folder: Path, features: NDArray[Any], host_memory: int = 32 << 20, **options: Any) -> GraphStore:
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in {"features": features, "src": np.array([0]), "dst": np.array([1])}.items():
        np.save(folder / f"{name}.npy", values)
    store = ingest_npy(folder, folder / "out", IngestOptions(**options), host_memory=host_memory)
    store.validate()
    return store


def test_rows_sum_to_one_as_in_pyg(tmp_path: Path) -> None:
    transforms = pytest.importorskip("torch_geometric.transforms")
    data = pytest.importorskip("torch_geometric.data")
    features = (np.random.default_rng(0).random((200, 50)) < 0.1).astype(np.float32)
    features[7] = 0  # a row of zeros stays one
    store = run(tmp_path / "a", features, feature_norm="row")
    wanted = transforms.NormalizeFeatures()(data.Data(x=torch.from_numpy(features.copy()))).x.numpy()
    np.testing.assert_array_equal(store.features, wanted)
    assert store.meta.feature_norm == "row" and store.features[7].tolist() == [0] * 50
    signed = np.array([[-1, 3], [2, -2], [0, 0], [1e-40, 0]], np.float32)
    signed_store = run(tmp_path / "b", signed, feature_norm="row")
    wanted = np.array([[-0.25, 0.75], [0.5, -0.5], [0, 0], [1, 0]])
    np.testing.assert_allclose(signed_store.features, wanted)


def test_standard_columns_have_mean_zero_and_deviation_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    features = (rng.normal(size=(5000, 7)) * [1, 10, 1e-3, 1e4, 1, 0, 0] + [0, 5, 1, 1e7, -3, 0.1, 0]).astype(
        np.float32
    )
    store = run(tmp_path / "a", features, feature_norm="standard")
    wide = features.astype(np.float64)
    wanted = (wide - wide.mean(0)) / np.where(wide.std(0) > 1e-12, wide.std(0), 1)
    np.testing.assert_allclose(store.features[:, :5], wanted[:, :5], rtol=1e-5, atol=1e-6)
    assert not store.features[:, 5:].any()  # constant columns, also of 0.1, which sums inexactly
    constants = open_npy(store.path / "feature_norm.npy")
    np.testing.assert_allclose(constants[0], wide.mean(0), rtol=1e-12)
    np.testing.assert_allclose(constants[1], wide.std(0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_normalised_rows_are_encoded(tmp_path: Path, dtype: Any) -> None:
    features = np.random.default_rng(2).random((50, 4)) * 1e6  # float16 would not hold these
    store = run(tmp_path / "a", features, feature_norm="standard", feature_dtype=dtype)
    assert store.meta.feature_norm == "standard"


def test_the_budget_does_not_change_the_constants(
    tmp_path: Path, folder_bytes: Callable[[Path], dict[str, bytes]]
) -> None:
    features = np.random.default_rng(3).normal(size=(6000, 300)).astype(np.float32) * 100 + 7
    stores = [run(tmp_path / f"{n}", features, n << 20, feature_norm="standard") for n in (17, 400)]
    assert folder_bytes(stores[0].path) == folder_bytes(stores[1].path)


@pytest.mark.parametrize("rows", [1, 7, 1023, 5000])
def test_moments_do_not_depend_on_chunks(rows: int) -> None:
    features = np.random.default_rng(4).normal(size=(5000, 3)).astype(np.float32) + 1e4
    whole, parts = Moments(3), Moments(3)
    whole.add(features)
    for lo in range(0, len(features), rows):
        parts.add(features[lo : lo + rows])
    np.testing.assert_array_equal(whole.constants(), parts.constants())


def test_another_graph_takes_the_constants_of_the_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    first, second = rng.normal(3, 2, (300, 4)), rng.normal(3, 2, (100, 4))
    trained = run(tmp_path / "a", first, feature_norm="standard")
    scored = run(tmp_path / "b", second, feature_norm_from=trained.path)
    own = run(tmp_path / "c", second, feature_norm="standard")
    mean, deviation = open_npy(trained.path / "feature_norm.npy")
    np.testing.assert_allclose(scored.features, (second.astype(np.float32) - mean) / deviation, rtol=1e-5, atol=1e-6)
    assert scored.norm_identity == trained.norm_identity != own.norm_identity
    assert run(tmp_path / "b", second, feature_norm_from=trained.path).fingerprint == scored.fingerprint
    with pytest.raises(ValueError, match="built from something else: normalised as"):
        run(tmp_path / "b", second, feature_norm_from=own.path)
    rows = run(tmp_path / "d", np.abs(first), feature_norm="row")
    assert run(tmp_path / "e", np.abs(second), feature_norm_from=rows.path).norm_identity == "row"


def test_normalisation_that_cannot_be_is_refused(tmp_path: Path) -> None:
    plain = run(tmp_path / "a", np.ones((3, 2)))
    with pytest.raises(ValueError, match="has features as they came; drop the option"):
        run(tmp_path / "b", np.ones((3, 2)), feature_norm_from=plain.path)
    standard = run(tmp_path / "c", np.random.default_rng(0).random((9, 2)) * 1e-30, feature_norm="standard")
    with pytest.raises(DataError, match="has 2 features, this graph has 3"):
        run(tmp_path / "d", np.ones((3, 3)), feature_norm_from=standard.path)
    with pytest.raises(ValueError, match="feature_norm=row, but feature_norm_from=.* has 'standard'"):
        run(tmp_path / "e", np.ones((3, 2)), feature_norm_from=standard.path, feature_norm="row")
    with pytest.raises(DataError, match="row 0: feature 0 is .*, which normalisation takes to .*, beyond float32"):
        run(tmp_path / "f", np.full((3, 2), 3e38), feature_norm_from=standard.path)
    with pytest.raises(DataError, match="row 1: feature 0 is null or NaN"):
        run(tmp_path / "g", np.array([[1, 2], [np.nan, 3], [1, 1]]), feature_norm="standard")
    with pytest.raises(FormatError, match="nowhere"):
        run(tmp_path / "h", np.ones((3, 2)), feature_norm_from=tmp_path / "nowhere")
    data = bytearray((standard.path / "feature_norm.npy").read_bytes())
    data[-1] ^= 1
    (standard.path / "feature_norm.npy").write_bytes(data)
    with pytest.raises(FormatError, match="feature_norm.npy"):
        run(tmp_path / "i", np.ones((3, 2)), feature_norm_from=standard.path)


def test_stores_without_normalisation_say_nothing_of_it(tmp_path: Path) -> None:
    store = open_graph(run(tmp_path / "a", np.ones((3, 2))).path)
    assert not {"feature_norm", "class_values"} & set(store.manifest.meta)
    assert (store.meta.feature_norm, store.norm_identity, store.class_values) == ("none", "none", None)
