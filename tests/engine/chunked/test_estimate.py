from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from penstock.engine.chunked.config import ChunkedConfig
from penstock.engine.chunked.estimate import (
    HEADINGS,
    Choice,
    choose_split,
    compare_splits,
    estimate_rows,
    name_split,
    pick,
)
from penstock.engine.chunked.footprint import (
    GraphFacts,
    ModelFacts,
    Profile,
    Split,
    cut_pieces,
    history_bytes,
    mirror_bytes,
    pipeline_bytes,
    reduce_bytes,
    split_costs,
)
from penstock.engine.chunked.layout import Layout
from penstock.storage.budget import GIB
from penstock.storage.errors import DoesNotFit

NUM_NODES, WIDTH, CHUNKS = 64_000, 100, 32
ROOMY = 1 << 50


def facts(alpha: float = 1.0, num_chunks: int = CHUNKS, **part_alpha: float) -> GraphFacts:
    own = np.full(num_chunks, NUM_NODES // num_chunks)
    parts = {int(name[1:]): value for name, value in part_alpha.items()} or {2: 0.5 * alpha, 4: 0.8 * alpha, 8: alpha}
    return GraphFacts(own_rows=own, halo_rows=(own * alpha).astype(np.int64), edges=own * 20, part_alpha=parts)


def model(layers: int = 32, **changes: Any) -> ModelFacts:
    base = ModelFacts(hidden_layers=layers, width=WIDTH, num_features=600, parameter_bytes=layers * 40_000)
    return replace(base, **changes)


def profile(layers: int = 32, bytes_per_s: float = 1e9) -> Profile:
    """Of a chunk of 2000 rows and 40000 edges, 1 ms per layer and pass; `enter` and the head cost a layer each."""
    units = layers + 2
    return Profile(
        rows=2000,
        halo=2000,
        edges=40_000,
        forward_s=(1e-3,) * units,
        backward_s=(1e-3,) * units,
        weight_s=(5e-4,) * units,
        kept_bytes=(2000 * WIDTH * 4 * 4,) * units,
        gradient_bytes=(0,) * units,
        bytes_per_s=bytes_per_s,
        latency_s=5e-5,
        disk_bytes_per_s=1e9,
    )


def compare(
    layers: int = 32,
    alpha: float = 1.0,
    devices: int = 8,
    memory: int = ROOMY,
    bytes_per_s: float = 1e9,
    **config: Any,
) -> dict[str, Choice]:
    """Choices by `kind`, `graph` being the one with one chunk; hybrids by their numbers."""
    choices = compare_splits(
        facts(alpha),
        model(layers),
        profile(layers, bytes_per_s),
        ChunkedConfig(chunks=CHUNKS, **config),
        devices=devices,
        memory_bytes=memory,
    )
    names = {"hybrid": "{0.parts}x{0.stages}", "graph": "graph {0.chunks}"}
    return {names.get(choice.kind, choice.kind).format(choice): choice for choice in choices}


@pytest.mark.parametrize(
    ("num_nodes", "width", "pipeline_gib", "hybrid_gib", "alpha", "ratio"),
    [
        (5_201, 1000, 0.271, 0.116, 2.22, 10.2),  # Squirrel
        (89_250, 100, 0.465, 0.199, 2.15, 9.9),  # Flickr
        (232_965, 100, 1.215, 0.521, 2.61, 11.9),  # Reddit
        (34_493, 100, 0.180, 0.077, 0.99, 4.5),  # Coauthor-Physics
        (169_343, 100, 0.883, 0.379, 0.68, 3.1),  # ogbn-arxiv
    ],
)
def test_volumes_are_those_that_gnnpipe_logged(
    num_nodes: int, width: int, pipeline_gib: float, hybrid_gib: float, alpha: float, ratio: float
) -> None:
    """gnnpipe.md, section 1.7: 8 GPUs, 32 layers, hybrids of 2 ways x 4 stages."""
    row_bytes = width * 4
    assert pipeline_bytes(num_nodes, 8, row_bytes) / GIB == pytest.approx(pipeline_gib, abs=5e-4)
    assert pipeline_bytes(num_nodes, 4, row_bytes) / GIB == pytest.approx(hybrid_gib, abs=5e-4)
    graph = mirror_bytes(num_nodes, 32, alpha, row_bytes)
    assert graph / pipeline_bytes(num_nodes, 8, row_bytes) == pytest.approx(ratio, rel=0.01)  # alpha has two digits


def test_choices_send_what_the_formulas_say() -> None:
    found = compare()
    row_bytes, parameters = WIDTH * 4, model().parameter_bytes
    pipeline, graph, hybrid = found["pipeline"], found["graph 1"], found["2x4"]
    assert pipeline.sent_bytes == pipeline_bytes(NUM_NODES, 8, row_bytes)
    assert pipeline.exchanged_bytes == pipeline.reduced_bytes == 0
    assert graph.sent_bytes == 0
    assert graph.exchanged_bytes == mirror_bytes(NUM_NODES, 32, 1.0, row_bytes)
    assert graph.reduced_bytes == reduce_bytes(8, parameters)
    assert found["graph 32"].exchanged_bytes == graph.exchanged_bytes
    assert hybrid.sent_bytes == pipeline_bytes(NUM_NODES, 4, row_bytes)
    assert hybrid.exchanged_bytes == mirror_bytes(NUM_NODES, 32, 0.5, row_bytes)
    assert hybrid.reduced_bytes == reduce_bytes(2, parameters)


def test_an_initial_representation_doubles_what_stages_send() -> None:
    costs = [
        split_costs(split(Layout(4, 1)), facts(), model(uses_initial=initial), profile(), ChunkedConfig())
        for initial in (False, True)
    ]
    assert (costs[1].wire_bytes == 2 * costs[0].wire_bytes).all()
    assert (costs[1].exchange_bytes == costs[0].exchange_bytes).all()


def split(layout: Layout, *, recompute: bool = True, in_memory: bool = True, layers: int = 32) -> Split:
    each = layers // layout.stages
    units = [range(stage * each + (stage > 0), (stage + 1) * each + 1) for stage in range(layout.stages)]
    return Split(layout=layout, units=tuple(units), recompute=recompute, in_memory=in_memory)


def test_all_splits_of_the_devices_are_compared() -> None:
    found = compare()
    assert list(found) == ["pipeline", "2x4", "4x2", "graph 1", "graph 32"]
    assert list(compare(devices=1)) == ["single"]
    assert list(compare(layers=2)) == ["4x2", "graph 1", "graph 32"]  # three units cannot be in four stages
    only_two = compare_splits(facts(p2=0.5), model(), profile(), ChunkedConfig(), devices=8, memory_bytes=ROOMY)
    assert [(choice.stages, choice.parts) for choice in only_two] == [(8, 1), (4, 2)]
    assert [name_split(*grid) for grid in ((1, 1), (2, 1), (1, 2), (2, 2))] == ["single", "pipeline", "graph", "hybrid"]


def test_deep_nets_on_connected_graphs_are_pipelined_and_shallow_ones_cut() -> None:
    deep = compare(layers=32, alpha=2.6, bytes_per_s=2e8)
    best = pick(list(deep.values()))
    assert (best.kind, best.stages) == ("pipeline", 8)
    assert best.epoch_s < 0.5 * deep["graph 1"].epoch_s
    shallow = compare(layers=8, alpha=0.05, bytes_per_s=2e8)
    best = pick(list(shallow.values()))
    assert (best.kind, best.parts, best.chunks) == ("graph", 8, 1)
    assert best.epoch_s < shallow["pipeline"].epoch_s


def test_time_is_that_of_the_work_where_nothing_else_costs() -> None:
    free = replace(profile(), bytes_per_s=float("inf"), latency_s=0.0)
    alone = compare_splits(facts(), model(), free, ChunkedConfig(), devices=1, memory_bytes=ROOMY)[0]
    assert not alone.recompute and alone.bubble == pytest.approx(0)
    assert alone.epoch_s == pytest.approx(34 * CHUNKS * 2.5e-3)
    uncut = facts(p8=0.0)
    graph = compare_splits(uncut, model(), free, ChunkedConfig(), devices=8, memory_bytes=ROOMY)[-2]
    assert (graph.parts, graph.chunks) == (8, 1)
    assert graph.epoch_s == pytest.approx(alone.epoch_s / 8)


def test_the_bubble_shrinks_with_the_chunks() -> None:
    few, many = (
        compare_splits(
            facts(num_chunks=num_chunks), model(31), profile(31), ChunkedConfig(), devices=8, memory_bytes=ROOMY
        )[0]
        for num_chunks in (8, 64)
    )
    assert few.bubble > 2 * many.bubble
    assert few.epoch_s > many.epoch_s


@pytest.mark.parametrize("mode", ["stale", "drop"])
@pytest.mark.parametrize("parts", [1, 2])
def test_histories_take_two_buffers_per_layer_and_messages_one(mode: Any, parts: int) -> None:
    config, layout = ChunkedConfig(gradient_mode=mode), Layout(4, parts)
    piece = cut_pieces(facts(), parts)
    found = history_bytes(split(layout), piece, model(), config)
    alpha = 1.0 + (0.5 if parts == 2 else 0.0)
    buffers = 2 if mode == "drop" and parts == 1 else 3
    rows = NUM_NODES / parts * WIDTH * 4
    runs = buffers * 8 * alpha * rows
    assert found == pytest.approx([runs + 2 * rows, *[runs + 3 * rows] * 3] * parts)
    half = history_bytes(split(layout), piece, model(), config.model_copy(update={"history_dtype": "bfloat16"}))
    assert half == pytest.approx([runs / 2 + 2 * rows, *[runs / 2 + 3 * rows] * 3] * parts)  # own rows stay whole


def test_activations_are_kept_where_they_fit_and_histories_go_to_disk_last() -> None:
    kept = compare(devices=4)["pipeline"]
    assert (kept.recompute, kept.histories_in_memory, kept.fits) == (False, True, True)
    again = compare(devices=4, memory=kept.peak_bytes - 1)["pipeline"]
    assert (again.recompute, again.histories_in_memory, again.fits) == (True, True, True)
    assert again.peak_bytes < kept.peak_bytes
    assert again.epoch_s > kept.epoch_s
    # recomputed and still too much: the next thing to try is kept activations beside histories on disk
    stash = compare(devices=4, memory=again.peak_bytes - 1)["pipeline"]
    assert not stash.histories_in_memory
    assert stash.history_bytes > 0.5 * again.peak_bytes
    assert stash.peak_bytes < again.peak_bytes


def test_what_the_configuration_fixes_is_not_changed() -> None:
    always = compare(devices=2, recompute="always")["pipeline"]
    assert always.recompute and always.fits
    never = compare(devices=2, recompute="never", memory=1)["pipeline"]
    assert not never.recompute and not never.fits
    on_disk = compare(devices=2, history_storage="disk")["pipeline"]
    assert not on_disk.histories_in_memory
    in_memory = compare(devices=2, history_storage="memory", memory=1)["pipeline"]
    assert in_memory.histories_in_memory and not in_memory.fits


def test_a_disk_that_is_slower_than_computing_shows() -> None:
    slow = replace(profile(), disk_bytes_per_s=1e7)
    config = ChunkedConfig(history_storage="disk", recompute="never")
    choice = compare_splits(facts(), model(), slow, config, devices=1, memory_bytes=ROOMY)[0]
    # runs written and read, messages written and read, for 32 layers and alpha 1
    assert choice.epoch_s == pytest.approx(4 * 32 * NUM_NODES * WIDTH * 4 / 1e7 + 34 * CHUNKS * 5e-4)


def test_the_smallest_budget_is_named_where_nothing_fits_and_is_enough() -> None:
    with pytest.raises(DoesNotFit, match=r"\d+ stages x \d+ parts need least, .* give that much") as caught:
        pick(list(compare(memory=1 << 20).values()))
    least = caught.value.host_bytes
    assert least is not None
    chosen = pick(list(compare(memory=least).values()))
    assert chosen.peak_bytes == least
    with pytest.raises(DoesNotFit):
        pick(list(compare(memory=least - 1).values()))
    with pytest.raises(ValueError, match="no split of the devices is possible"):
        pick([])


def test_the_table_has_a_row_per_choice() -> None:
    choices = list(compare().values())
    rows = estimate_rows(choices)
    assert all(len(row) == len(HEADINGS) for row in rows)
    pipeline = dict(zip(HEADINGS, rows[0], strict=True))
    assert pipeline["split"] == "pipeline"
    assert (pipeline["stages"], pipeline["parts"], pipeline["chunks"]) == ("8", "1", "32")
    assert pipeline["stage bytes"] == "342 MiB"
    assert pipeline["fits"] == "yes"
    assert pipeline["histories"].endswith("in memory")


def test_the_last_stage_has_the_labels() -> None:
    costs = [
        split_costs(split(Layout(4, 2)), facts(p2=0.5), model(label_bytes=label_bytes), profile(), ChunkedConfig())
        for label_bytes in (8, 408)
    ]
    more = costs[1].constant_bytes - costs[0].constant_bytes
    assert more.tolist() == [0, 0, 0, 400 * NUM_NODES // 2] * 2


def test_a_device_has_a_budget_of_its_own() -> None:
    """Activations are recomputed where the device does not hold them, and histories do not count there."""
    plain: dict[str, Any] = {"layout": Layout(1, 1), "facts": facts(), "model": model(), "profile": profile()}
    kept = choose_split(**plain, config=ChunkedConfig(), memory_bytes=ROOMY)
    assert kept.fits and not kept.recompute
    assert 0 < kept.device_bytes <= kept.peak_bytes - kept.resident_history_bytes + 1
    again = choose_split(**plain, config=ChunkedConfig(), memory_bytes=ROOMY, device_bytes=kept.device_bytes - 1)
    assert again.fits and again.recompute and again.device_bytes < kept.device_bytes
    never = ChunkedConfig(recompute="never")
    assert not choose_split(**plain, config=never, memory_bytes=ROOMY, device_bytes=kept.device_bytes - 1).fits
    assert choose_split(**plain, config=never, memory_bytes=ROOMY, device_bytes=kept.device_bytes).fits
