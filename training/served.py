"""The network as it is served: what belongs to an item alone apart from what a request adds.

Nearly all of the network up to its first activation is linear in the candidate's columns. So the
share of each item's own features is summed up beforehand (`ItemSide`, run for the whole item table
when a bundle is exported), and a request adds the rest (`RequestSide`): the user's share once, and
for each candidate what depends on both. Both give the logits of `Network` in evaluation mode, to
rounding.

Axes: N candidates, H = 2 interaction + first hidden + 1 sums of the first layer, S size of a
history step, D of a TPM vector.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bundle.spec import Spec
from training.examples import Batch
from training.layers import Standardise
from training.network import Network

FEW_ROWS = 256
"""Of a table, that it pays to add something to for each request."""
_DOT, _ITEM_FACTS, _USER_FACTS = slice(0, 1), slice(1, 4), slice(4, 6)
"""Which of the facts of a pair of windows depend on both sides, on the item, on the user."""


class Weights:
    """The weights of the first layer [H, columns], by what the columns are of."""

    def __init__(self, network: Network) -> None:
        self.linears = (network.left, network.right, network.first, network.wide)
        whole = torch.cat([linear.item.weight for linear in self.linears]).detach()
        widths = [
            network.item_fields.width,
            network.item_numbers.width,
            network.match_numbers.width,
            network.attention.width,
        ]
        parts = torch.split(whole, [*widths, whole.shape[1] - sum(widths)], dim=1)
        self.fields, self.numbers, self.match, self.attention, self.windows = parts


class ItemSide(nn.Module):
    """What an item adds to the first layer, its attention query, and its aggregated window."""

    weight: Tensor
    fact_weight: Tensor

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        weights = Weights(network)
        self.register_buffer("weight", torch.cat([weights.fields, weights.numbers], dim=1))
        self.has_windows = bool(network.window_dim)
        if self.has_windows:
            self.facts = _cut(network.window_numbers, _ITEM_FACTS)
            self.register_buffer("fact_weight", weights.windows[:, _ITEM_FACTS])

    def names(self) -> list[str]:
        """Of the inputs, in order."""
        windows = ["item_window", "item_window_present"] if self.has_windows else []
        return ["item_cat", "item_num", *windows]

    def forward(self, *inputs: Tensor) -> Tensor:
        """float32 [N, H + S (+ D) + 1] of the inputs, in the order of `names`; the last column is 0
        where an item has no window, as `bundle.parts` says."""
        x = dict(zip(self.names(), inputs, strict=True))
        network = self.network
        own = [network.item_fields(x["item_cat"]), network.item_numbers(x["item_num"])]
        share = torch.cat(own, 1) @ self.weight.T
        target = network.matched_fields(x["item_cat"][:, network.matched_columns])
        query = network.attention.query(target) * network.attention._scale
        if not self.has_windows:
            return torch.cat([share, query, torch.ones_like(share[:, :1])], dim=1)
        window, present, size = x["item_window"], x["item_window_present"], network.window_dim
        mixed = network.item_window(window, present)
        first, last = present[:, :1], present[:, -1:]
        moved = torch.where(first & last, window[:, 0, size:] - window[:, -1, size:], 0.0)
        known = present.any(1, keepdim=True).to(mixed.dtype)
        facts = self.facts(torch.cat([mixed[:, size:], moved, known], dim=1))
        share = share + facts @ self.fact_weight.T
        return torch.cat([share, query, mixed[:, :size], known], dim=1)


class RequestSide(nn.Module):
    """Probabilities of the candidates of one request, given their parts by `ItemSide`."""

    weight: Tensor
    user_weight: Tensor
    user_fact_weight: Tensor
    bias: Tensor

    def __init__(self, network: Network, spec: Spec, offset: float) -> None:
        super().__init__()
        self.network = network
        weights = Weights(network)
        user = [linear.user for linear in weights.linears]
        self.register_buffer("user_weight", torch.cat([one.weight for one in user]).detach())
        attention, bias = network.attention.value, torch.cat([one.bias for one in user]).detach()
        bias = bias + weights.attention @ attention.bias.detach()
        bias[-1] += network.logit.bias.detach()[0] + offset
        self.register_buffer("bias", bias)
        pooled = weights.attention @ attention.weight.detach()
        given = _GivenNumbers(network, spec, weights.numbers)
        columns = [pooled, weights.match, given.weight]
        self.given_numbers = given
        self.given_tables = _given_tables(network, spec, weights.fields)
        self.has_windows = bool(network.window_dim)
        if self.has_windows:
            self.dot = _cut(network.window_numbers, _DOT)
            self.user_facts = _cut(network.window_numbers, _USER_FACTS)
            self.register_buffer("user_fact_weight", weights.windows[:, _USER_FACTS])
            columns.append(weights.windows[:, _DOT])
        self.register_buffer("weight", torch.cat(columns, dim=1))
        self.sizes = [network.left.item.out_features, network.right.item.out_features]
        self.sizes += [network.first.item.out_features, 1]

    def names(self) -> list[str]:
        """Of the inputs, in order; what has no columns is not there."""
        names = ["user_cat", "user_num", "context_cat", "context_num"]
        names += ["history_item", "history_cat", "history_num", "match"]
        names += ["given_cat"] * bool(self.given_tables)
        names += ["given_num"] * bool(self.given_numbers.columns)
        windows = ["user_window", "user_window_present"] if self.has_windows else []
        return [*names, *windows, "item_part"]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Probabilities float32 [N] of the inputs, in the order of `names`."""
        x = dict(zip(self.names(), inputs, strict=True))
        logit = self._logit(x).clamp(-60.0, 60.0)
        # Spelled out: onnxruntime's Sigmoid is exact to 1e-7 only, which makes most ads equal.
        return 1.0 / (1.0 + torch.exp(-logit))

    def _logit(self, x: Batch) -> Tensor:
        network, steps = self.network, self.network.matched_fields.width + 2
        widths = [sum(self.sizes), steps, network.window_dim, 1]
        share, query, mixed, _ = torch.split(x["item_part"], widths, dim=1)
        user = [
            network.user_fields(x["user_cat"]),
            network.user_numbers(x["user_num"]),
            network.context_fields(x["context_cat"]),
            network.context_numbers(x["context_num"]),
        ]
        once = torch.cat(user, 1) @ self.user_weight.T + self.bias
        each = [self._pooled(x, query), network.match_numbers(x["match"])]
        if self.given_numbers.columns:
            each.append(self.given_numbers(x["given_num"]))
        if self.has_windows:
            window, known = x["user_window"], x["user_window_present"].any(1, keepdim=True)
            mixed_user, size = network.user_window(window, x["user_window_present"]), mixed.shape[1]
            of_user = torch.cat([mixed_user[:, size:], known.to(mixed_user.dtype)], dim=1)
            once = once + self.user_facts(of_user) @ self.user_fact_weight.T
            each.append(self.dot(mixed @ mixed_user[0, :size, None]))
        sums = torch.addmm(share + self._added(x, once), torch.cat(each, 1), self.weight.T)
        left, right, first, wide = torch.split(sums, self.sizes, dim=1)
        hidden = torch.relu(torch.addmm(first, left * right, network.interaction.weight.T))
        hidden = torch.relu(network.second(hidden))
        return torch.addmm(wide, hidden, network.logit.weight.T).squeeze(1)

    def _added(self, x: Batch, once_1H: Tensor) -> Tensor:
        """float32 [N or 1, H]: the user's share and those of the features that a request gives."""
        total = once_1H
        for column, table in enumerate(self.given_tables):
            rows, index = cast("Tensor", table.weight), x["given_cat"][:, column]
            if column or len(rows) > FEW_ROWS:
                total = total + functional.embedding(index, rows)
            else:  # added to the few rows of a table, and not to N of them
                total = functional.embedding(index, rows + total)
        return total

    def _pooled(self, x: Batch, query_NS: Tensor) -> Tensor:
        """The history as each candidate attends to it, float32 [N, S], before its projection."""
        steps_AS = torch.cat(
            [self.network.matched_fields(x["history_cat"]), torch.log1p(x["history_num"])], dim=2
        )[0]
        present_1A = (x["history_item"] > 0).to(steps_AS.dtype)
        absent_1A = (present_1A - 1.0) * 1e9
        weights_NA = torch.softmax(torch.addmm(absent_1A, query_NS, steps_AS.T), dim=1)
        # Without any step all weights are those of absent ones, which are zeros here.
        return weights_NA @ (steps_AS * present_1A.T)


class _GivenNumbers(nn.Module):
    """Numbers that only a request knows. `ItemSide` has counted them as missing, so the columns are
    what differs from that: the standardised value, and minus the mark of what is missing."""

    def __init__(self, network: Network, spec: Spec, weight: Tensor) -> None:
        super().__init__()
        features = spec.of("item", "numeric")
        self.columns = [place for place, feature in enumerate(features) if feature.given]
        self.standardise = _pick(network.item_numbers.standardise, self.columns)
        marks = [len(features) + place for place in self.columns]
        self.weight = weight[:, self.columns + marks]

    def forward(self, pairs: Tensor) -> Tensor:
        value, present = pairs[:, 0::2], pairs[:, 1::2]
        return torch.cat([self.standardise(value) * present, -present], dim=1)


def _given_tables(network: Network, spec: Spec, weight: Tensor) -> nn.ModuleList:
    """For each categorical feature that only a request knows, what its values add to the first
    layer beyond what *missing*, which `ItemSide` has counted, does: a table [rows, H]."""
    tables, start = nn.ModuleList(), 0
    for feature in spec.of("item", "categorical"):
        if not feature.dim:
            continue
        stop = start + feature.dim
        if feature.given:
            embedding = cast("Tensor", network.tables[feature.table].weight).detach()
            shares = (embedding - embedding[:1]) @ weight[:, start:stop].T
            tables.append(nn.Embedding(len(shares), shares.shape[1], _weight=shares))
        start = stop
    return tables


def _cut(whole: Standardise, columns: slice) -> Standardise:
    return _pick(whole, list(range(columns.start, columns.stop)))


def _pick(whole: Standardise, columns: list[int]) -> Standardise:
    """The same statistics of some of the columns."""
    part = Standardise(len(columns))
    part.mean.copy_(whole.mean[columns])
    part.scale.copy_(whole.scale[columns])
    return part
