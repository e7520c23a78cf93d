"""TPM windows put onto examples that were built without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from embeddings_store import Windows
from embeddings_store.window import all_absent
from training.events import EventLog, Ints
from training.examples import Examples, month_before
from training.tpm import months_until
from training.workspace import Workspace

_STORED = 3
"""Months of a window in the store."""


@dataclass(frozen=True)
class Pair:
    """One window of all users and of all items, in the log's row order."""

    users: Windows
    items: Windows


def load_windows(
    workspace: Workspace, log: EventLog, months: Sequence[str], size: int, dim: int
) -> dict[str, Pair]:
    """Windows of `size` months by their newest one; up to six, put together from stored ones."""
    wanted = {m for month in months for m in _parts(month, size)}
    # What is not there yet is absent: the log has a beginning.
    known = [m for m in sorted(wanted) if set(months_until(m, _STORED)) <= set(workspace.months())]
    tables = workspace.windows(log, known)
    nothing = Pair(all_absent(len(log.users.ids), dim), all_absent(len(log.items.ids), dim))
    stored = {m: Pair(t.users, t.items) for m, t in tables.items()}
    found = {}
    for month in months:
        parts = [stored.get(m, nothing) for m in _parts(month, size)]
        users, items = [p.users for p in parts], [p.items for p in parts]
        found[month] = Pair(_joined(users, size), _joined(items, size))
    return found


def attach(examples: Examples, log: EventLog, windows: Mapping[str, Pair]) -> Examples:
    """The same examples, each row with the window of its day: by the newest month before it."""
    user, day = _sides(examples)
    months = months_of(examples)
    place = {month: i for i, month in enumerate(months)}
    of_side = np.array([place.get(month_before(d), 0) for d in day.tolist()], np.int64)
    of_row = of_side[examples.side]
    users = _stacked([windows[m].users for m in months])
    items = _stacked([windows[m].items for m in months])
    user_row = of_side * len(log.users.ids) + user
    sides = replace(
        examples.sides,
        user_window=users.vectors[user_row],
        user_window_present=users.present[user_row],
    )
    item_row = of_row * len(log.items.ids) + item_rows(examples, log)
    return replace(examples, sides=sides, item_windows=items, item_window_row=item_row)


def months_of(examples: Examples) -> list[str]:
    """The months whose window some row sees."""
    return sorted({month_before(day) for day in np.unique(examples.day).tolist()})


def item_rows(examples: Examples, log: EventLog) -> Ints:
    """Row int64 [n] of each example's item in the log's item table."""
    keys = log.items.keys.astype(np.int64)
    order = np.argsort(keys)
    rows: Ints = order[np.searchsorted(keys[order], examples.item_key)]
    return rows


def hide(examples: Examples, which: Sequence[str]) -> Examples:
    """The same examples with the windows of "user" or "item", or both, away."""
    if "user" in which:
        absent = np.zeros_like(examples.sides.user_window_present)
        examples = replace(examples, sides=replace(examples.sides, user_window_present=absent))
    if "item" in which:
        absent = np.zeros_like(examples.item_windows.present)
        windows = Windows(examples.item_windows.vectors, absent)
        examples = replace(examples, item_windows=windows)
    return examples


def _parts(month: str, size: int) -> list[str]:
    """The stored windows, by their newest month, that make up one of `size` months."""
    return months_until(month, size)[::-1][::_STORED]


def _joined(parts: Sequence[Windows], size: int) -> Windows:
    vectors = np.concatenate([p.vectors for p in parts], axis=1)[:, :size]
    return Windows(vectors, np.concatenate([p.present for p in parts], axis=1)[:, :size])


def _stacked(parts: Sequence[Windows]) -> Windows:
    vectors = np.concatenate([p.vectors for p in parts])
    return Windows(vectors, np.concatenate([p.present for p in parts]))


def _sides(examples: Examples) -> tuple[Ints, npt.NDArray[np.datetime64]]:
    """User row int64 [S] and day [S] of each side."""
    num = len(examples.sides.user_cat)
    user, day = np.zeros(num, np.int64), np.zeros(num, "datetime64[D]")
    user[examples.side], day[examples.side] = examples.user_row, examples.day
    return user, day
