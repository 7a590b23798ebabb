"""Groups of items: the gradient is the mean over the group's seeds, and the bits do not depend on who computed what."""

import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from penstock.engine.chunked.transport import ThreadHub, ThreadTransport
from penstock.engine.memory_feed import open_memory_feed
from penstock.engine.metrics import node_loss
from penstock.engine.minibatch import MiniBatch
from penstock.engine.models import ModelConfig, build_model
from penstock.engine.reduce import PairwiseSum, sum_over
from penstock.engine.stepper import Stepper
from penstock.engine.trainconfig import TrainConfig
from penstock.engine.trainer import make_stepper
from penstock.engine.trainstate import seed_step
from penstock.storage.deal import Deal
from penstock.storage.graph import GraphStore
from penstock.storage.trace import Trace


def on_ranks(count: int, work: Callable[[ThreadTransport], None]) -> None:
    """Run `work` on so many threads, each a rank; the first error is raised."""
    hub, errors = ThreadHub(), list[BaseException]()

    def run(rank: int) -> None:
        try:
            work(ThreadTransport(hub, rank, 20))
        except BaseException as error:  # noqa: B036  a thread's boundary
            errors.append(error)
            hub.aborted.set()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def summed(vectors: Sequence[Tensor]) -> Tensor:
    sums = PairwiseSum()
    for vector in vectors:
        sums.add(vector.clone())
    total = sums.total()
    assert total is not None and sums.total() is None
    return total


@given(ranks=st.sampled_from([2, 3, 4]), log_share=st.integers(0, 2), missing=st.integers(0, 7), size=st.integers(1, 9))
def test_sums_have_the_same_bits_on_any_number_of_ranks(ranks: int, log_share: int, missing: int, size: int) -> None:
    share = 2**log_share
    items = max(1, ranks * share - missing)
    generator = torch.Generator().manual_seed(ranks * 1000 + items)
    vectors = [torch.randn(size, generator=generator) * 10.0**n for n in range(items)]
    expected = summed(vectors)
    own = [vectors[rank * share : (rank + 1) * share] for rank in range(ranks)]
    found: list[Tensor] = [torch.empty(0)] * ranks

    def work(transport: ThreadTransport) -> None:
        mine = own[transport.rank]
        found[transport.rank] = summed(mine) if mine else torch.full((size,), float("nan"))
        sum_over(transport, ranks, found[transport.rank], [bool(each) for each in own])

    on_ranks(ranks, work)
    assert all(torch.equal(each, expected) for each in found)


def stepper(graph: GraphStore, accumulate: int, **options: object) -> Stepper:
    config = TrainConfig.model_validate({"accumulate": accumulate, "lr": 0.01, **options})
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(kind="sage", num_layers=2, hidden=8, dropout=0.5, norm="batch"),
        graph.meta.num_features,
        graph.meta.num_classes,
    )
    return make_stepper(model, config, grouped=accumulate > 1)


def batches(graph: GraphStore, trace: Trace, count: int) -> list[MiniBatch]:
    with open_memory_feed(graph, trace, start_step=0, stop_step=count, threads=1) as feed:
        return [batch.clone() for batch in feed]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([tensor.reshape(-1).double() for tensor in model.state_dict().values()])


def test_a_group_steps_by_the_mean_over_its_seeds(tiny_graph: GraphStore, tiny_trace: Trace) -> None:
    items = batches(tiny_graph, tiny_trace, 8)
    assert len({batch.num_seeds for batch in items}) > 1, "the last item is smaller, so that weights matter"
    group = items[-3:]
    ours = stepper(tiny_graph, 3, optimizer="sgd", grad_clip=0.1)
    plain = stepper(tiny_graph, 1, optimizer="sgd", grad_clip=0.1).model
    start = weights(plain)
    ours.begin_group()
    for n, batch in enumerate(group):
        ours.add(batch, n)
    ours.step(0.01)

    seeds = sum(batch.num_seeds for batch in group)
    running = {name: [] for name in plain.state_dict() if "running" in name}  # type: dict[str, list[Tensor]]
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    for n, batch in enumerate(group):
        seed_step(0, n, torch.device("cpu"))
        loss = node_loss(plain(batch.blocks, batch.features), batch.labels)
        (loss * batch.num_seeds / seeds).backward()  # type: ignore[no-untyped-call]
        for name, found in running.items():
            found.append(plain.state_dict()[name].clone() * batch.num_seeds)
            plain.state_dict()[name].copy_(before[name])
    nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    torch.optim.SGD(plain.parameters(), lr=0.01).step()
    for name, found in running.items():
        plain.state_dict()[name].copy_(torch.stack(found).sum(0) / seeds)
    for name, tensor in plain.state_dict().items():
        if "tracked" in name:
            tensor.fill_(1)
    assert not torch.allclose(start, weights(plain), atol=1e-4)
    assert torch.allclose(weights(ours.model), weights(plain), atol=1e-7)


def test_a_scaled_step_is_that_of_one_without_even_before_the_first_item(
    tiny_graph: GraphStore, tiny_trace: Trace
) -> None:
    items = batches(tiny_graph, tiny_trace, 2)
    plain = stepper(tiny_graph, 2, grad_clip=0.1)
    scaled, absent = (
        Stepper(
            stepper(tiny_graph, 2).model,
            TrainConfig(lr=0.01, grad_clip=0.1),
            device=torch.device("cpu"),
            autocast=None,
            scaled=True,
            seed=0,
            grouped=True,
        )
        for _ in range(2)
    )
    sent: list[Tensor] = []
    for each in (plain, scaled):
        each.begin_group()
        for n, batch in enumerate(items):
            each.add(batch, n)
        each.step(0.01, lambda vector: sent.append(vector.clone()))

    def receive(vector: Tensor) -> None:
        vector.copy_(sent[-1])  # what another replica with the same scale has summed

    absent.step(0.01, receive)
    for each in (scaled, absent):
        assert each.scaler.get_scale() == 2.0**16
        assert torch.allclose(weights(each.model), weights(plain.model), atol=1e-6)


@pytest.mark.parametrize(("replicas", "accumulate"), [(2, 2), (2, 4), (4, 4)])
def test_replicas_end_with_the_bits_of_one(
    tiny_graph: GraphStore, tiny_trace: Trace, replicas: int, accumulate: int
) -> None:
    items = batches(tiny_graph, tiny_trace, 7)  # the last group is not whole
    alone = stepper(tiny_graph, accumulate)
    for start in range(0, 7, accumulate):
        alone.begin_group()
        for n in range(start, min(7, start + accumulate)):
            alone.add(items[n], n)
        alone.step(0.01)
    deals = [Deal(replicas=replicas, rank=r, group_items=accumulate, epoch_items=7) for r in range(replicas)]
    models = [stepper(tiny_graph, accumulate) for _ in range(replicas)]
    lock = threading.Lock()  # torch's generator is one for all threads; processes have their own

    def work(transport: ThreadTransport) -> None:
        mine, deal = models[transport.rank], deals[transport.rank]
        for start in range(0, 7, accumulate):
            stop = min(7, start + accumulate)
            counts = [each.own_before(stop) - each.own_before(start) for each in deals]
            with lock:
                mine.begin_group()
                for own in range(deal.own_before(start), deal.own_before(stop)):
                    mine.add(items[deal.whole(own)], deal.whole(own))
            mine.step(
                0.01,
                lambda vector, n=counts: sum_over(transport, replicas, vector, [c > 0 for c in n]),  # type: ignore[misc]
            )

    on_ranks(replicas, work)
    assert all(torch.equal(weights(each.model), weights(alone.model)) for each in models)
