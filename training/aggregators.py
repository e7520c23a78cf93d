"""How a TPM window, one vector per month, becomes one vector.

Every aggregator reads float32 [B, M, D] and its presence bool [B, M], newest month first, and gives
float32 [B, D]: zeros for whom no month is there. `SelfAttention` is the method's own; the others
are what it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Each month attends to all that are present; the result is the mean over them."""

    def __init__(self, size: int, months: int, hidden: int = 16) -> None:
        super().__init__()
        self.query, self.key = (
            nn.Linear(size, hidden, bias=False),
            nn.Linear(size, hidden, bias=False),
        )
        self.value = nn.Linear(size, size, bias=False)
        self.month = nn.Parameter(torch.zeros(months))
        nn.init.eye_(self.value.weight)
        self._scale = hidden**-0.5

    def forward(self, window_BMD: Tensor, present_BM: Tensor) -> Tensor:
        window = _known(window_BMD, present_BM)
        scores = self.query(window) @ self.key(window).transpose(1, 2) * self._scale + self.month
        scores = torch.where(present_BM[:, None, :], scores, -1e9)
        mixed: Tensor = torch.softmax(scores, dim=2) @ self.value(window)
        return _mean(mixed, present_BM)


class AdditiveAttention(nn.Module):
    """One learned score per month, of its vector and its age (Bahdanau et al., arXiv 1409.0473)."""

    def __init__(self, size: int, months: int, hidden: int = 16) -> None:
        super().__init__()
        self.hidden = nn.Linear(size, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)
        self.month = nn.Parameter(torch.zeros(months))

    def forward(self, window_BMD: Tensor, present_BM: Tensor) -> Tensor:
        window = _known(window_BMD, present_BM)
        scores = self.score(torch.tanh(self.hidden(window)))[..., 0] + self.month
        scores = torch.where(present_BM, scores, -1e9)
        weights_BM = torch.softmax(scores, dim=1) * present_BM
        pooled: Tensor = (weights_BM[..., None] * window).sum(1)
        return pooled


class Mean(nn.Module):
    """The mean of the months that are there."""

    def __init__(self, size: int, months: int) -> None:
        super().__init__()

    def forward(self, window_BMD: Tensor, present_BM: Tensor) -> Tensor:
        return _mean(window_BMD, present_BM)


class Max(nn.Module):
    """The largest value of each dimension among the months that are there."""

    def __init__(self, size: int, months: int) -> None:
        super().__init__()

    def forward(self, window_BMD: Tensor, present_BM: Tensor) -> Tensor:
        largest = torch.where(present_BM[..., None], window_BMD, -torch.inf).amax(1)
        return torch.where(present_BM.any(1, keepdim=True), largest, 0.0)


class Concatenation(nn.Module):
    """A linear map of all months side by side, zeros for those that are absent; it starts as their
    mean."""

    def __init__(self, size: int, months: int) -> None:
        super().__init__()
        self.mix = nn.Linear(months * size, size, bias=False)
        with torch.no_grad():
            self.mix.weight.copy_(torch.eye(size).repeat(1, months) / months)

    def forward(self, window_BMD: Tensor, present_BM: Tensor) -> Tensor:
        mixed: Tensor = self.mix(_known(window_BMD, present_BM).flatten(1))
        return mixed


class Newest(nn.Module):
    """The newest month alone."""

    def __init__(self, size: int, months: int) -> None:
        super().__init__()

    def forward(self, window_BMD: Tensor, present_BM: Tensor) -> Tensor:
        return _known(window_BMD, present_BM)[:, 0]


AGGREGATORS: dict[str, Callable[[int, int], nn.Module]] = {
    "self_attention": SelfAttention,
    "additive_attention": AdditiveAttention,
    "mean": Mean,
    "max": Max,
    "concatenation": Concatenation,
    "newest": Newest,
}
"""By the name that `NetworkConfig.aggregator` has."""


def _known(window_BMD: Tensor, present_BM: Tensor) -> Tensor:
    """What is absent is zero, whatever its bytes were."""
    return torch.where(present_BM[..., None], window_BMD, 0.0)


def _mean(rows_BMD: Tensor, present_BM: Tensor) -> Tensor:
    marks = present_BM.to(rows_BMD.dtype)[..., None]
    total: Tensor = torch.where(present_BM[..., None], rows_BMD, 0.0).sum(1)
    return total / marks.sum(1).clamp(min=1.0)
