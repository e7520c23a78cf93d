"""Settings: read once from the environment, checked, frozen, and passed to whoever needs them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LOG_LEVELS = ("debug", "info", "warning", "error")


class SettingsError(ValueError):
    """A setting is absent or wrong; the message names the variable, the value and what is right."""


@dataclass(frozen=True)
class Settings:
    """How one service runs. Field names are the environment variables' without `ECDCTR_`."""

    registry: Path
    """Directory of bundles; it must exist."""
    store: str
    """Where the TPM windows are: a path or a URL, see `embeddings_store.open_store`."""
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
    max_body_bytes: int = 4 * 1024 * 1024
    """Largest request body."""
    max_candidates: int = 2000
    """Most candidates in one request."""
    max_history: int = 5000
    """Most history items in one request; the model reads the newest of them."""
    log_level: str = "info"
    """One of `LOG_LEVELS`."""
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
            registry=_folder(environ, "ECDCTR_REGISTRY"),
            store=_required(environ, "ECDCTR_STORE", "a path or a redis:// URL"),
            store_deadline_ms=_positive(environ, "ECDCTR_STORE_DEADLINE_MS", cls.store_deadline_ms),
            store_copy=environ.get("ECDCTR_STORE_COPY", ""),
            store_wait_s=_positive(environ, "ECDCTR_STORE_WAIT_S", cls.store_wait_s),
            item_cache_mb=_count(environ, "ECDCTR_ITEM_CACHE_MB", cls.item_cache_mb, least=0),
            item_cache_ttl_s=_positive(environ, "ECDCTR_ITEM_CACHE_TTL_S", cls.item_cache_ttl_s),
            poll_s=_positive(environ, "ECDCTR_POLL_S", cls.poll_s),
            max_body_bytes=_count(environ, "ECDCTR_MAX_BODY_BYTES", cls.max_body_bytes),
            max_candidates=_count(environ, "ECDCTR_MAX_CANDIDATES", cls.max_candidates),
            max_history=_count(environ, "ECDCTR_MAX_HISTORY", cls.max_history),
            log_level=_log_level(environ, "ECDCTR_LOG_LEVEL", cls.log_level),
            metrics_dir=Path(metrics_dir) if metrics_dir else None,
        )


def _required(environ: Mapping[str, str], name: str, expected: str) -> str:
    value = environ.get(name, "")
    if not value:
        raise SettingsError(f"{name} is not set; it must be {expected}")
    return value


def _folder(environ: Mapping[str, str], name: str) -> Path:
    path = Path(_required(environ, name, "the directory of the bundle registry"))
    if not path.is_dir():
        raise SettingsError(f"{name}={str(path)!r} is not a directory")
    return path


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


def _count(environ: Mapping[str, str], name: str, default: int, least: int = 1) -> int:
    text = environ.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise SettingsError(f"{name}={text!r} must be a whole number of at least {least}")
    return int(text)


def _log_level(environ: Mapping[str, str], name: str, default: str) -> str:
    value = environ.get(name, "").lower() or default
    if value not in LOG_LEVELS:
        raise SettingsError(f"{name}={value!r} must be one of {', '.join(LOG_LEVELS)}")
    return value
