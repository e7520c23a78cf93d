"""Settings: read once from the environment, checked, frozen, and passed to whoever needs them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")


class SettingsError(ValueError):
    """A setting is absent or wrong; the message names the variable, the value and what is right."""


@dataclass(frozen=True)
class Settings:
    """How one service runs. Field names are the environment variables' without `ECDCTR_`."""

    registry: str
    """Where the bundles are: a directory that exists, or the URL of a place in an object store."""
    store: str
    """Where the TPM windows are: a path or a URL, see `embeddings_store.open_store`."""
    registry_cache: Path | None = None
    """Directory for bundles that are fetched from a URL; the processes of a machine share it."""
    store_deadline_ms: float = 10.0
    """Longest wait for the windows of one request; after it the request is scored without them."""
    store_copy: str = ""
    """A path with a copy of the windows, to read from while a remote store is away; empty: none."""
    store_wait_s: float = 10.0
    """How long a process that starts waits for its store before it goes live without windows."""
    item_cache_mb: int = 64
    """Megabytes for windows of items, in front of a remote store; 0 turns it off."""
    item_cache_ttl_s: float = 3600.0
    """How long the cache believes what it holds, though a window that is published never changes.
    """
    poll_s: float = 1.0
    """How often the registry is asked which bundle is current."""
    body_timeout_s: float = 10.0
    """How long a body may take to arrive."""
    max_body_bytes: int = 4 * 1024 * 1024
    """Largest request body."""
    max_candidates: int = 2000
    """Most candidates in one request."""
    max_history: int = 5000
    """Most history items in one request; the model reads the newest of them."""
    max_wait_ms: float = 75.0
    """In a flood, a request that would wait longer for those before it is answered 503 at once;
    otherwise three times as long, since a queue that gathered in a pause goes by itself."""
    drain_s: float = 3.0
    """How long a process goes on to answer after SIGTERM, while callers are sent away."""
    control_token: str = field(default="", repr=False)
    """Whoever knows it may promote bundles over HTTP; empty: nobody can."""
    control_port: int = 0
    """Where control is served instead of beside the scores; 0: there."""
    log_level: str = "info"
    """One of `LOG_LEVELS`."""
    log_format: str = "text"
    """One of `LOG_FORMATS`: text for a terminal, json for machines, an object per line."""
    log_user_sample: float = 0.0
    """Share of log lines about one request that name its user, 0 .. 1."""
    slow_ms: float = 100.0
    """Scoring requests that take longer are logged, with their stages."""
    traces: bool = False
    """Whether requests are traced, which needs the extra [otel] and is set up by OTEL_*."""
    audit_dir: Path | None = None
    """Directory in which some requests are kept with their scores; None: no request is."""
    audit_sample: float = 0.01
    """Share of the requests that are kept, 0 .. 1."""
    audit_mb: int = 1000
    """Megabytes of what is kept; the oldest is removed."""
    console: bool = True
    """Whether `/console` is served, the page for whoever runs the service."""
    metrics_dir: Path | None = None
    """Where worker processes share their metrics; None with one process. Not a variable of ours:
    prometheus_client reads PROMETHEUS_MULTIPROC_DIR by itself."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """The settings in `environ`, usually `os.environ`.

        Raises:
            SettingsError: a required variable is absent, or a value is not usable.
        """
        metrics_dir = environ.get("PROMETHEUS_MULTIPROC_DIR")
        return cls(
            registry=_registry(environ),
            registry_cache=_writable_folder(environ, "ECDCTR_REGISTRY_CACHE"),
            store=_required(environ, "ECDCTR_STORE", "a path or a redis:// URL"),
            store_deadline_ms=_positive(environ, "ECDCTR_STORE_DEADLINE_MS", cls.store_deadline_ms),
            store_copy=environ.get("ECDCTR_STORE_COPY", ""),
            store_wait_s=_positive(environ, "ECDCTR_STORE_WAIT_S", cls.store_wait_s),
            item_cache_mb=_count(environ, "ECDCTR_ITEM_CACHE_MB", cls.item_cache_mb, least=0),
            item_cache_ttl_s=_positive(environ, "ECDCTR_ITEM_CACHE_TTL_S", cls.item_cache_ttl_s),
            poll_s=_positive(environ, "ECDCTR_POLL_S", cls.poll_s),
            body_timeout_s=_positive(environ, "ECDCTR_BODY_TIMEOUT_S", cls.body_timeout_s),
            max_body_bytes=_count(environ, "ECDCTR_MAX_BODY_BYTES", cls.max_body_bytes),
            max_candidates=_count(environ, "ECDCTR_MAX_CANDIDATES", cls.max_candidates),
            max_history=_count(environ, "ECDCTR_MAX_HISTORY", cls.max_history),
            max_wait_ms=_positive(environ, "ECDCTR_MAX_WAIT_MS", cls.max_wait_ms),
            drain_s=_seconds(environ, "ECDCTR_DRAIN_S", cls.drain_s),
            control_token=environ.get("ECDCTR_CONTROL_TOKEN", ""),
            control_port=_count(environ, "ECDCTR_CONTROL_PORT", cls.control_port, least=0),
            log_level=_one_of(LOG_LEVELS, environ, "ECDCTR_LOG_LEVEL", cls.log_level),
            log_format=_one_of(LOG_FORMATS, environ, "ECDCTR_LOG_FORMAT", cls.log_format),
            log_user_sample=_share(environ, "ECDCTR_LOG_USER_SAMPLE", cls.log_user_sample),
            slow_ms=_positive(environ, "ECDCTR_SLOW_MS", cls.slow_ms),
            traces=_one_of(("0", "1"), environ, "ECDCTR_TRACES", "0") == "1",
            audit_dir=_writable_folder(environ, "ECDCTR_AUDIT_DIR"),
            audit_sample=_share(environ, "ECDCTR_AUDIT_SAMPLE", cls.audit_sample),
            audit_mb=_count(environ, "ECDCTR_AUDIT_MB", cls.audit_mb),
            console=_one_of(("0", "1"), environ, "ECDCTR_CONSOLE", "1") == "1",
            metrics_dir=Path(metrics_dir) if metrics_dir else None,
        )


def _required(environ: Mapping[str, str], name: str, expected: str) -> str:
    value = environ.get(name, "")
    if not value:
        raise SettingsError(f"{name} is not set; it must be {expected}")
    return value


def _registry(environ: Mapping[str, str]) -> str:
    where = _required(environ, "ECDCTR_REGISTRY", "the bundle registry, a directory or a URL")
    if "://" not in where:
        if not Path(where).is_dir():
            raise SettingsError(f"ECDCTR_REGISTRY={where!r} is not a directory")
    elif not environ.get("ECDCTR_REGISTRY_CACHE"):
        raise SettingsError(
            f"ECDCTR_REGISTRY={where!r} needs ECDCTR_REGISTRY_CACHE, which is not set; it must be a"
            " directory for the bundles that are fetched"
        )
    return where


def _positive(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name, "")
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise SettingsError(f"{name}={text!r} must be a number above 0")
    return value


def _seconds(environ: Mapping[str, str], name: str, default: float) -> float:
    return 0.0 if environ.get(name) == "0" else _positive(environ, name, default)


def _count(environ: Mapping[str, str], name: str, default: int, least: int = 1) -> int:
    text = environ.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise SettingsError(f"{name}={text!r} must be a whole number of at least {least}")
    return int(text)


def _one_of(allowed: Sequence[str], environ: Mapping[str, str], name: str, default: str) -> str:
    value = environ.get(name, "").lower() or default
    if value not in allowed:
        raise SettingsError(f"{name}={value!r} must be one of {', '.join(allowed)}")
    return value


def _share(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name, "")
    try:
        value = float(text or default)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise SettingsError(f"{name}={text!r} must be a number from 0 to 1")
    return value


def _writable_folder(environ: Mapping[str, str], name: str) -> Path | None:
    text = environ.get(name, "")
    if text and not (Path(text).is_dir() and os.access(text, os.W_OK)):
        raise SettingsError(f"{name}={text!r} is not a directory that can be written to")
    return Path(text) if text else None
