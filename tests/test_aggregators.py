"""Every aggregator of a window treats absent months, and months that are there, as it must."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from training.aggregators import AGGREGATORS

NAMES = sorted(AGGREGATORS)
ALL_MONTHS = [name for name in NAMES if name != "newest"]


def aggregator(name: str, months: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layer = AGGREGATORS[name](5, months)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("name", NAMES)
def test_a_window_without_any_month_is_zeros(name: str) -> None:
    layer = aggregator(name)
    found = layer(torch.full((4, 3, 5), math.nan), torch.zeros(4, 3, dtype=torch.bool))
    assert torch.equal(found, torch.zeros(4, 5))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", [math.nan, math.inf, -1e30, 7.0])
def test_what_an_absent_month_holds_never_matters(name: str, content: float) -> None:
    layer, window = aggregator(name), torch.randn(8, 3, 5)
    present = torch.tensor([[bool(i & 1), bool(i & 2), bool(i & 4)] for i in range(8)])
    expected = layer(torch.where(present[..., None], window, 0.0), present)
    found = layer(torch.where(present[..., None], window, content), present)
    assert torch.equal(found, expected)
    assert found.isfinite().all()


@pytest.mark.parametrize("name", ALL_MONTHS)
def test_a_month_that_is_there_matters(name: str) -> None:
    layer, window = aggregator(name), torch.randn(1, 3, 5)
    present = torch.ones(1, 3, dtype=torch.bool)
    for month in range(3):
        other = window.clone()
        other[0, month] += 5.0
        assert not torch.allclose(layer(other, present), layer(window, present), atol=1e-3)


def test_the_newest_month_alone_matters_where_that_is_asked_for() -> None:
    layer, window = aggregator("newest"), torch.randn(1, 3, 5)
    present = torch.ones(1, 3, dtype=torch.bool)
    older = window.clone()
    older[:, 1:] += 1.0
    assert torch.equal(layer(older, present), window[:, 0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("months", [1, 2, 6])
def test_a_window_of_any_number_of_months_becomes_one_vector(name: str, months: int) -> None:
    layer = aggregator(name, months)
    found = layer(torch.randn(4, months, 5), torch.ones(4, months, dtype=torch.bool))
    assert found.shape == (4, 5)


@pytest.mark.parametrize("name", NAMES)
def test_a_window_is_aggregated_alone(name: str) -> None:
    layer, window, present = aggregator(name), torch.randn(6, 3, 5), torch.rand(6, 3) > 0.4
    together = layer(window, present)
    for row in range(6):
        alone = layer(window[row : row + 1], present[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone)


@pytest.mark.parametrize("name", NAMES)
def test_absent_months_get_no_gradient_and_none_is_nan(name: str) -> None:
    layer = aggregator(name)
    window = torch.randn(4, 3, 5, requires_grad=True)
    present = torch.tensor([[True, False, True], [False] * 3, [True] * 3, [False, True, False]])
    layer(window, present).sum().backward()
    assert window.grad is not None
    assert window.grad.isfinite().all()
    assert window.grad[~present].abs().sum() == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
