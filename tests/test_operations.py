"""The operator's handbook does what it says, as far as that can be seen without a cluster."""

from __future__ import annotations

import asyncio
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from bundles import make_window
from handbook import OPERATIONS, acl, commands_of, documented_secrets
from manifest_checks import name_of, referred
from manifests import ROOT, kubectl, named, of_kind, pods, rendered
from servers import free_port, valkey
from test_container import TEXT, Dockerfile

from embeddings_store import Store, StoreError, StoreRejected, WindowRef, open_store


@contextmanager
def store_of_the_component(folder: Path, port: int) -> Iterator[None]:
    """The server with the component's own configuration and the handbook's users."""
    text = named(rendered("dev"), "ConfigMap/ecdctr-store")["data"]["valkey.conf"]
    text = text.replace("/data", str(folder)).replace("6379", str(port))
    (folder / "users.acl").write_text(acl())
    text = text.replace("/etc/valkey/acl/users.acl", str(folder / "users.acl"))
    (folder / "valkey.conf").write_text(text)
    process = subprocess.Popen([valkey(), str(folder / "valkey.conf")], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=20)


def windows_of(store: Store) -> list[WindowRef]:
    """Once the server answers."""
    for _ in range(100):
        try:
            return store.windows()
        except StoreError as error:
            last = error
            time.sleep(0.05)
    raise AssertionError(f"the store does not answer: {last}")


def test_the_store_serves_both_users_keeps_windows_and_refuses_the_rest(tmp_path: Path) -> None:
    port, window = free_port(), make_window()
    urls = [
        f"redis://{user}@127.0.0.1:{port}/0" for user in ("training:CHANGE-1", "service:CHANGE-2")
    ]
    writer, reader = map(open_store, urls)
    with store_of_the_component(tmp_path, port):
        assert windows_of(writer) == []
        writer.publish(window)
        writer.check(window.ref)
        assert writer.stats(window.ref).stored_bytes > 0
        with pytest.raises(StoreRejected):
            reader.remove(window.ref)
        with pytest.raises(StoreRejected):
            open_store(f"redis://127.0.0.1:{port}/0").windows()
    with store_of_the_component(tmp_path, port):
        assert windows_of(reader) == [window.ref]
        asyncio.run(_look_up(reader, window.ref))
        writer.remove(window.ref)
        assert writer.windows() == []
    for opened in (writer, reader):
        opened.close()


async def _look_up(store: Store, ref: WindowRef) -> None:
    reader = await store.reader(ref)
    found = await reader.lookup("users", np.array([1], np.uint64), deadline_ms=2000)
    await reader.close()
    assert found.present.shape == (1, 3)


@pytest.mark.parametrize("command", commands_of("kubectl kustomize"))
def test_what_the_handbook_renders_can_be_rendered(command: str) -> None:
    assert "kind: Deployment" in kubectl(*shlex.split(command)[1:])


def test_what_the_handbook_applies_is_there() -> None:
    for command in commands_of("kubectl apply -k"):
        assert (ROOT / shlex.split(command)[3] / "kustomization.yaml").is_file()


def test_every_job_that_the_handbook_starts_is_there() -> None:
    jobs = {name_of(job) for job in of_kind(rendered("dev"), "CronJob")}
    started = set(re.findall(r"--from=cronjob/([\w-]+)", OPERATIONS))
    assert started <= jobs
    assert {"import", "update-tpm", "update-cpm", "update-actr", "rollback"} <= started


def test_every_secret_of_the_handbook_is_needed() -> None:
    needed = {
        (secret, key)
        for name in ("dev", "object-store")
        for pod in pods(rendered(name))
        for kind, secret, key in referred(pod)
        if kind == "Secret"
    }
    assert needed == {(name, key) for name, keys in documented_secrets().items() for key in keys}


def test_the_images_that_the_handbook_builds_are_those_of_the_manifests() -> None:
    stages = Dockerfile(TEXT).stages
    for command in commands_of("docker build --target"):
        words = shlex.split(command)
        target, tag = (words[words.index(o) + 1] for o in ("--target", "--tag"))
        assert target in stages
        used = {c["image"] for pod in pods(rendered("prod")) for c in pod.containers}
        assert tag in used
