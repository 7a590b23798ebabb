"""Graph layers over blocks: SAGE, GCN, GAT, GIN. Each stands alone: `layer(block, x)`, x [S, F] to [R, H].

| layer | source | over sampled neighbours |
|---|---|---|
| `SAGEConv` | Hamilton et al., NeurIPS 2017, algorithm 1, mean and (without its perceptron) max | mean is unbiased |
| `GCNConv` | Kipf and Welling, ICLR 2017, equation 2 | rescaled by degree / sampled: unbiased |
| `GATConv` | Velickovic et al., ICLR 2018, equations 1 to 6 | softmax over what was sampled |
| `GINConv` | Xu et al., ICLR 2019, equation 4.1 | rescaled by degree / sampled: unbiased |

With all neighbours they equal PyG's layers of these names, on graphs with self-loops too: GCN and GAT give every node
one edge from itself in place of those it has (PyG's `add_remaining_self_loops`), SAGE and GIN take such edges as they
are. Edge weights count in SAGE's mean only, and only if asked. Of neighbours that were drawn by weight the block says
what each counts, and the mean weighted by that is an unbiased estimate of the weighted mean over all neighbours (see
`penstock.kernels.weigh`). The other layers have no such estimate: a maximum, an attention and a normalised sum are no
weighted means, and the factor degree / sampled is that of uniform draws.

Letters: S sources, R destinations, E edges of the block, F features, H outputs, K heads.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from penstock.engine.aggregate import (
    aggregate_max,
    aggregate_mean,
    aggregate_sum,
    aggregate_weighted,
    aggregate_weighted_mean,
    edge_softmax,
    loops_in_block,
    sampled_degrees,
    scale_dtype,
    with_self_loops,
)
from penstock.engine.blockcache import derived
from penstock.engine.deferred import Linear, linear
from penstock.engine.dropout import edge_dropout
from penstock.engine.fixed_order import rows_of
from penstock.engine.minibatch import Block

Aggregator = Literal["mean", "max"]
_GATHER_COST = 14  # multiply-adds of a matrix product in the time of gathering one float, per core; measured


def _linear_first(block: Block, x: Tensor, out_features: int) -> bool:
    """Whether to apply a linear map before it is aggregated: it then runs on more rows, but narrower ones are gathered.

    Inputs that need no gradient spare the backward gather only if they are gathered as they are. A block with draws
    may be run without gradients first and with them later, to the same bits: there they count in both.
    """
    passes = 2 if x.requires_grad or block.draws is not None else 1
    product = x.shape[1] * out_features // _GATHER_COST
    before = block.num_src * product + 2 * block.num_edges * out_features
    after = block.num_dst * product + passes * block.num_edges * x.shape[1]
    return before < after


def _aggregate_linear(
    block: Block, x: Tensor, weight: Tensor, bias: Tensor, aggregate: Callable[[Block, Tensor], Tensor]
) -> Tensor:
    if _linear_first(block, x, len(weight)):
        out = aggregate(block, linear(x, weight))
        return out + rows_of(bias, len(out))
    return linear(aggregate(block, x), weight, bias)


def _degree_ratio(block: Block, layer: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Degrees [S], and by what factor [R] the sum over sampled neighbours falls short."""
    if block.src_degrees is None:
        raise ValueError(
            f"{layer} needs the in-degrees of the nodes in the whole graph, but this block has none; "
            "sample with `degrees: true`, or use kind sage or gat"
        )
    degrees = block.src_degrees.to(dtype)
    return degrees, degrees[: block.num_dst] / sampled_degrees(block, dtype).clamp(min=1)


def _gcn_scales(block: Block, layer: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of sources [S], of destinations' sums [R] and of destinations themselves [R].

    The block's own self-loops are in the sums; the last factor takes them out again, and puts in the one that counts.
    """
    degrees, ratio = _degree_ratio(block, layer, dtype)
    in_block = loops_in_block(block).to(dtype)
    if block.src_loops is not None:
        others = degrees - block.src_loops.to(dtype)
    else:  # the graph has none, or the block was made by hand, with all neighbours
        others = torch.cat([(degrees[: block.num_dst] - in_block).clamp(min=0), degrees[block.num_dst :]])
    src_scale = (others + 1).rsqrt()
    own = src_scale[: block.num_dst]
    return src_scale, own * ratio, own.square() * (1 - in_block * ratio)


def gcn_propagate(block: Block, x: Tensor, layer: str) -> Tensor:
    """Sum of x_u / sqrt((d_u + 1) (d_v + 1)) over other neighbours and, once, v itself, [S, F] to [R, F].

    d are in-degrees in the whole graph without self-loops. ValueError, in the name of `layer`, where the block has no
    degrees.
    """
    dtype = scale_dtype(x)
    src_scale, dst_scale, own = derived(block.cache, f"gcn {dtype}", lambda: _gcn_scales(block, layer, dtype))
    return aggregate_sum(block, x, src_scale=src_scale, dst_scale=dst_scale, own_scale=own)


class SAGEConv(nn.Module):
    """W_own x_v + W_neighbour aggregate(x_u) + b.

    `edge_weights` makes the mean one weighted by the edges' weights, or its estimate from draws by weight.
    """

    def __init__(
        self, in_features: int, out_features: int, *, aggregator: Aggregator = "mean", edge_weights: bool = False
    ) -> None:
        super().__init__()
        if edge_weights and aggregator != "mean":
            raise ValueError(f"edge_weights has no meaning for aggregator {aggregator!r}; use mean, or leave it off")
        self.aggregator, self.edge_weights = aggregator, edge_weights
        self.neighbour = Linear(in_features, out_features)
        self.own = Linear(in_features, out_features, bias=False)

    def _mean(self, block: Block, x: Tensor) -> Tensor:
        if not self.edge_weights:
            return aggregate_mean(block, x)
        drawn = block.draw_weights
        if block.edge_weights is None:
            raise ValueError("edge_weights is on, but this block has no weights; ingest a weight column or turn it off")
        return aggregate_weighted_mean(block, x, block.edge_weights if drawn is None else drawn)

    def forward(self, block: Block, x: Tensor) -> Tensor:
        """[S, F] to [R, H]."""
        if self.aggregator == "max":
            neighbours: Tensor = self.neighbour(aggregate_max(block, x))
        else:
            neighbours = _aggregate_linear(block, x, self.neighbour.weight, self.neighbour.bias, self._mean)
        return neighbours + self.own(x[: block.num_dst])  # type: ignore[no-any-return]


class GCNConv(nn.Module):
    """W (sum of x_u / sqrt((d_u + 1) (d_v + 1)) over other neighbours and v itself) + b; see `gcn_propagate`."""

    needs_degrees = True

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, block: Block, x: Tensor) -> Tensor:
        """[S, F] to [R, H]. ValueError where the block has no degrees."""
        return _aggregate_linear(block, x, self.weight, self.bias, partial(gcn_propagate, layer="GCNConv"))


class GATConv(nn.Module):
    """Attention over in-neighbours and the node itself, K heads, concatenated or (`concat=False`) averaged."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        heads: int = 4,
        concat: bool = True,
        negative_slope: float = 0.2,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if concat and out_features % heads:
            raise ValueError(
                f"{out_features} outputs do not part into {heads} heads; make hidden a multiple of heads, "
                f"for example {-(-out_features // heads) * heads}"
            )
        self.heads, self.concat = heads, concat
        self.negative_slope, self.attention_dropout = negative_slope, attention_dropout
        self.dim = out_features // heads if concat else out_features
        self.linear = Linear(in_features, heads * self.dim, bias=False)
        self.src_attention = nn.Parameter(torch.empty(1, heads, self.dim))
        self.dst_attention = nn.Parameter(torch.empty(1, heads, self.dim))
        self.bias = nn.Parameter(torch.zeros(out_features))
        for weight in (self.linear.weight, self.src_attention, self.dst_attention):
            nn.init.xavier_uniform_(weight)

    def forward(self, block: Block, x: Tensor) -> Tensor:
        """[S, F] to [R, H]."""
        block = with_self_loops(block)
        values = self.linear(x)
        by_head = values.view(-1, self.heads, self.dim)
        src_scores = (by_head * rows_of(self.src_attention[0], len(by_head))).sum(-1)
        dst_scores = (by_head[: block.num_dst] * rows_of(self.dst_attention[0], block.num_dst)).sum(-1)
        alpha = edge_softmax(block, src_scores, dst_scores, slope=self.negative_slope)
        alpha = edge_dropout(alpha, self.attention_dropout, self.training, block)
        out = aggregate_weighted(block, values, alpha)
        if not self.concat:
            out = out.view(-1, self.heads, self.dim).mean(dim=1)
        return out + rows_of(self.bias, len(out))


class GINConv(nn.Module):
    """MLP((1 + eps) x_v + sum of x_u over neighbours); eps is learned, the MLP has two layers unless one is given."""

    needs_degrees = True

    def __init__(self, in_features: int, out_features: int, *, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(()))
        self.mlp = mlp or nn.Sequential(
            Linear(in_features, out_features), nn.ReLU(), Linear(out_features, out_features)
        )

    def forward(self, block: Block, x: Tensor) -> Tensor:
        """[S, F] to [R, H]. ValueError where the block has no degrees."""
        _, ratio = _degree_ratio(block, "GINConv", scale_dtype(x))
        factor = rows_of((1 + self.eps).expand(x.shape[1]), block.num_dst)
        total = aggregate_sum(block, x, dst_scale=ratio) + factor * x[: block.num_dst]
        return self.mlp(total)  # type: ignore[no-any-return]
