"""Where a URL leads, and whether that is this machine."""

from __future__ import annotations

import ipaddress
import socket
from typing import NamedTuple
from urllib.parse import urlsplit

SCORE_PATH = "/v1/score"


class Address(NamedTuple):
    """An address to connect to, the Host header, and the path to post to."""

    ip: str
    port: int
    host: str
    path: str


def resolve(url: str, *, allow_remote: bool) -> Address:
    """The address of a service; a path before `/v1/score` is kept.

    Raises:
        ValueError: not http, or another machine though that was not allowed.
        OSError: the name has no address.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"--url {url!r} must be like http://127.0.0.1:8000")
    port = parts.port or 80
    found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    # IPv4 first: "localhost" is both, and servers commonly listen on that one only.
    ips = sorted((str(entry[4][0]) for entry in found), key=lambda ip: ":" in ip)
    if not allow_remote and not all(ipaddress.ip_address(ip).is_loopback for ip in ips):
        raise ValueError(f"--url {url!r} is another machine; --allow-remote if it may be loaded")
    return Address(ips[0], port, parts.netloc, parts.path.rstrip("/") + SCORE_PATH)
