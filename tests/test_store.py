"""One contract for all stores, then what only one of them can get wrong."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import (
    ClusterServers,
    Server,
    debian_redis,
    running_cluster,
    running_server,
)

from embeddings_store import (
    ENTITIES,
    Entity,
    PackedWindow,
    Reader,
    Snapshot,
    Store,
    StoreClosed,
    StoreCorrupt,
    WindowNotFound,
    WindowRef,
    Windows,
    open_store,
    pack_window,
    read_snapshot,
    window_months,
    write_snapshot,
)
from embeddings_store.buckets import ROWS_PER_BUCKET
from embeddings_store.precision import PRECISIONS

DIM = 4
WINDOW = "2017-06"
MONTHS = window_months(WINDOW)
UNKNOWN = WindowRef(WINDOW, "0" * 16)
LONG_MS = 2000.0  # for tests that are not about time

_prefixes = count()


def uint64(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.uint64)


def snapshot(month: str, ids: np.ndarray, seed: float = 0.0, dim: int = DIM) -> Snapshot:
    """Row of id i: i + seed in every place and in the bias, plus a tenth of the month."""
    value = (ids % np.uint64(1000)).astype(np.float32) + np.float32(seed + int(month[5:]) / 10)
    return Snapshot(month, ids, np.repeat(value[:, None], dim, axis=1), value)


def window_of(ids: np.ndarray, seed: float = 0.0, window: str = WINDOW) -> PackedWindow:
    """All ids present in all months, for users and items alike."""
    months = window_months(window)
    snapshots = {month: {e: snapshot(month, ids, seed) for e in ENTITIES} for month in months}
    return pack_window(window, snapshots, "float32")


def many_ids(num: int) -> np.ndarray:
    return np.unique(np.random.default_rng(7).integers(0, 2**64, num, dtype=np.uint64))


@dataclass
class Place:
    """Where a store is, so that a test can open it twice, from another process too."""

    url: str
    prefix: str

    def open(self, max_connections: int = 4) -> Store:
        return open_store(self.url, prefix=self.prefix, max_connections=max_connections)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as running:
        yield running


@pytest.fixture(scope="module")
def redis7() -> Iterator[Server]:
    with running_server(binary=debian_redis()) as running:
        yield running


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterServers]:
    with running_cluster() as running:
        yield running


@pytest.fixture(params=["embedded", "server", "redis7", "cluster"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "embedded":
        return Place(str(tmp_path / "store"), "unused")
    return Place(request.getfixturevalue(request.param).url, f"test{next(_prefixes)}")


@pytest.fixture
def redis_place(server: Server) -> Place:
    return Place(server.url, f"test{next(_prefixes)}")


def with_reader(store: Store, ref: WindowRef, use: Callable[[Reader], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        reader = await store.reader(ref)
        try:
            return await use(reader)
        finally:
            await reader.close()
            store.close()

    return asyncio.run(run())


def look(store: Store, ref: WindowRef, entity: Entity, ids: np.ndarray) -> Windows:
    return with_reader(store, ref, lambda r: r.lookup(entity, ids, deadline_ms=LONG_MS))


# The contract.


def test_a_lookup_keeps_the_order_of_ids_and_their_duplicates(place: Place) -> None:
    ref = place.open().publish(window_of(uint64(1, 2, 3)))
    got = look(place.open(), ref, "items", uint64(3, 1, 3, 2))
    assert got.vectors.shape == (4, 3, DIM + 1)
    assert got.vectors.dtype == np.float32
    assert got.vectors[:, 0, 0] == pytest.approx([3.6, 1.6, 3.6, 2.6])
    assert got.present.all()
    assert got.present.shape == (4, 3)


def test_months_are_newest_first_and_the_bias_is_last(place: Place) -> None:
    snapshots = {m: {e: snapshot(m, uint64(5)) for e in ENTITIES} for m in MONTHS}
    june = snapshots["2017-06"]["users"]
    snapshots["2017-06"]["users"] = replace(june, biases=np.array([-9], dtype=np.float32))
    ref = place.open().publish(pack_window(WINDOW, snapshots, "float32"))
    got = look(place.open(), ref, "users", uint64(5)).vectors[0]
    assert got[:, 0] == pytest.approx([5.6, 5.5, 5.4])
    assert got[:, -1] == pytest.approx([-9, 5.5, 5.4])


def test_rows_that_are_not_stored_are_zero_and_marked_absent(place: Place) -> None:
    ref = place.open().publish(window_of(uint64(1, 3)))
    got = look(place.open(), ref, "items", uint64(0, 1, 2, 3, 4, 2**64 - 1))
    there = np.array([False, True, False, True, False, False])
    assert (got.present == there[:, None]).all()
    assert not got.vectors[~there].any()
    assert got.vectors[there].all()


def test_a_month_without_the_id_is_zero_and_absent(place: Place) -> None:
    held = {MONTHS[0]: uint64(1, 2), MONTHS[1]: uint64(2), MONTHS[2]: uint64(2, 3)}
    snapshots = {m: {e: snapshot(m, ids) for e in ENTITIES} for m, ids in held.items()}
    ref = place.open().publish(pack_window(WINDOW, snapshots))
    got = look(place.open(), ref, "users", uint64(1, 2, 3))
    assert got.present.tolist() == [[True, False, False], [True] * 3, [False, False, True]]
    assert not got.vectors[~got.present].any()
    assert got.vectors[got.present].all()


def test_users_and_items_with_equal_ids_are_kept_apart(place: Place) -> None:
    snapshots = {
        m: {"users": snapshot(m, uint64(1)), "items": snapshot(m, uint64(1), seed=500)}
        for m in MONTHS
    }
    ref = place.open().publish(pack_window(WINDOW, snapshots))
    got = with_reader(place.open(), ref, lambda r: r.lookup_request(1, uint64(1, 2)))
    assert got.user.vectors[0, 0, 0] == pytest.approx(1.6, rel=1e-3)
    assert got.items.vectors[0, 0, 0] == pytest.approx(501.6, rel=1e-3)
    assert got.items.present[:, 0].tolist() == [True, False]


def test_a_request_without_items_and_a_lookup_of_nothing_are_empty(place: Place) -> None:
    ref = place.open().publish(window_of(uint64(1)))
    got = with_reader(place.open(), ref, lambda r: r.lookup_request(1, uint64()))
    assert got.user.present.all()
    assert got.items.vectors.shape == (0, 3, DIM + 1)
    assert look(place.open(), ref, "users", uint64()).present.shape == (0, 3)


def test_a_window_without_entities_can_be_published_and_read(place: Place) -> None:
    ref = place.open().publish(window_of(uint64()))
    assert not look(place.open(), ref, "items", uint64(1, 2)).present.any()


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_thousands_of_rows_come_back_as_they_were_packed(place: Place, dtype: Any) -> None:
    rng = np.random.default_rng(3)
    ids = many_ids(5000)
    snapshots = {
        month: {
            entity: Snapshot(
                month,
                ids,
                rng.normal(size=(len(ids), DIM)).astype(np.float32),
                rng.normal(size=len(ids)).astype(np.float32),
            )
            for entity in ENTITIES
        }
        for month in MONTHS
    }
    ref = place.open().publish(pack_window(WINDOW, snapshots, dtype))
    asked = rng.permutation(ids)[:3000]
    got = look(place.open(), ref, "items", asked)
    for slot, month in enumerate(MONTHS):
        expected = snapshots[month]["items"].vectors[np.searchsorted(ids, asked)]
        largest = np.abs(expected).max(axis=1, keepdims=True)
        tolerance = {"float16": 2**-11, "float32": 0, "int8": 1 / 250}[dtype] * largest
        assert (np.abs(got.vectors[:, slot, :DIM] - expected) <= tolerance + 1e-7).all()


def test_a_second_build_of_a_window_never_mixes_with_the_first(place: Place) -> None:
    store = place.open()
    old, new = window_of(uint64(1, 2)), window_of(uint64(2, 3), seed=100)
    refs = store.publish(old), store.publish(new)
    assert refs[0] != refs[1]
    assert store.windows() == sorted(refs)
    assert look(place.open(), refs[0], "items", uint64(1, 2, 3)).present[:, 0].tolist() == [1, 1, 0]
    got = look(place.open(), refs[1], "items", uint64(1, 2, 3))
    assert got.vectors[:, 0, 0] == pytest.approx([0, 102.6, 103.6])


def test_publishing_equal_content_again_changes_nothing(place: Place) -> None:
    store = place.open()
    assert store.publish(window_of(uint64(1))) == store.publish(window_of(uint64(1)))
    assert len(store.windows()) == 1
    assert look(place.open(), store.windows()[0], "items", uint64(1)).present.all()


def publish_and_die(url: str, prefix: str) -> None:
    """Runs in a process of its own, which is killed while the data is half written."""

    def die(done: int, total: int) -> None:
        if done * 2 >= total:
            signal.raise_signal(signal.SIGKILL)

    open_store(url, prefix=prefix).publish(window_of(many_ids(40_000)), progress=die)


def test_a_killed_publish_is_never_visible_and_completes_when_run_again(place: Place) -> None:
    code = f"import test_store; test_store.publish_and_die({place.url!r}, {place.prefix!r})"
    here = Path(__file__).parent
    path = {"PYTHONPATH": f"{here}:{here.parent}"}
    died = subprocess.run([sys.executable, "-c", code], env=path, timeout=60, check=False)
    assert died.returncode == -signal.SIGKILL
    store, window = place.open(), window_of(many_ids(40_000))
    assert store.windows() == []
    with pytest.raises(WindowNotFound):
        look(place.open(), window.ref, "items", many_ids(10))
    assert store.publish(window) == window.ref
    assert look(place.open(), window.ref, "items", many_ids(40_000)).present.all()
    store.check(window.ref)


def test_what_a_broken_off_publish_left_can_be_removed(place: Place) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    store, window = place.open(), window_of(many_ids(9000))
    with pytest.raises(KeyboardInterrupt):
        store.publish(window, progress=stop)
    store.remove(window.ref)
    with pytest.raises(WindowNotFound):
        store.remove(window.ref)


def test_an_unknown_window_is_not_found(place: Place) -> None:
    store = place.open()
    store.publish(window_of(uint64(1)))
    for action in (
        lambda: look(place.open(), UNKNOWN, "items", uint64(1)),
        lambda: store.remove(UNKNOWN),
        lambda: store.check(UNKNOWN),
    ):
        with pytest.raises(WindowNotFound, match=str(UNKNOWN)):
            action()


def test_a_removed_window_is_gone_and_others_stay(place: Place) -> None:
    store = place.open()
    keep = store.publish(window_of(uint64(1)))
    gone = store.publish(window_of(uint64(1), seed=1))
    store.remove(gone)
    assert store.windows() == [keep]
    with pytest.raises(WindowNotFound):
        look(place.open(), gone, "items", uint64(1))
    store.check(keep)


def test_a_stored_nan_or_infinity_makes_the_row_absent_and_is_counted(place: Place) -> None:
    window = window_of(uint64(1, 2, 3))
    window.tables["items"].block[0, 2, 1] = np.nan
    window.tables["items"].block[2, 0, DIM] = np.inf
    ref = place.open().publish(window)
    got = look(place.open(), ref, "items", uint64(1, 2, 3, 1, 9))
    assert got.present[:, 0].tolist() == [False, True, False, False, False]
    assert np.isfinite(got.vectors).all()
    assert not got.vectors[[0, 2, 3, 4]].any()
    assert got.num_invalid == 3


def test_ids_that_are_not_uint64_are_refused(place: Place) -> None:
    ref = place.open().publish(window_of(uint64(1)))
    with pytest.raises(ValueError, match="uint64"):
        look(place.open(), ref, "items", np.array([1.0]))


def test_a_closed_reader_says_so(place: Place) -> None:
    ref = place.open().publish(window_of(uint64(1)))

    async def run() -> None:
        reader = await place.open().reader(ref)
        assert (reader.ref, reader.dim) == (ref, DIM)
        await reader.close()
        with pytest.raises(StoreClosed):
            await reader.lookup("items", uint64(1))

    asyncio.run(run())


# Embedded only.


def test_a_truncated_file_is_a_clear_error_and_publishing_again_repairs_it(tmp_path: Path) -> None:
    store, window = open_store(f"file://{tmp_path}"), window_of(many_ids(100))
    block = tmp_path / "windows" / str(store.publish(window)) / "items" / "block.npy"
    block.write_bytes(block.read_bytes()[:-1])
    with pytest.raises(StoreCorrupt, match=r"items/block.npy has \d+ bytes, should have \d+"):
        look(store, window.ref, "items", uint64(1))
    store.publish(window)
    assert look(store, window.ref, "items", many_ids(100)).present.all()


def test_a_flipped_byte_is_found_by_check(tmp_path: Path) -> None:
    store, window = open_store(str(tmp_path)), window_of(many_ids(100))
    block = tmp_path / "windows" / str(store.publish(window)) / "users" / "block.npy"
    content = bytearray(block.read_bytes())
    content[-1] ^= 1
    block.write_bytes(content)
    with pytest.raises(StoreCorrupt, match=r"users/block\.npy: checksum"):
        store.check(window.ref)


@pytest.mark.parametrize(
    ("key", "value"),
    [("build", "f" * 16), ("dim", 7), ("dtype", "float16"), ("dtype", "int4"), ("files", 3)],
)
def test_meta_that_does_not_fit_the_files_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    store, window = open_store(str(tmp_path)), window_of(uint64(1))
    path = tmp_path / "windows" / str(store.publish(window)) / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(StoreCorrupt):
        look(store, window.ref, "items", uint64(1))


def test_a_snapshot_is_read_as_it_was_written_and_can_be_replaced(tmp_path: Path) -> None:
    for seed in (0.0, 5.0):
        wrote = snapshot("2017-05", many_ids(50), seed)
        assert write_snapshot(tmp_path, "users", wrote) == tmp_path / "snapshots/2017-05/users"
        got = read_snapshot(tmp_path, "users", "2017-05")
        assert np.array_equal(got.ids, wrote.ids)
        assert np.array_equal(got.vectors, wrote.vectors)
        assert np.array_equal(got.biases, wrote.biases)
    with pytest.raises(WindowNotFound):
        read_snapshot(tmp_path, "items", "2017-05")


def test_a_damaged_snapshot_names_its_file(tmp_path: Path) -> None:
    folder = write_snapshot(tmp_path, "items", snapshot("2017-05", uint64(1, 2)))
    vectors = folder / "vectors.npy"
    whole = vectors.read_bytes()
    vectors.write_bytes(whole[:-4])
    with pytest.raises(StoreCorrupt, match=r"vectors.npy has \d+ bytes"):
        read_snapshot(tmp_path, "items", "2017-05")
    vectors.write_bytes(whole[:-1] + b"\x7f")
    with pytest.raises(StoreCorrupt, match=r"vectors\.npy: checksum"):
        read_snapshot(tmp_path, "items", "2017-05")


# Redis only.


def test_removing_a_window_leaves_no_key_behind(server: Server, redis_place: Place) -> None:
    store, window = redis_place.open(), window_of(many_ids(9000))
    with redis.Redis(port=server.port) as client:
        before = client.dbsize()
        store.publish(window)
        assert client.dbsize() >= before + sum(9000 // rows for rows in ROWS_PER_BUCKET.values())
        store.remove(window.ref)
        assert client.dbsize() == before
        assert list(client.scan_iter(f"*{redis_place.prefix}*")) == []


def test_a_removal_that_was_broken_off_hides_the_window_and_completes(redis_place: Place) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    store, window = redis_place.open(), window_of(many_ids(9000))
    store.publish(window)
    with pytest.raises(KeyboardInterrupt):
        store.remove(window.ref, progress=stop)
    assert store.windows() == []
    store.remove(window.ref)
    with pytest.raises(WindowNotFound):
        store.remove(window.ref)


def test_more_lookups_than_connections_wait_for_their_turn(redis_place: Place) -> None:
    ids = many_ids(100)
    ref = redis_place.open().publish(window_of(ids))

    async def use(reader: Reader) -> list[Windows]:
        lookups = (reader.lookup("items", ids, deadline_ms=LONG_MS) for _ in range(50))
        return await asyncio.gather(*lookups)

    answers = with_reader(redis_place.open(max_connections=2), ref, use)
    assert all(answer.present.all() for answer in answers)


# Packing.


@given(st.dates().filter(lambda date: date.year >= 2))
def test_the_months_of_a_window_go_back_one_by_one_across_year_ends(date: Any) -> None:
    months = window_months(f"{date.year:04d}-{date.month:02d}")
    numbers = [int(month[:4]) * 12 + int(month[5:]) for month in months]
    assert numbers == [numbers[0], numbers[0] - 1, numbers[0] - 2]
    assert months[0] == f"{date.year:04d}-{date.month:02d}"


def test_january_reaches_back_into_the_year_before() -> None:
    assert window_months("2017-01") == ("2017-01", "2016-12", "2016-11")
    assert window_months("2017-06") == ("2017-06", "2017-05", "2017-04")


@pytest.mark.parametrize(
    "name", ["2017-13", "2017-00", "201706", "2017-6", "2017-06-", "", "0000-01"]
)
def test_a_name_that_is_no_month_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"window|month"):
        window_months(name)


def test_a_window_ref_reads_back_from_its_text() -> None:
    ref = window_of(uint64(1)).ref
    assert WindowRef.parse(str(ref)) == ref
    for text in ("2017-06", "2017-06-xyz", "2017-06-../../../etc/", "2017-06:" + ref.build):
        with pytest.raises(ValueError, match="must"):
            WindowRef.parse(text)


held_ids = st.sets(st.integers(0, 40), max_size=20).map(lambda ids: uint64(*sorted(ids)))


@settings(max_examples=60, deadline=None)
@given(ids=st.tuples(held_ids, held_ids, held_ids), seed=st.integers(0, 2**32 - 1))
def test_packing_joins_the_months_on_id_within_half_precision(ids: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    snapshots = {
        month: {
            entity: Snapshot(
                month,
                held,
                rng.normal(scale=10, size=(len(held), DIM)).astype(np.float32),
                rng.normal(size=len(held)).astype(np.float32),
            )
            for entity in ENTITIES
        }
        for month, held in zip(MONTHS, ids, strict=True)
    }
    table = pack_window(WINDOW, snapshots).tables["users"]
    assert set(table.ids.tolist()) == set(np.concatenate(ids).tolist())
    for row, entity_id in enumerate(table.ids.tolist()):
        for slot, month in enumerate(MONTHS):
            source = snapshots[month]["users"]
            at = np.flatnonzero(source.ids == np.uint64(entity_id))
            assert bool(table.bits[row] >> slot & 1) == bool(at.size)
            expected = np.zeros(DIM + 1)
            if at.size:
                expected = np.append(source.vectors[at[0]], source.biases[at[0]])
            assert table.block[row, slot] == pytest.approx(expected, rel=2**-11, abs=2**-24)


def test_the_build_depends_on_content_dtype_and_month_and_on_nothing_else() -> None:
    def build(seed: float = 0.0, dtype: Any = "float16", window: str = WINDOW) -> str:
        months = window_months(window)
        snapshots = {m: {e: snapshot("2017-01", uint64(1), seed) for e in ENTITIES} for m in months}
        return pack_window(window, snapshots, dtype).ref.build

    builds = [build(), build(seed=1), build(dtype="float32"), build(window="2017-05")]
    assert len(set(builds)) == 4
    assert build() == builds[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 70_000.0])
@pytest.mark.parametrize("where", ["vectors", "biases"])
def test_a_value_that_cannot_be_stored_names_its_id_and_month(value: float, where: str) -> None:
    snapshots = {m: {e: snapshot(m, uint64(3, 77)) for e in ENTITIES} for m in MONTHS}
    array = getattr(snapshots["2017-05"]["items"], where)
    array[1, ...] = value
    with pytest.raises(ValueError, match=r"items snapshot 2017-05, id 77: .* \(1 such ids\)"):
        pack_window(WINDOW, snapshots)


def test_a_window_that_lacks_a_month_or_mixes_sizes_is_refused() -> None:
    snapshots = {m: {e: snapshot(m, uint64(1)) for e in ENTITIES} for m in MONTHS}
    with pytest.raises(ValueError, match="2017-04"):
        pack_window(WINDOW, {m: snapshots[m] for m in MONTHS[:2]})
    snapshots["2017-05"]["users"] = snapshot("2017-05", uint64(1), dim=DIM + 1)
    with pytest.raises(ValueError, match="different sizes"):
        pack_window(WINDOW, snapshots)


@pytest.mark.parametrize("ids", [uint64(2, 1), uint64(1, 1), np.array([1, 2])])
def test_snapshot_ids_must_be_sorted_unique_uint64(ids: np.ndarray) -> None:
    with pytest.raises(ValueError, match="ids must be"):
        Snapshot("2017-06", ids, np.zeros((2, DIM), np.float32), np.zeros(2, np.float32))
