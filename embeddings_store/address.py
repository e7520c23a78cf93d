"""Where a Redis or Valkey server is, and how to sign in: read from a URL that is never repeated."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio.connection import parse_url as parse_url_async
from redis.connection import parse_url

SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster")
_HELP = (
    "invalid redis URL: must be redis://[user:password@]host:port/db, rediss://...,"
    " unix:///socket, or redis+cluster://[user:password@]host:port,host:port, with special"
    " characters of the password percent-encoded"
)


@dataclass(frozen=True)
class Address:
    """A server, or a cluster by some of its servers. Safe to print: the password is left out."""

    location: str
    """For messages."""
    is_cluster: bool
    seeds: tuple[tuple[str, int], ...]
    """Host and port of servers to ask which servers there are; empty for a Unix socket."""
    blocking: dict[str, Any] = field(repr=False)
    """Options of a blocking connection; `asynchronous` those of the other kind."""
    asynchronous: dict[str, Any] = field(repr=False)

    @classmethod
    def parse(cls, url: str) -> Address:
        """ValueError, which does not repeat the URL, when it is not one of those in SCHEMES."""
        try:
            return _parse(url)
        except ValueError:
            raise ValueError(_HELP) from None


def _parse(url: str) -> Address:
    scheme, _, rest = url.partition("://")
    plain, _, kind = scheme.partition("+")
    is_cluster = kind == "cluster"
    if scheme not in SCHEMES:
        raise ValueError(scheme)
    # The parser knows one host; the others of a cluster share all else with it.
    # An @ or # further on means that a password was not encoded, and the first part of it would be
    # taken for the host.
    parts = re.fullmatch(r"([^/?#]*)([^@#]*)", rest)
    if parts is None:
        raise ValueError(rest)
    authority, tail = parts.groups()
    credentials, at, hosts = authority.rpartition("@")
    first, *others = hosts.split(",")
    single = f"{plain}://{credentials}{at}{first}{tail}"
    # No client name: a reader's new connection costs no round trip beyond AUTH and SELECT.
    blocking = _options(parse_url, single)
    asynchronous = {**_options(parse_url_async, single), "driver_info": None}
    seeds = () if plain == "unix" else tuple(_host_port(host) for host in (first, *others))
    if others and not is_cluster:
        raise ValueError(hosts)
    if is_cluster and blocking.pop("db", 0) + asynchronous.pop("db", 0):
        raise ValueError(tail)  # a cluster has one database
    return Address(_location(blocking, seeds), is_cluster, seeds, blocking, asynchronous)


def _options(parse: Callable[[str], Any], url: str) -> dict[str, Any]:
    return {**parse(url), "protocol": 2, "decode_responses": False}


def _host_port(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    return parts.hostname or "localhost", parts.port or 6379


def _location(options: dict[str, Any], seeds: tuple[tuple[str, int], ...]) -> str:
    where = options.get("path") or ",".join(f"{host}:{port}" for host, port in seeds)
    return f"redis {where}/{options.get('db', 0)}"
