"""The training loop: the same under a seed, honest about sampled negatives, ready for absence."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, timedelta
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from scipy.special import expit
from torch import Tensor

from embeddings_store.window import all_absent
from training.config import FitConfig
from training.events import EventLog
from training.examples import Examples, builder_for
from training.fit import fit, predict, ranking_loss
from training.metrics import measure
from training.network import Network
from training.parts import Parts
from training.tables import SPARSE_ROWS, Block
from training.workspace import Workspace

CONFIG = FitConfig(batch_size=128, warm_up_steps=5)


@pytest.fixture(scope="module")
def examples(tiny_workspace: Workspace, tiny_log: EventLog) -> Examples:
    first, last = tiny.ASOF - timedelta(days=21), tiny.ASOF - timedelta(days=1)
    return builder_for(tiny_workspace, tiny_log, first, last).build(
        tiny_log.rows("ad", first, last)
    )


def made(log: EventLog, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(log.spec, log.encoder, tiny.RECIPE.network, tiny.RECIPE.tpm.dim)


def fitted(
    log: EventLog, examples: Examples, config: FitConfig = CONFIG, seed: int = 0
) -> tuple[Network, float]:
    network = made(log)
    return network, fit(network, examples, config, seed, "test")


def state(network: Network) -> dict[str, Tensor]:
    return network.state_dict()


def test_the_same_seed_gives_the_same_loss_and_the_same_tensors(
    tiny_log: EventLog, examples: Examples
) -> None:
    (one, first), (other, second) = (fitted(tiny_log, examples) for _ in range(2))
    assert first == second
    assert all(torch.equal(tensor, state(other)[name]) for name, tensor in state(one).items())


def test_another_seed_gives_another_loss(tiny_log: EventLog, examples: Examples) -> None:
    assert fitted(tiny_log, examples)[1] != fitted(tiny_log, examples, seed=1)[1]


def test_fitting_lowers_the_loss_and_ranks_better_than_chance(
    tiny_log: EventLog, examples: Examples
) -> None:
    _, start = fitted(tiny_log, examples, replace(CONFIG, learning_rate=0, table_learning_rate=0))
    network, end = fitted(tiny_log, examples, replace(CONFIG, passes=5))
    assert end < 0.95 * start
    found = measure(predict(network, examples), examples.label, examples.user_row)
    assert found.auc > 0.65


def test_every_parameter_learns_small_and_large_tables_too(
    tiny_log: EventLog, examples: Examples
) -> None:
    before = state(made(tiny_log))
    network, _ = fitted(tiny_log, examples)
    large = [name for name, p in network.named_parameters() if len(p) >= SPARSE_ROWS]
    assert large, "the tiny data set has a table that is updated by rows"
    changed = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {name for name, _ in network.named_parameters()}


def test_rows_of_a_large_table_that_no_batch_touched_stay_as_they_were(
    tiny_log: EventLog, examples: Examples
) -> None:
    before = state(made(tiny_log))["tables.brand.weight"]
    network, _ = fitted(tiny_log, examples)
    column = [f.name for f in tiny_log.spec.of("item", "categorical")].index("brand")
    touched = set(examples.item_cat[:, column].tolist())
    moved = (network.tables["brand"].weight != before).any(1).nonzero()[:, 0].tolist()
    assert set(moved) == touched


def test_one_part_is_the_same_as_all_rows(tiny_log: EventLog, examples: Examples) -> None:
    network, parts = made(tiny_log), Parts([lambda: examples])
    loss = fit(network, parts, replace(CONFIG, passes=2), 0, "test")
    other, expected = fitted(tiny_log, examples, replace(CONFIG, passes=2))
    assert loss == expected
    assert all(torch.equal(tensor, state(other)[name]) for name, tensor in state(network).items())


def test_parts_are_learned_from_oldest_first_once_a_pass(
    tiny_log: EventLog, examples: Examples
) -> None:
    halves = np.array_split(np.arange(len(examples)), 2)
    asked: list[int] = []

    def build(number: int) -> Examples:
        asked.append(number)
        return examples.take(halves[number])

    parts = Parts([partial(build, number) for number in range(2)])
    fit(made(tiny_log), parts, replace(CONFIG, passes=2), 0, "test")
    # The newest comes first for its statistics.
    assert asked == [1, 0, 1, 0, 1]


def test_statistics_of_parts_are_those_of_the_newest(
    tiny_log: EventLog, examples: Examples
) -> None:
    older = replace(examples, item_num=np.ones_like(examples.item_num))
    network, alone = made(tiny_log), made(tiny_log)
    fit(network, Parts([lambda: older, lambda: examples]), CONFIG, 0, "test")
    fit(alone, examples, CONFIG, 0, "test")
    of = [n.item_numbers.standardise.mean for n in (network, alone)]
    assert torch.equal(of[0], of[1])


def test_only_dense_parameters_follow_the_schedule(
    tiny_log: EventLog, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adagrad has one of its own: a row that first comes late learns as much as an early one."""
    rates: list[float] = []
    step = Block.step
    monkeypatch.setattr(
        Block, "step", lambda self, rate, team: (rates.append(rate), step(self, rate, team))
    )
    fitted(tiny_log, examples)
    assert len(rates) > 5
    assert set(rates) == {CONFIG.large_table_learning_rate}


def test_a_large_table_starts_as_next_to_nothing(tiny_log: EventLog) -> None:
    tables = made(tiny_log).state_dict()
    deviations = {n: float(t.std()) for n, t in tables.items() if n.startswith("tables.")}
    assert deviations.pop("tables.brand.weight") == pytest.approx(1e-4, rel=0.1)
    assert min(deviations.values()) > 5e-3


def test_sampled_negatives_do_not_make_clicks_look_likely(
    tiny_log: EventLog, examples: Examples
) -> None:
    """The logit is that of the whole traffic, so predictions sum to the real positives there."""
    ten_times = replace(examples, weight=np.full_like(examples.weight, 10.0))
    network, _ = fitted(tiny_log, ten_times, replace(CONFIG, passes=5))
    times = np.where(ten_times.label > 0, 1.0, ten_times.weight)
    predicted = float((expit(predict(network, ten_times)) * times).sum())
    assert predicted == pytest.approx(float(examples.label.sum()), rel=0.3)


def test_a_network_whose_windows_were_always_hidden_learns_nothing_of_them(
    tiny_log: EventLog, examples: Examples
) -> None:
    hidden = replace(CONFIG, hidden_share=1.0)
    vectors = np.random.default_rng(0).normal(size=examples.item_windows.vectors.shape)
    other = replace(
        examples.item_windows, vectors=vectors.astype(examples.item_windows.vectors.dtype)
    )
    untouched = state(made(tiny_log))["item_window.key.weight"]
    losses = []
    for given in (examples, replace(examples, item_windows=other)):
        network = made(tiny_log)
        # Statistics are taken of windows that are not hidden; here both have those of one.
        network.fit_statistics = lambda _: None  # type: ignore[method-assign,assignment]
        losses.append(fit(network, given, replace(hidden, weight_decay=0.0), 0, "test"))
        assert torch.equal(state(network)["item_window.key.weight"], untouched)
    assert losses[0] == losses[1]
    visible = [
        fitted(tiny_log, given, replace(CONFIG, hidden_share=0.0))[1]
        for given in (examples, replace(examples, item_windows=other))
    ]
    assert visible[0] != visible[1]


def test_statistics_are_those_of_the_rows_it_is_fitted_on(
    tiny_log: EventLog, examples: Examples
) -> None:
    network, _ = fitted(tiny_log, examples)
    batch = examples.batch(np.arange(len(examples)))
    found = network.item_numbers(batch["item_num"])
    moving = batch["item_num"].std(0) > 0.01
    torch.testing.assert_close(
        found[:, moving].mean(0), torch.zeros(int(moving.sum())), atol=0.1, rtol=0
    )


def test_predictions_are_in_the_order_of_the_rows_and_change_nothing(
    tiny_log: EventLog, examples: Examples
) -> None:
    network, _ = fitted(tiny_log, examples)
    before = {name: tensor.clone() for name, tensor in state(network).items()}
    logits = predict(network, examples)
    assert logits.dtype == np.float64
    assert len(logits) == len(examples)
    with torch.no_grad():
        own = network(examples.batch(np.array([3, 8])))
    np.testing.assert_allclose(logits[[3, 8]], own.numpy(), atol=1e-5)
    assert np.array_equal(predict(network, examples), logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(network).items())


def test_predictions_of_many_rows_are_those_of_few(tiny_log: EventLog, examples: Examples) -> None:
    network, _ = fitted(tiny_log, examples)
    parts = [examples.since(day) for day in (date(2017, 3, 1), tiny.ASOF - timedelta(days=3))]
    few = predict(network, parts[1])
    np.testing.assert_allclose(predict(network, parts[0])[-len(few) :], few, atol=1e-5)


def test_a_fitted_network_gives_finite_scores_without_any_window(
    tiny_log: EventLog, examples: Examples
) -> None:
    network, _ = fitted(tiny_log, examples)
    dim = examples.window_dim
    sides = len(examples.sides.user_cat)
    absent = all_absent(sides, dim)
    without = replace(
        examples,
        item_windows=all_absent(len(examples.item_windows.present), dim),
        sides=replace(
            examples.sides, user_window=absent.vectors, user_window_present=absent.present
        ),
    )
    scores = expit(predict(network, without))
    assert np.isfinite(scores).all()
    assert 0.2 < scores.sum() / expit(predict(network, examples)).sum() < 5


def test_the_ranking_loss_is_the_softmax_within_each_request() -> None:
    logit, label = torch.tensor([1.0, 90.0, -2.0, 0.5, 3.0]), torch.tensor([1.0, 0, 0, 0, 1])
    request_id = np.array([7, 3, 7, 3, 3])
    of_seven = torch.log_softmax(logit[[0, 2]], 0)[0]
    of_three = torch.log_softmax(logit[[1, 3, 4]], 0)[2]
    expected = -(of_seven + of_three) / 5
    torch.testing.assert_close(ranking_loss(logit, label, request_id), expected)
    assert ranking_loss(logit, torch.zeros(5), request_id) == 0
