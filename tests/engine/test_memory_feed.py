import numpy as np
import pytest
import torch

from penstock.engine.memory_feed import open_memory_feed
from penstock.storage.graph import GraphStore
from penstock.storage.rows import ROW_DTYPES, RowDtype, RowFormat, decode_rows, encode_rows
from penstock.storage.trace import Trace


@pytest.mark.parametrize("row_dtype", ROW_DTYPES)
def test_batches_hold_what_trace_and_table_say(tiny_graph: GraphStore, tiny_trace: Trace, row_dtype: RowDtype) -> None:
    row_format = RowFormat(dtype=row_dtype, width=20)
    table = decode_rows(encode_rows(np.array(tiny_graph.features), row_format), row_format)
    items = list(tiny_trace.items())
    with open_memory_feed(tiny_graph, tiny_trace, start_step=0, stop_step=20, row_dtype=row_dtype, threads=2) as feed:
        for step, batch in enumerate(feed):
            item = items[step % 16]
            assert (batch.step, batch.item, batch.epoch) == (step, step % 16, step // 8)
            np.testing.assert_array_equal(batch.input_ids.numpy(), item.input_ids)
            np.testing.assert_array_equal(batch.features.numpy(), table[item.input_ids])
            np.testing.assert_array_equal(batch.labels.numpy(), item.labels)
            assert batch.labels.dtype == torch.int64 and batch.features.dtype == torch.float32
            np.testing.assert_array_equal(batch.labels.numpy(), tiny_graph.labels[batch.seeds.numpy()])
            for block, arrays in zip(batch.blocks, item.blocks, strict=True):
                assert (block.num_src, block.num_dst) == (arrays.num_src, arrays.num_dst)
                np.testing.assert_array_equal(block.indptr.numpy(), arrays.indptr)
                np.testing.assert_array_equal(block.indices.numpy(), arrays.indices)
                assert block.src_degrees is not None and item.degrees is not None
                np.testing.assert_array_equal(block.src_degrees.numpy(), item.degrees[: arrays.num_src])
        assert step == 19
        assert feed.stats.items == 20 and feed.stats.bytes_read == 0


def test_features_are_exactly_the_stored_ones(tiny_graph: GraphStore, tiny_trace: Trace) -> None:
    with open_memory_feed(tiny_graph, tiny_trace, start_step=3, stop_step=4) as feed:
        batch = next(feed)
        assert batch.features.numpy().tobytes() == np.array(tiny_graph.features[batch.input_ids.numpy()]).tobytes()
        with pytest.raises(StopIteration):
            next(feed)


def test_a_position_can_be_saved_and_loaded(tiny_graph: GraphStore, tiny_trace: Trace) -> None:
    with open_memory_feed(tiny_graph, tiny_trace, start_step=0, stop_step=9) as feed:
        seen = [next(feed).input_ids.tolist() for _ in range(5)]
        state = feed.state_dict()
        seen += [batch.input_ids.tolist() for batch in feed]
        feed.load_state_dict(state)
        assert [batch.input_ids.tolist() for batch in feed] == seen[5:]
        feed.load_state_dict({"step": 0})
        assert [batch.input_ids.tolist() for batch in feed] == seen
        with pytest.raises(ValueError, match="step 10 is not within 0..9"):
            feed.load_state_dict({"step": 10})
