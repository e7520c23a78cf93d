"""Golden requests: what is written comes back exactly, and scores the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import DIM, ITEMS, add_bundle, body, make_place, settings_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bundle.artifact import open_artifact
from bundle.encode import Request
from bundle.golden import Golden, body_of, read_golden, request_of, write_golden
from service.decode import decode

VALUES = st.none() | st.text() | st.integers(-(2**63), 2**63 - 1) | st.floats(-1e300, 1e300)
NUMBERS = st.floats(0, 1e6)
IDS = st.text(min_size=1) | st.integers(-(2**63), 2**63 - 1)
NAMES = st.sets(st.text(), max_size=2)
WINDOWS = arrays.arrays(
    np.float32, (2, 3, DIM + 1), elements=st.floats(allow_nan=False, allow_infinity=False, width=32)
)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    num_items, num_history = draw(st.integers(1, 4)), draw(st.integers(0, 4))

    def column(values: st.SearchStrategy[object], num: int) -> list[Any]:
        return draw(st.lists(values, min_size=num, max_size=num))

    return Request(
        user_id=draw(IDS),
        item_ids=column(IDS, num_items),
        user_features=draw(st.dictionaries(st.text(), VALUES, max_size=3)),
        context=draw(st.dictionaries(st.text(), VALUES, max_size=3)),
        item_features={
            name: column(VALUES, num_items) for name in draw(st.sets(st.text(), max_size=2))
        },
        history_items=column(IDS, num_history),
        history_age_days=column(NUMBERS, num_history),
        history_count=column(NUMBERS, num_history),
    )


@settings(deadline=None, max_examples=50)
@given(request=requests(), windows=WINDOWS, scores=st.lists(st.floats(0, 1), max_size=4))
def test_requests_windows_and_scores_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    request: Request,
    windows: np.ndarray,
    scores: list[float],
) -> None:
    path = tmp_path_factory.getbasetemp() / "golden.json"
    given = {"item_window": windows, "item_window_present": windows[..., 0] > 0}
    write_golden(path, [Golden(request, given, np.array(scores))] * 2)
    read = read_golden(path)
    assert len(read) == 2
    assert read[1].request == request
    assert read[1].scores.tolist() == scores
    for name, array in given.items():
        assert read[1].windows[name].dtype == array.dtype
        assert np.array_equal(read[1].windows[name], array)


def test_the_body_of_a_request_is_what_the_service_takes_and_gives_the_request_back(
    tmp_path: Path,
) -> None:
    document = body(candidates={"id": ITEMS[:3], "features": {"price": [1, None, 2.5]}})
    assert body_of(request_of(document)) == document
    decoded = decode(json.dumps(document).encode(), settings_of(make_place(tmp_path)))
    assert body_of(decoded.to_encode()) == document


def test_tuples_and_lists_give_the_same_body() -> None:
    request = Request(1, (2, 3), {}, {}, {"price": (1, 2)}, (4,), (5.0,), (6.0,))
    assert body_of(request) == body_of(request_of(body_of(request)))


def test_the_golden_requests_of_a_bundle_open_with_it(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    goldens = open_artifact(place.registry.path(add_bundle(place))).golden
    assert [len(golden.scores) for golden in goldens] == [5, 2]
    for golden in goldens:
        num = len(golden.request.item_ids)
        assert {name: array.shape for name, array in golden.windows.items()} == {
            "user_window": (1, 3, DIM + 1),
            "user_window_present": (1, 3),
            "item_window": (num, 3, DIM + 1),
            "item_window_present": (num, 3),
        }
