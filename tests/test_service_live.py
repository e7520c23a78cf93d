"""What goes live: good bundles at once and without a gap, bad ones never."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest
from bundles import (
    ITEMS,
    Place,
    add_bundle,
    add_live_bundle,
    body,
    constant,
    edit_graph,
    eventually,
    make_place,
    make_window,
    point_at,
    reach_outside,
    rename_input,
    serving,
    settings_of,
    widen_input,
)
from servers import running_server

from embeddings_store import (
    Reader,
    RequestWindows,
    Store,
    StoreTimeout,
    WindowRef,
    Windows,
)
from service.scorer import Scorer
from service.vetting import load


def live_id(client: httpx.Client) -> str | None:
    live = client.get("/v1/models").json()["live"]
    return str(live["id"]) if live else None


def last_refusal(client: httpx.Client) -> dict[str, str]:
    refusals: list[dict[str, str]] = client.get("/v1/models").json()["refusals"]
    return refusals[0] if refusals else {"kind": "none", "bundle": "none"}


def scores(client: httpx.Client, num: int = 3) -> tuple[str, tuple[float, ...]]:
    """Which model answered, and what."""
    response = client.post("/v1/score", json=body(num=num))
    assert response.status_code == 200, response.text
    return response.json()["model"], tuple(response.json()["scores"])


def test_a_promoted_bundle_goes_live_without_a_restart(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    first = add_live_bundle(place)
    with serving(settings_of(place)) as client:
        assert scores(client)[0] == first
        second = add_live_bundle(place, bias=1.0)
        eventually(lambda: live_id(client) == second)
        assert scores(client)[0] == second
        place.registry.rollback()
        eventually(lambda: live_id(client) == first)
        text = client.get("/metrics").text
    assert "ecdctr_swaps_total 3.0" in text
    assert f'ecdctr_live_model{{model="{first}",window="{place.window.ref}"}} 1.0' in text
    assert f'ecdctr_live_model{{model="{second}",window="{place.window.ref}"}} 0.0' in text


def test_without_a_bundle_it_runs_says_why_it_is_not_ready_and_takes_the_first_one(
    tmp_path: Path,
) -> None:
    place = make_place(tmp_path)
    with serving(settings_of(place)) as client:
        for response in (client.get("/readyz"), client.post("/v1/score", json=body())):
            assert response.status_code == 503
            assert response.headers["content-type"] == "application/problem+json"
            assert "no bundle has been promoted" in response.json()["detail"]
        assert client.get("/livez").status_code == 200
        bundle_id = add_live_bundle(place)
        eventually(lambda: client.get("/readyz").status_code == 200)
        assert scores(client)[0] == bundle_id


def test_it_starts_beside_a_bad_bundle_and_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    point_at(place, add_bundle(place, change_graph=constant))
    with serving(settings_of(place)) as client:
        ready = client.get("/readyz")
        assert ready.status_code == 503
        assert "all golden scores are" in ready.json()["detail"]


def test_a_damaged_current_json_keeps_the_live_bundle(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    bundle_id = add_live_bundle(place)
    with serving(settings_of(place)) as client:
        (place.registry.root / "current.json").write_text('{"curr')
        eventually(lambda: last_refusal(client)["kind"] == "registry")
        assert scores(client)[0] == bundle_id
        second = add_live_bundle(place, bias=1.0)
        eventually(lambda: live_id(client) == second)


def _truncated(place: Place) -> str:
    def halve(folder: Path) -> None:
        model = (folder / "actr.onnx").read_bytes()
        (folder / "actr.onnx").write_bytes(model[: len(model) // 2])

    return add_bundle(place, spoil=halve)


def _model_is(content: bytes) -> Callable[[Place], str]:
    return lambda place: add_bundle(
        place, spoil=lambda folder: (folder / "actr.onnx").write_bytes(content)
    )


def _changed_after_sealing(place: Place) -> str:
    bundle_id = add_bundle(place, bias=2.0)
    (place.registry.path(bundle_id) / "vocabulary.json").write_text("{}")
    return bundle_id


def _linked(place: Place) -> str:
    bundle_id = add_bundle(place, bias=2.0)
    model = place.registry.path(bundle_id) / "actr.onnx"
    model.rename(place.registry.root / "elsewhere.onnx")
    model.symlink_to(place.registry.root / "elsewhere.onnx")
    return bundle_id


def _without_file(place: Place) -> str:
    bundle_id = add_bundle(place, bias=2.0)
    (place.registry.path(bundle_id) / "items" / "keys.npy").unlink()
    return bundle_id


def _renamed_folder(place: Place) -> str:
    bundle_id = add_bundle(place, bias=2.0)
    folder = place.registry.path(bundle_id)
    shutil.copytree(folder, folder.with_name("another-name"))
    return "another-name"


def _spoilt_graph(change: Any) -> Callable[[Place], str]:
    return lambda place: add_bundle(place, spoil=lambda folder: edit_graph(folder, change))


BAD: dict[str, tuple[Callable[[Place], str], str, str]] = {
    "a truncated model": (_truncated, "model", "Protobuf parsing failed"),
    "an empty model": (_model_is(b""), "model", "No graph"),
    "a pointer instead of a model": (_model_is(b"version https://git-lfs"), "model", "Protobuf"),
    "a changed file": (_changed_after_sealing, "bundle", "vocabulary.json: checksum differs"),
    "a missing file": (_without_file, "bundle", "items/keys.npy: missing"),
    "a link": (_linked, "bundle", "must not contain links"),
    "another bundle's folder": (_renamed_folder, "bundle", "its manifest is that of"),
    "no such bundle": (lambda _: "no-such-bundle", "registry", "no bundle 'no-such-bundle'"),
    "a path as its id": (lambda _: "../bundles", "registry", "no bundle '../bundles'"),
    "a renamed input": (_spoilt_graph(rename_input), "inputs", "user_cat, user_kat"),
    "an input of another type": (_spoilt_graph(widen_input), "inputs", "user_cat is int32"),
    "data from outside": (_spoilt_graph(reach_outside("../../x")), "model", "escapes"),
    "data from a path": (_spoilt_graph(reach_outside("/etc/passwd")), "model", "Absolute path"),
    "one and the same score": (
        lambda place: add_bundle(place, change_graph=constant),
        "constant",
        "all golden scores are 0.5",
    ),
    "other golden scores": (
        lambda place: add_bundle(place, golden_offset=1e-3),
        "golden",
        "off by 0.001",
    ),
    "a window that is not there": (
        lambda place: add_bundle(place, window=make_window(seed=1)),
        "window",
        "/windows/2017-06-",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_bundle_is_refused_with_its_reason_and_the_next_good_one_is_taken(
    tmp_path: Path, name: str
) -> None:
    make, kind, reason = BAD[name]
    place = make_place(tmp_path)
    first = add_live_bundle(place)
    with serving(settings_of(place)) as client:
        before = scores(client)
        bad = make(place)
        point_at(place, bad)
        eventually(lambda: last_refusal(client)["bundle"] == bad)
        refusal = last_refusal(client)
        assert refusal["kind"] == kind
        assert reason in refusal["reason"]
        assert scores(client) == before
        assert client.get("/readyz").status_code == 200
        assert f'ecdctr_refusals_total{{kind="{kind}"}} 1.0' in client.get("/metrics").text
        good = add_live_bundle(place, bias=1.0)
        eventually(lambda: live_id(client) == good)
        assert scores(client)[0] == good != first
        # Tried once, not at every poll.
        assert f'ecdctr_refusals_total{{kind="{kind}"}} 1.0' in client.get("/metrics").text


def test_a_refused_bundle_is_tried_again_when_its_folder_changes(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    add_live_bundle(place)
    second = add_bundle(place, bias=1.0)
    vocabulary = place.registry.path(second) / "vocabulary.json"
    right = vocabulary.read_text()
    vocabulary.write_text("{}")
    with serving(settings_of(place)) as client:
        point_at(place, second)
        eventually(lambda: last_refusal(client)["bundle"] == second)
        vocabulary.write_text(right)
        eventually(lambda: live_id(client) == second)


def test_a_bundle_whose_store_gives_no_answer_is_tried_until_it_does(tmp_path: Path) -> None:
    with running_server() as server:
        place = make_place(tmp_path, server.url)
        bundle_id = add_live_bundle(place)
        server.freeze()
        with serving(settings_of(place)) as client:
            assert last_refusal(client)["kind"] == "store"
            assert client.get("/readyz").status_code == 503
            server.thaw()
            eventually(lambda: live_id(client) == bundle_id)
        place.store.close()


def test_what_lives_as_long_as_the_bundle_is_kept_out_of_collections(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    add_live_bundle(place)
    with serving(settings_of(place)) as client:
        assert gc.get_freeze_count() > 1000
        second = add_live_bundle(place, bias=1.0)
        eventually(lambda: live_id(client) == second)
        eventually(lambda: gc.get_freeze_count() > 1000)


@pytest.mark.parametrize("same_window", [False, True])
@pytest.mark.parametrize("cache_mb", [0, 1])
@pytest.mark.parametrize("in_server", [False, True])
def test_a_replaced_bundle_is_freed_at_once_and_not_by_a_collection(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_server: bool,
    cache_mb: int,
    same_window: bool,
) -> None:
    loaded: list[list[weakref.ref[Any]]] = []

    async def remember(*args: Any, **kwargs: Any) -> Scorer:
        scorer = await load(*args, **kwargs)
        parts: list[object] = [scorer, scorer.artifact.encoder, scorer.artifact.parts]
        if not same_window:
            parts.append(scorer.reader)
        loaded.append([weakref.ref(part) for part in parts])
        return scorer

    monkeypatch.setattr("service.live.load", remember)
    with running_server() if in_server else nullcontext() as server:
        place = make_place(tmp_path, server.url) if server else make_place(tmp_path)
        add_live_bundle(place)
        with serving(settings_of(place, item_cache_mb=cache_mb)) as client:
            client.post("/v1/score", json=body())
            assert all(part() is not None for part in loaded[0])
            window = place.window if same_window else make_window(seed=1)
            if not same_window:
                place.store.publish(window)
            second = add_live_bundle(place, bias=1.0, window=window)
            eventually(lambda: live_id(client) == second)
            # It was frozen when it went live, so no collection looks at it.
            eventually(lambda: all(part() is None for part in loaded[0]))
            assert all(part() is not None for part in loaded[1])
        place.store.close()


def test_a_bundle_that_a_circle_holds_is_freed_by_the_swap_after_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Any] = []

    async def in_a_circle(*args: Any, **kwargs: Any) -> Scorer:
        scorer = await load(*args, **kwargs)
        held.append([scorer])
        held[-1].append(held[-1])
        return scorer

    monkeypatch.setattr("service.live.load", in_a_circle)
    place = make_place(tmp_path)
    add_live_bundle(place)
    with serving(settings_of(place)) as client:
        monkeypatch.setattr("service.live.load", load)
        first = weakref.ref(held.pop()[0])  # frozen with its circle, which nothing else refers to
        for bias, is_there in ((1.0, True), (2.0, False)):
            wanted = add_live_bundle(place, bias=bias)
            eventually(lambda wanted=wanted: live_id(client) == wanted)  # type: ignore[misc]
            eventually(lambda is_there=is_there: (first() is not None) == is_there)  # type: ignore[misc]


class AbsentReader:
    """A reader whose store never answers; remembers its errors as long as they are there."""

    def __init__(self, inner: Reader) -> None:
        self.ref, self.dim, self.close = inner.ref, inner.dim, inner.close
        self.errors: list[weakref.ref[StoreTimeout]] = []

    async def lookup(self, *_: Any, **__: Any) -> Windows:
        error = StoreTimeout("no answer")
        self.errors.append(weakref.ref(error))
        raise error

    async def lookup_request(self, *_: Any, **__: Any) -> RequestWindows:
        await self.lookup()
        raise AssertionError


class AbsentStore:
    def __init__(self, inner: Store) -> None:
        self._inner, self.close = inner, inner.close
        self.readers: list[AbsentReader] = []

    async def reader(self, ref: WindowRef) -> AbsentReader:
        self.readers.append(AbsentReader(await self._inner.reader(ref)))
        return self.readers[-1]


def test_an_answer_without_windows_leaves_nothing_for_a_collection(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    add_live_bundle(place)
    store: Any = AbsentStore(place.store)
    with serving(settings_of(place, item_cache_mb=0), store) as client:
        gc.disable()
        try:
            assert client.post("/v1/score", json=body()).json()["degraded"]
            (reader,) = store.readers
            assert len(reader.errors) == 1
            # The next request takes the place of what the server's loop still held of this one.
            client.get("/livez")
            assert reader.errors[0]() is None
        finally:
            gc.enable()


def test_bundles_of_one_window_share_its_reader_and_outlive_each_other(tmp_path: Path) -> None:
    with running_server() as server:
        place = make_place(tmp_path, server.url)
        first = add_live_bundle(place)
        with serving(settings_of(place, store_deadline_ms=200)) as client:
            assert scores(client)[0] == first
            server.freeze()
            # What is live has nothing better: so the store need not be there for this one.
            second = add_bundle(place, bias=1.0)
            point_at(place, second)
            eventually(lambda: live_id(client) == second)
            server.thaw()
            assert scores(client)[0] == second
            eventually(lambda: client.post("/v1/score", json=body()).json()["degraded"] == [])
        place.store.close()


def test_a_bundle_that_was_rolled_back_while_it_was_loaded_does_not_go_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make_place(tmp_path)
    first = add_live_bundle(place)
    second = add_bundle(place, bias=1.0)
    loaded = []

    async def slow(*args: Any, **kwargs: Any) -> Scorer:
        scorer = await load(*args, **kwargs)
        if scorer.id == second:
            place.registry.rollback()
        loaded.append(weakref.ref(scorer))
        return scorer

    monkeypatch.setattr("service.live.load", slow)
    with serving(settings_of(place)) as client:
        place.registry.promote(second)
        eventually(lambda: len(loaded) == 2 and loaded[1]() is None)
        assert live_id(client) == first
        assert "ecdctr_swaps_total 1.0" in client.get("/metrics").text
        place.registry.promote(second)  # and a later promotion finds it
        monkeypatch.setattr("service.live.load", load)
        eventually(lambda: live_id(client) == second)


def test_swaps_under_load_fail_no_request_and_mix_no_scores(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    ids = [add_bundle(place, bias=bias) for bias in (0.0, 0.5)]
    answers: set[tuple[str, tuple[float, ...]]] = set()
    stop = threading.Event()
    failures: list[str] = []

    def load(url: httpx.URL) -> None:
        with httpx.Client(base_url=url, timeout=20) as client:
            while not stop.is_set():
                response = client.post("/v1/score", json=body(num=len(ITEMS)))
                if response.status_code != 200:
                    failures.append(response.text)
                    return
                answers.add((response.json()["model"], tuple(response.json()["scores"])))

    place.registry.promote(ids[0])
    with serving(settings_of(place)) as client:
        threads = [threading.Thread(target=load, args=(client.base_url,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for number in range(1, 7):
            place.registry.promote(ids[number % 2])
            eventually(lambda wanted=ids[number % 2]: live_id(client) == wanted)  # type: ignore[misc]
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    # One set of scores per model, ever: a mixed answer would be a third.
    assert sorted(model for model, _ in answers) == sorted(ids)
