"""Deep models on the whole graph's propagation: GCNII, ResGCN+ and DAGNN, 1 to 128 layers.

| model | source | what we changed |
|---|---|---|
| `GCNII` | Chen et al., ICML 2020, equation 5 | nothing; `beta_l` is log(theta / l + 1), l from 1 |
| `ResGCN` | pre-activation blocks ("res+") of Li et al., DeeperGCN, 2020, section 3.3 | its convolution is GCN's |
| `DAGNN` | Liu et al., KDD 2020, equation 8 | the gate's score goes along as one more column: P^k (Z s) = (P^k Z) s |

So DAGNN's hops have no weights and share none, and any of them may run on another machine; the running sum is what it
carries as its initial rows. P is GCN's propagation, so items need degrees. Dropout stands before every matrix, but for
DAGNN's gate; the one before the head is in the last layer. See `layered` for how these parts are called.

Letters: S sources, R destinations of a block, F features, H hidden, C classes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from penstock.engine.deferred import Linear, linear
from penstock.engine.dropout import NodeDropout
from penstock.engine.fixed_order import LayerNorm, sigmoid
from penstock.engine.layered import LayeredModel
from penstock.engine.layers import GCNConv, gcn_propagate
from penstock.engine.minibatch import Block

Activation = Callable[[Tensor], Tensor]
_relu = nn.functional.relu


class GCNIIConv(nn.Module):
    """((1 - alpha) P h + alpha h0) ((1 - beta) I + beta W), beta = log(theta / depth + 1) for layer `depth` >= 1."""

    needs_degrees = True

    def __init__(self, features: int, *, depth: int, alpha: float = 0.1, theta: float = 0.5) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, math.log(theta / depth + 1)
        self.weight = nn.Parameter(torch.empty(features, features))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, block: Block, x: Tensor, initial: Tensor) -> Tensor:
        """[S, H] and [R, H] to [R, H]. ValueError where the block has no degrees."""
        support = torch.lerp(gcn_propagate(block, x, "GCNIIConv"), initial, self.alpha)
        return torch.lerp(support, linear(support, self.weight), self.beta)


class _Encoder(nn.Module):
    """A linear map of one node's features, after dropout."""

    takes_block = True

    def __init__(self, num_features: int, hidden: int, dropout: float, activation: Activation | None) -> None:
        super().__init__()
        self.dropout, self.linear, self.activation = NodeDropout(dropout), Linear(num_features, hidden), activation

    def forward(self, block: Block, x: Tensor) -> Tensor:
        h: Tensor = self.linear(self.dropout(block, x))
        return h if self.activation is None else self.activation(h)


class _InitialHead(Linear):
    """A linear map of the hidden rows; the initial ones have done their part."""

    def forward(self, h: Tensor, initial: Tensor | None = None) -> Tensor:
        return super().forward(h)


class _GCNIILayer(nn.Module):
    def __init__(self, conv: GCNIIConv, dropout: float, activation: Activation, is_last: bool) -> None:
        super().__init__()
        self.conv, self.activation = conv, activation
        self.before = NodeDropout(dropout)
        self.after = NodeDropout(dropout if is_last else 0, salt=1)

    def forward(self, block: Block, x: Tensor, initial: Tensor) -> Tensor:
        h = self.activation(self.conv(block, self.before(block, x), initial))
        return self.after(block, h)  # type: ignore[no-any-return]


class GCNII(LayeredModel):
    """relu(W x), L layers of `GCNIIConv` with an activation each, and a linear head."""

    uses_initial = True
    needs_degrees = True

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        num_layers: int,
        hidden: int,
        alpha: float = 0.1,
        theta: float = 0.5,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        activation: Activation = _relu,
    ) -> None:
        super().__init__()
        self.encoder = _Encoder(num_features, hidden, input_dropout, activation)
        convs = [GCNIIConv(hidden, depth=n + 1, alpha=alpha, theta=theta) for n in range(num_layers)]
        self.layers = nn.ModuleList(
            _GCNIILayer(conv, dropout, activation, n == num_layers - 1) for n, conv in enumerate(convs)
        )
        self.head = _InitialHead(hidden, num_classes)


class _ResLayer(nn.Module):
    """h + GCN(dropout(relu(norm(h)))); the last one normalises, activates and drops its output for the head."""

    def __init__(
        self, hidden: int, norm: Callable[[int], nn.Module], dropout: float, activation: Activation, is_last: bool
    ) -> None:
        super().__init__()
        self.norm, self.dropout, self.activation = norm(hidden), NodeDropout(dropout), activation
        self.conv = GCNConv(hidden, hidden)
        self.last_norm = norm(hidden) if is_last else None
        self.last_dropout = NodeDropout(dropout, salt=1)

    def forward(self, block: Block, x: Tensor) -> Tensor:
        inner = self.dropout(block, self.activation(self.norm(x)))
        h: Tensor = x[: block.num_dst] + self.conv(block, inner)
        if self.last_norm is None:
            return h
        return self.last_dropout(block, self.activation(self.last_norm(h)))  # type: ignore[no-any-return]


class ResGCN(LayeredModel):
    """A linear encoder, L pre-activation residual blocks and a linear head.

    A layer norms its sources, so under a batch norm nodes count as often as chunks (or samples) read them.
    """

    needs_degrees = True

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        num_layers: int,
        hidden: int,
        norm: Callable[[int], nn.Module] = LayerNorm,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        activation: Activation = _relu,
    ) -> None:
        super().__init__()
        self.encoder = _Encoder(num_features, hidden, input_dropout, None)
        self.layers = nn.ModuleList(
            _ResLayer(hidden, norm, dropout, activation, n == num_layers - 1) for n in range(num_layers)
        )
        self.head = Linear(hidden, num_classes)


class _GatedEncoder(nn.Module):
    """Z of a perceptron and its score Z s beside it, [M, C + 1], and the first term of the gated sum."""

    takes_block = True

    def __init__(
        self, num_features: int, hidden: int, num_classes: int, dropouts: tuple[float, float], activation: Activation
    ) -> None:
        super().__init__()
        self.first = _Encoder(num_features, hidden, dropouts[0], activation)
        self.dropout = NodeDropout(dropouts[1], salt=1)
        self.second = Linear(hidden, num_classes)
        self.gate = Linear(num_classes, 1, bias=False)

    def forward(self, block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.second(self.dropout(block, self.first(block, x)))
        h = torch.cat([z, self.gate(z)], dim=1)
        return h, _gated(h)


def _gated(h: Tensor) -> Tensor:
    """Rows times the sigmoid of their score, their last column."""
    return h * sigmoid(h[:, -1:])


class _Hop(nn.Module):
    def forward(self, block: Block, x: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        h = gcn_propagate(block, x, "DAGNN")
        return h, initial + _gated(h)


class _SumHead(nn.Module):
    def forward(self, h: Tensor, initial: Tensor) -> Tensor:
        return initial[:, :-1]


class DAGNN(LayeredModel):
    """A perceptron of one hidden layer, L propagations of its scores, and the sum of all of them by learned gates."""

    uses_initial = True
    needs_degrees = True

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        num_layers: int,
        hidden: int,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        activation: Activation = _relu,
    ) -> None:
        super().__init__()
        self.encoder = _GatedEncoder(num_features, hidden, num_classes, (input_dropout, dropout), activation)
        self.layers = nn.ModuleList(_Hop() for _ in range(num_layers))
        self.head = _SumHead()
