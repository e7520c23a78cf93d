"""Metrics against slow references and scikit-learn, and how sure of them we are."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.metrics import log_loss, roc_auc_score

from training.metrics import Floats, Ints, gauc_interval, measure, user_aucs

unhurried = settings(deadline=None, max_examples=60)
rows = st.lists(
    st.tuples(
        # Few values, so that there are many ties.
        st.sampled_from([-3.0, -0.5, 0.0, 0.25, 2.0]) | st.floats(-50, 50),
        st.integers(0, 1),
        st.integers(-3, 3),
    ),
    min_size=1,
    max_size=40,
)


def columns(drawn: list[tuple[float, int, int]]) -> tuple[Floats, np.ndarray, Ints]:
    score, label, user = zip(*drawn, strict=True)
    return np.array(score), np.array(label, np.float32), np.array(user)


def slow_auc(score: Floats, label: np.ndarray) -> float:
    """Share of pairs of a positive and a negative in the right order; a tie is half right."""
    wins = [
        1.0 if positive > negative else 0.5 if positive == negative else 0.0
        for positive in score[label == 1]
        for negative in score[label == 0]
    ]
    return sum(wins) / len(wins) if wins else math.nan


def slow_gauc(score: Floats, label: np.ndarray, user: Ints) -> tuple[float, int]:
    """GAUC, and how many users are left out of it."""
    total = weight = 0.0
    left_out = 0
    for one in sorted(set(user.tolist())):
        own = user == one
        auc = slow_auc(score[own], label[own])
        if math.isnan(auc):
            left_out += 1
            continue
        total += auc * own.sum()
        weight += own.sum()
    return (total / weight if weight else math.nan), left_out


def example(num_users: int, seed: int = 0) -> tuple[Floats, np.ndarray, Ints]:
    """Scores that say something about labels, 20 rows a user."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(num_users), 20)
    score = rng.normal(size=len(user))
    label = (rng.random(len(user)) < expit(score - 1)).astype(np.float32)
    return score, label, user


@unhurried
@given(rows)
def test_the_auc_of_every_user_is_that_of_counting_pairs(
    drawn: list[tuple[float, int, int]],
) -> None:
    score, label, user = columns(drawn)
    found = user_aucs(score, label, user)
    expected = [slow_auc(score[user == one], label[user == one]) for one in np.unique(user)]
    np.testing.assert_allclose(found.auc, expected, atol=1e-12)
    assert found.impressions.tolist() == [int((user == one).sum()) for one in np.unique(user)]


@unhurried
@given(rows)
def test_gauc_and_the_number_of_users_left_out_are_those_of_the_slow_way(
    drawn: list[tuple[float, int, int]],
) -> None:
    score, label, user = columns(drawn)
    gauc, left_out = slow_gauc(score, label, user)
    assume(not math.isnan(gauc))
    found = measure(score, label, user)
    assert found.gauc == pytest.approx(gauc, abs=1e-12)
    assert found.one_class_users == left_out
    assert found.users == len(set(user.tolist()))
    assert (found.rows, found.positives) == (len(label), int(label.sum()))


@unhurried
@given(rows)
def test_auc_log_loss_and_calibration_agree_with_scikit_learn(
    drawn: list[tuple[float, int, int]],
) -> None:
    score, label, user = columns(drawn)
    assume(not math.isnan(slow_gauc(score, label, user)[0]))
    found = measure(score, label, user)
    assert found.auc == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    assert found.auc == pytest.approx(slow_auc(score, label), abs=1e-12)
    assert found.log_loss == pytest.approx(log_loss(label, expit(score)), abs=1e-12)
    assert found.pcoc == pytest.approx(expit(score).sum() / label.sum())


def test_a_shift_of_one_users_scores_changes_auc_and_not_gauc() -> None:
    score, label, user = example(50)
    shifted = score + 100.0 * (user % 2)
    assert measure(shifted, label, user).gauc == pytest.approx(measure(score, label, user).gauc)
    assert measure(shifted, label, user).auc < measure(score, label, user).auc - 0.05


def test_equal_scores_are_worth_a_half() -> None:
    _, label, user = example(5)
    found = measure(np.zeros(len(label)), label, user)
    assert (found.auc, found.gauc) == (0.5, 0.5)


def test_users_with_one_class_only_change_nothing_but_their_count() -> None:
    score, label, user = example(10)
    before = measure(score, label, user)
    more = np.concatenate([user, [100] * 7, [101] * 5])
    score = np.concatenate([score, np.linspace(-9, 9, 12)])
    label = np.concatenate([label, np.ones(7), np.zeros(5)]).astype(np.float32)
    after = measure(score, label, more)
    assert after.gauc == pytest.approx(before.gauc)
    assert after.one_class_users == before.one_class_users + 2


def test_gauc_of_nobody_with_both_classes_is_an_error_and_not_a_number() -> None:
    with pytest.raises(ValueError, match="no user has both"):
        user_aucs(np.zeros(4), np.array([1, 1, 0, 0], np.float32), np.array([1, 1, 2, 2])).mean()


def test_a_model_that_says_twice_as_much_as_happens_has_a_calibration_of_two() -> None:
    label = np.array([1, 0, 0, 0, 1, 0, 0, 0], np.float32)
    logit = np.full(8, 0.0)
    assert measure(logit, label, np.zeros(8, np.int64)).pcoc == pytest.approx(2.0)


def test_the_interval_contains_the_point_and_narrows_with_more_users() -> None:
    widths = []
    for num_users in (30, 300):
        score, label, user = example(num_users)
        low, high = gauc_interval(score, None, label, user, resamples=200)
        assert low < measure(score, label, user).gauc < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_a_model_has_no_lift_over_itself() -> None:
    score, label, user = example(40)
    assert gauc_interval(score, score.copy(), label, user, resamples=100) == (0.0, 0.0)


def test_a_better_model_has_a_lift_above_zero_and_a_worse_one_below() -> None:
    score, label, user = example(100)
    noisy = score + np.random.default_rng(1).normal(size=len(score), scale=2.0)
    low, high = gauc_interval(score, noisy, label, user, resamples=200)
    assert 0 < low < high
    back_low, back_high = gauc_interval(noisy, score, label, user, resamples=200)
    assert (back_low, back_high) == pytest.approx((-high, -low))


def test_a_paired_lift_is_surer_than_two_intervals_apart() -> None:
    score, label, user = example(100)
    close = score + np.random.default_rng(1).normal(size=len(score), scale=0.1)
    low, high = gauc_interval(score, close, label, user, resamples=200)
    alone_low, alone_high = gauc_interval(score, None, label, user, resamples=200)
    assert high - low < (alone_high - alone_low) / 2


def test_the_same_seed_gives_the_same_interval() -> None:
    score, label, user = example(20)
    first, second = (gauc_interval(score, None, label, user, 3, resamples=50) for _ in range(2))
    assert first == second
    assert gauc_interval(score, None, label, user, 4, resamples=50) != first
