"""Which users a canary scores: always the same ones, and others for the next canary."""

from __future__ import annotations

from hashlib import blake2b

_SCALE = 2.0**64


def is_chosen(user: str | int, salt: str, share: float) -> bool:
    """Whether this user is in the share, 0 .. 1. Ids are compared as strings, as everywhere."""
    digest = blake2b(f"{salt}/{user}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) / _SCALE < share
