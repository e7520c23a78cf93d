"""What is sent: recorded requests, or those that a bundle carries, as bytes ready for the wire."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from bundle.golden import body_of, read_golden
from bundle.manifest import GOLDEN

Body = dict[str, Any]


class Request(NamedTuple):
    """Head and body in one piece, and how many scores the answer must have."""

    wire: bytes
    num_candidates: int


def read_bodies(path: Path) -> list[Body]:
    """Bodies in a file: one JSON document, or one a line.

    Raises:
        ValueError: something in it is no body of a request; names the line.
    """
    text = path.read_bytes()
    try:
        return [_checked(orjson.loads(text), str(path))]
    except orjson.JSONDecodeError:
        lines = enumerate(text.splitlines(), start=1)
    bodies = [_body(line, f"{path}:{number}") for number, line in lines if line.strip()]
    if not bodies:
        raise ValueError(f"{path} is empty; it must hold a JSON body a line")
    return bodies


def bodies_of_bundle(folder: Path) -> list[Body]:
    """The golden requests of a bundle."""
    return [body_of(golden.request) for golden in read_golden(folder / GOLDEN)]


def resized(body: Body, num: int) -> Body:
    """The same request with `num` candidates: cut, or repeated from the first on.

    Raises:
        ValueError: there is none to repeat.
    """
    candidates = body["candidates"]
    if not candidates["id"]:
        raise ValueError("candidates.id is empty; it takes at least one to repeat")
    columns = {
        name: list(islice(cycle(column), num))
        for name, column in candidates.get("features", {}).items()
    }
    ids = list(islice(cycle(candidates["id"]), num))
    return {**body, "candidates": {"id": ids, "features": columns}}


def encode(bodies: Sequence[Body], host: str, path: str) -> list[Request]:
    """HTTP/1.1 requests to POST, with connections that stay open."""
    return [
        Request(_head(host, path, content) + content, len(body["candidates"]["id"]))
        for body in bodies
        for content in [orjson.dumps(body)]
    ]


def _head(host: str, path: str, content: bytes) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    ).encode("ascii")


def _body(line: bytes, where: str) -> Body:
    try:
        return _checked(orjson.loads(line), where)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def _checked(document: object, where: str) -> Body:
    candidates = document.get("candidates") if isinstance(document, dict) else None
    ids = candidates.get("id") if isinstance(candidates, dict) else None
    if not isinstance(document, dict) or not isinstance(ids, list):
        raise ValueError(f"{where} has no list candidates.id; it must be a body of /v1/score")
    return document
