"""What README calls the cases of its table; others are called by their names."""

TITLES = {
    ("sample", "edges_per_core"): "sampled edges per second and core, fanouts 10,15,20, 64 M edges",
    ("pack", "bandwidth"): "bytes per second while packing",
    ("feed", "bandwidth"): "bytes per second of the feed",
    ("feed", "rows_vs_4k"): "rows of 512 bytes per second",
    ("feed", "bytes_vs_static"): "bytes per epoch, host tier 10 %",
    ("feed", "bytes_vs_belady4k"): "bytes per epoch, host tier 10 %",
    ("epoch", "time_vs_memory"): "epoch out of core, host tier 10 %, SAGE 3 layers",
    ("kernels", "mean_forward"): "mean aggregation, forward",
    ("kernels", "mean_backward"): "mean aggregation, backward",
    ("pipeline", "two_stages"): "16 layers in two stages on two cores, 500 k nodes",
    ("pipeline", "bytes_vs_graph_parallel"): "bytes that two parts send, 16 layers",
    ("pipeline", "vs_graph_parallel"): "epoch of two stages",
    ("pipeline", "out_of_core"): "full-graph epoch, histories 8 times the memory given",
    ("cluster", "two_replicas"): "two replicas on two cores, same items per step, same weights",
    ("cluster", "feeder_stall"): "seconds that a trainer waits for a feeder on another node",
}


def title_of(bench: str, case: str) -> str:
    """A case in words."""
    return TITLES.get((bench, case), case.replace("_", " "))
