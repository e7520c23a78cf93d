"""Settings are read once, checked, and complain in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.settings import Settings, SettingsError


def test_defaults_need_only_a_registry_and_a_store(tmp_path: Path) -> None:
    settings = Settings.from_env({"ECDCTR_REGISTRY": str(tmp_path), "ECDCTR_STORE": "store"})
    assert settings == Settings(registry=str(tmp_path), store="store")
    assert settings.store_deadline_ms == 10
    assert settings.max_body_bytes == 4 * 1024 * 1024


def test_every_variable_is_read(tmp_path: Path) -> None:
    settings = Settings.from_env(
        {
            "ECDCTR_REGISTRY": str(tmp_path),
            "ECDCTR_REGISTRY_CACHE": str(tmp_path),
            "ECDCTR_STORE": "redis://example:6379",
            "ECDCTR_STORE_DEADLINE_MS": "2.5",
            "ECDCTR_STORE_COPY": "/copy",
            "ECDCTR_STORE_WAIT_S": "3",
            "ECDCTR_ITEM_CACHE_MB": "0",
            "ECDCTR_ITEM_CACHE_TTL_S": "60",
            "ECDCTR_POLL_S": "0.5",
            "ECDCTR_CONSOLE": "0",
            "ECDCTR_BODY_TIMEOUT_S": "4",
            "ECDCTR_MAX_BODY_BYTES": "1000",
            "ECDCTR_MAX_CANDIDATES": "7",
            "ECDCTR_MAX_HISTORY": "8",
            "ECDCTR_LOG_LEVEL": "DEBUG",
            "ECDCTR_LOG_FORMAT": "json",
            "ECDCTR_LOG_USER_SAMPLE": "0.5",
            "ECDCTR_SLOW_MS": "20",
            "ECDCTR_TRACES": "1",
            "ECDCTR_AUDIT_DIR": str(tmp_path),
            "ECDCTR_AUDIT_SAMPLE": "1",
            "ECDCTR_AUDIT_MB": "5",
            "PROMETHEUS_MULTIPROC_DIR": str(tmp_path),
        }
    )
    assert settings == Settings(
        registry=str(tmp_path),
        registry_cache=tmp_path,
        store="redis://example:6379",
        store_deadline_ms=2.5,
        store_copy="/copy",
        store_wait_s=3,
        item_cache_mb=0,
        item_cache_ttl_s=60,
        poll_s=0.5,
        console=False,
        body_timeout_s=4,
        max_body_bytes=1000,
        max_candidates=7,
        max_history=8,
        log_level="debug",
        log_format="json",
        log_user_sample=0.5,
        slow_ms=20,
        traces=True,
        audit_dir=tmp_path,
        audit_sample=1,
        audit_mb=5,
        metrics_dir=tmp_path,
    )


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("ECDCTR_REGISTRY", "", "is not set"),
        ("ECDCTR_REGISTRY", "/no/such/folder", "is not a directory"),
        ("ECDCTR_REGISTRY", "s3://bucket/prefix", "needs ECDCTR_REGISTRY_CACHE"),
        ("ECDCTR_REGISTRY_CACHE", "/no/such/folder", "is not a directory that can be written"),
        ("ECDCTR_STORE", "", "is not set"),
        ("ECDCTR_STORE_DEADLINE_MS", "0", "must be a number above 0"),
        ("ECDCTR_STORE_DEADLINE_MS", "inf", "must be a number above 0"),
        ("ECDCTR_POLL_S", "often", "must be a number above 0"),
        ("ECDCTR_MAX_BODY_BYTES", "4MiB", "must be a whole number of at least 1"),
        ("ECDCTR_MAX_CANDIDATES", "-1", "must be a whole number of at least 1"),
        ("ECDCTR_MAX_HISTORY", "1.5", "must be a whole number of at least 1"),
        ("ECDCTR_ITEM_CACHE_MB", "-1", "must be a whole number of at least 0"),
        ("ECDCTR_CONSOLE", "yes", "must be one of 0, 1"),
        ("ECDCTR_LOG_LEVEL", "loud", "must be one of debug, info, warning, error"),
        ("ECDCTR_LOG_FORMAT", "xml", "must be one of text, json"),
        ("ECDCTR_LOG_USER_SAMPLE", "1.5", "must be a number from 0 to 1"),
        ("ECDCTR_SLOW_MS", "0", "must be a number above 0"),
        ("ECDCTR_TRACES", "yes", "must be one of 0, 1"),
        ("ECDCTR_AUDIT_DIR", "/no/such/folder", "is not a directory that can be written to"),
        ("ECDCTR_AUDIT_SAMPLE", "many", "must be a number from 0 to 1"),
        ("ECDCTR_AUDIT_MB", "0", "must be a whole number of at least 1"),
    ],
)
def test_a_wrong_value_names_its_variable_and_what_is_right(
    tmp_path: Path, name: str, value: str, expected: str
) -> None:
    environ = {"ECDCTR_REGISTRY": str(tmp_path), "ECDCTR_STORE": "store", name: value}
    with pytest.raises(SettingsError, match=f"{name}.*{expected}"):
        Settings.from_env(environ)
