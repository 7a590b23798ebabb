from pathlib import Path

from penstock.engine.chunked.profile import profile_model
from penstock.engine.models import ModelConfig, build_model
from penstock.sampler.chunking.config import PartitionConfig
from penstock.sampler.chunking.write import write_chunks
from penstock.storage.generate import GenerateConfig, generate_graph

_WIDTH, _FEATURES, _CLASSES = 32, 24, 5


def test_a_tape_keeps_rows_that_went_in_and_what_dropout_made_of_them(tmp_path: Path) -> None:
    config = GenerateConfig(num_nodes=600, num_features=_FEATURES, num_classes=_CLASSES)
    graph = generate_graph(tmp_path / "graph", config, host_memory=64 << 20)
    cut = PartitionConfig(chunks=3, method="random")
    part = write_chunks(graph, tmp_path / "chunks", cut, host_memory=64 << 20, threads=1).part(0)

    def kept(dropout: float) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        model = build_model(ModelConfig(kind="sage", num_layers=3, hidden=_WIDTH, dropout=dropout), _FEATURES, _CLASSES)
        found = profile_model(model, part, _FEATURES, backend="threads", disk_bytes_per_s=1e9)
        return found.kept_bytes, found.gradient_bytes, (found.rows + found.halo) * _WIDTH * 4

    plain, gradients, rows_bytes = kept(0.0)
    dropped, *_ = kept(0.5)
    assert len(plain) == len(gradients) == 4  # what enters, two hidden layers, the head
    assert all(rows_bytes <= size < 2 * rows_bytes for size in plain[1:3])
    assert all(size >= rows_bytes for size in gradients[1:3])  # that of the rows alone
    assert all(size + rows_bytes <= more for size, more in zip(plain[1:3], dropped[1:3], strict=True))
    assert plain[0] < plain[1]  # features are there anyway
