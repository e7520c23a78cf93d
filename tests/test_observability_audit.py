"""Requests are kept with their scores, in bounds, off the way of answers, and can be read back."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import ITEMS, add_live_bundle, body, eventually, make_place, serving, settings_of

from bundle.golden import body_of
from service.audit import Audit
from service.decode import decode
from service.scorer import Scored
from training.audit import AuditError, read_requests, to_parquet

SCORED = Scored("m", np.array([0.25, 0.5], np.float32), {"user_window": "timeout"}, {"price": 1})


def kept(folder: Path) -> list[dict[str, Any]]:
    lines = [line for p in sorted(folder.glob("*.jsonl")) for line in p.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def test_what_was_asked_over_http_comes_back_from_parquet_as_a_request(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    model = add_live_bundle(place)
    folder, parquet = tmp_path / "audit", tmp_path / "parquet"
    folder.mkdir()
    settings = settings_of(place, audit_dir=folder, audit_sample=1.0)
    spread = json.dumps(body(num=5, request_id="auction-1"), indent=2).encode()
    with serving(settings) as client:
        answer = client.post("/v1/score", content=spread).json()
        own = client.post("/v1/score", json=body(num=2)).headers["x-request-id"]
        assert client.post("/v1/score", content=b"{").status_code == 400
        eventually(lambda: 'outcome="written"} 2.0' in client.get("/metrics").text)
    assert to_parquet(folder, parquet) == 2
    assert to_parquet(folder, parquet) == 0, "what is there is not converted again"
    first, second = read_requests(parquet)
    assert (first.request_id, first.model, second.request_id) == ("auction-1", model, own)
    np.testing.assert_array_equal(first.scores, np.array(answer["scores"], np.float32))
    assert body_of(first.request) == body_of(decode(spread, settings).to_encode())
    assert second.request.item_ids == ITEMS[:2]
    assert not list(folder.glob("*.part"))


def test_a_file_that_is_no_audit_log_is_named_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "audit-1-1.jsonl").write_text('{"time": "2017-07-01"}\n')
    with pytest.raises(AuditError, match=r"audit-1-1.jsonl:1: KeyError"):
        to_parquet(tmp_path, tmp_path / "parquet")
    assert not list((tmp_path / "parquet").iterdir())


def test_the_sample_decides_how_many_are_kept(tmp_path: Path) -> None:
    for share, least, most in ((0.0, 0, 0), (0.5, 300, 700), (1.0, 1000, 1000)):
        folder = tmp_path / str(share)
        folder.mkdir()
        log = Audit(folder, share, 100_000_000, lambda _: None)
        log.start()
        for _ in range(1000):
            log.offer("r", b"{}", SCORED)
        log.close()
        assert least <= len(kept(folder)) <= most


def test_the_folder_never_grows_beyond_its_bytes_by_more_than_a_file(tmp_path: Path) -> None:
    limit_bytes, long = 160_000, json.dumps({"x": "y" * 2000}).encode()
    log = Audit(tmp_path, 1.0, limit_bytes, lambda _: None)
    log.start()
    for number in range(400):
        log.offer(str(number), long, SCORED)
    log.close()
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert limit_bytes / 2 < size <= limit_bytes * 17 / 16 + 3000
    assert kept(tmp_path)[-1]["request_id"] == "399", "it is the oldest that goes"


def test_what_a_disk_cannot_take_in_time_is_dropped_and_counted(tmp_path: Path) -> None:
    counted: list[str] = []
    free = threading.Event()

    def count(outcome: str) -> None:
        counted.append(outcome)
        if outcome == "written":
            free.wait(20)  # a disk that hangs

    log = Audit(tmp_path, 1.0, 100_000_000, count, queue_bytes=100)
    log.start()
    log.offer("first", b"{}", SCORED)
    eventually(lambda: counted == ["written"])
    for number in range(30):
        log.offer(str(number), b"{}", SCORED)
    free.set()
    log.close()
    assert counted.count("dropped") == 20  # 10 bytes each, and 100 may wait
    assert len(kept(tmp_path)) == 11


def test_a_folder_that_vanishes_costs_lines_and_no_answer(tmp_path: Path) -> None:
    counted: list[str] = []
    log = Audit(tmp_path / "gone", 1.0, 1_000_000, counted.append)
    log.start()
    log.offer("a", b"{}", SCORED)
    eventually(lambda: counted == ["dropped"])
    (tmp_path / "gone").mkdir()
    log.offer("b", b"{}", SCORED)
    log.close()
    assert [line["request_id"] for line in kept(tmp_path / "gone")] == ["b"]
