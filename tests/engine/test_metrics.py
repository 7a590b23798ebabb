import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from penstock.engine.metrics import Counts, MetricsWriter, node_loss


def test_single_label_by_hand() -> None:
    counts = Counts(4)
    # classes 0 0 1 1 2, one unknown; predicted 0 1 1 1 0 2; class 3 is neither present nor predicted
    labels = torch.tensor([0, 0, 1, 1, 2, -1])
    logits = functional.one_hot(torch.tensor([0, 1, 1, 1, 0, 2]), 4).float() * 3
    for lo in (0, 4):
        counts.update(logits[lo : lo + 4], labels[lo : lo + 4])
    found = counts.metrics()
    assert found.num_nodes == 5
    assert found.accuracy == pytest.approx(3 / 5)
    assert found.micro_f1 == pytest.approx(3 / 5)  # equals the accuracy where a node has one label
    # F1: class 0 2*1/(2+2), class 1 2*2/(3+2), class 2 0
    assert found.macro_f1 == pytest.approx((0.5 + 0.8 + 0) / 3)
    assert found.loss == pytest.approx(float(functional.cross_entropy(logits[:5], labels[:5])))


def test_multi_label_by_hand() -> None:
    counts = Counts(3)
    labels = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 0]]).float()
    logits = torch.tensor([[2, -2, 2], [-2, 2, 2], [2, -2, -2], [-2, -2, -2]]).float()
    counts.update(logits[:1], labels[:1])
    counts.update(logits[1:], labels[1:])
    counts.update(logits[:0], labels[:0])
    found = counts.metrics()
    assert found.num_nodes == 4
    assert found.accuracy == pytest.approx(2 / 4)
    # hits 4, predicted 5, present 5
    assert found.micro_f1 == pytest.approx(8 / 10)
    assert found.macro_f1 == pytest.approx((1.0 + 2 / 3 + 2 / 3) / 3)
    assert found.loss == pytest.approx(float(functional.binary_cross_entropy_with_logits(logits, labels)))


def test_nothing_counted_is_zero_and_not_nan() -> None:
    found = Counts(3).metrics()
    assert (found.accuracy, found.micro_f1, found.macro_f1, found.loss, found.num_nodes) == (0, 0, 0, 0, 0)


def test_loss_leaves_unknown_labels_out() -> None:
    logits = torch.randn(5, 3)
    labels = torch.tensor([0, -1, 2, -1, 1])
    expected = functional.cross_entropy(logits[[0, 2, 4]], labels[[0, 2, 4]])
    torch.testing.assert_close(node_loss(logits, labels), expected)
    assert float(node_loss(logits, torch.full((5,), -1))) == 0


def test_writer_appends_after_what_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"step": 1, "loss": 0.1})
        kept = writer.num_bytes
        writer.write({"step": 2, "loss": 0.2})
    with path.open("a") as file:
        file.write('{"step": 3, "lo')  # cut by a kill
    with MetricsWriter(path, keep_bytes=kept) as writer:
        writer.write({"step": 2, "loss": 0.3})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.1},
        {"step": 2, "loss": 0.3},
    ]
    with MetricsWriter(path, keep_bytes=10**6) as writer:  # never extends the file
        assert writer.num_bytes == path.stat().st_size == kept * 2


def test_writer_refuses_what_is_not_finite(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "m.jsonl") as writer, pytest.raises(ValueError, match="JSON"):
        writer.write({"loss": float("nan")})
