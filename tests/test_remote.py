"""A registry in an object store: a real server of the S3 protocol, on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from bundles import Place, add_bundle, body, eventually, make_place, serving, settings_of
from servers import free_port

import ecdctr
from bundle.manifest import MANIFEST, BundleError
from bundle.registry import Registry, RegistryError, RegistryUnavailable
from bundle.remote import RemoteRegistry, open_registry
from service.app import create_app
from service.background import NICENESS


@dataclass
class ObjectStore:
    """The server, and one bucket of it."""

    process: subprocess.Popen[bytes]
    url: str
    files: Any
    bucket: str

    def registry(self, cache: Path) -> RemoteRegistry:
        found = open_registry(self.url, cache)
        assert isinstance(found, RemoteRegistry)
        return found

    def path(self, *parts: str) -> str:
        return "/".join((self.bucket, "registry", *parts))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[bytes]]:
    port, log = free_port(), tmp_path_factory.mktemp("s3") / "server.log"
    endpoint = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as environ:
        environ.setenv("AWS_ENDPOINT_URL", endpoint)
        environ.setenv("AWS_ACCESS_KEY_ID", "somebody")
        environ.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        environ.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environ.setenv("AWS_EC2_METADATA_DISABLED", "true")
        environ.setattr("bundle.remote._TRIES", 1)
        command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            give_up_at_s = time.monotonic() + 60
            while not _answers(endpoint):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < give_up_at_s
                time.sleep(0.1)
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


def _answers(endpoint: str) -> bool:
    try:
        return httpx.get(endpoint).status_code < 500
    except httpx.TransportError:
        return False


@pytest.fixture
def objects(server: subprocess.Popen[bytes]) -> ObjectStore:
    import s3fs

    files = s3fs.S3FileSystem(use_listings_cache=False)
    bucket = f"bucket-{os.urandom(6).hex()}"
    files.mkdir(bucket, create_parents=True)
    return ObjectStore(server, f"s3://{bucket}/registry", files, bucket)


@pytest.fixture
def remote(objects: ObjectStore, tmp_path: Path) -> Place:
    """A place whose registry is the object store; an embedded store with its window beside it."""
    place = make_place(tmp_path)
    return replace(place, registry=objects.registry(tmp_path / "producer"))


def names(registry: Registry) -> tuple[str, str | None]:
    current = registry.current()
    assert current
    return current.current, current.previous


def settings(objects: ObjectStore, place: Place, cache: Path, **changes: Any) -> Any:
    cache.mkdir(exist_ok=True)
    return settings_of(place, registry=objects.url, registry_cache=cache, **changes)


def counted(registry: RemoteRegistry, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is asked of the object store from now on: method and bytes."""
    asked: list[tuple[str, int]] = []
    call = registry._files._call_s3

    async def note(method: str, *args: Any, **kwargs: Any) -> Any:
        first, _, last = kwargs.get("Range", "").removeprefix("bytes=").partition("-")
        asked.append((method, int(last) - int(first) + 1 if last else 0))
        return await call(method, *args, **kwargs)

    monkeypatch.setattr(registry._files, "_call_s3", note)
    return asked


def test_what_one_machine_publishes_another_one_reads_and_promotes_and_rolls_back(
    remote: Place, objects: ObjectStore, tmp_path: Path
) -> None:
    other = objects.registry(tmp_path / "other")
    assert other.current() is None
    ids = [add_bundle(remote, bias=bias) for bias in (0.0, 1.0)]
    assert other.ids() == sorted(ids)
    assert other.read(ids[0]) == remote.registry.read(ids[0])
    for bundle_id in ids:
        remote.registry.promote(bundle_id)
    assert names(other) == (ids[1], ids[0])
    other.start("canary", ids[0], 0.25)
    other.rollback()
    assert names(remote.registry) == (ids[0], ids[1])
    current = remote.registry.current()
    assert current
    assert current.canary is None  # it became the current one
    ours, theirs = (
        {path.name: path.read_bytes() for path in registry.path(ids[1]).rglob("*.*")}
        for registry in (remote.registry, other)
    )
    assert ours == theirs
    assert not list(other.root.glob(".*-*"))


def test_a_bundle_of_the_registry_is_served_and_what_is_promoted_there_goes_live(
    remote: Place, objects: ObjectStore, tmp_path: Path
) -> None:
    first = add_bundle(remote)
    remote.registry.promote(first)
    with serving(settings(objects, remote, tmp_path / "cache", control_token="secret")) as client:
        assert client.post("/v1/score", json=body()).json()["model"] == first
        second = add_bundle(remote, bias=1.0)
        remote.registry.promote(second)
        eventually(lambda: client.post("/v1/score", json=body()).json()["model"] == second)
        token = {"authorization": "Bearer secret"}
        rolled = client.post("/v1/models/rollback", headers=token)
        assert (rolled.status_code, rolled.json()["live"]) == (200, first)
        assert names(remote.registry) == (first, second)


def test_a_poll_asks_one_question_until_something_changes(
    remote: Place, objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.registry.promote(add_bundle(remote))
    other = objects.registry(tmp_path / "other")
    other.current()
    asked = counted(other, monkeypatch)
    for _ in range(3):
        other.current()
    assert [method for method, _ in asked] == ["head_object"] * 3


def test_a_download_that_broke_off_goes_on_where_it_was(
    remote: Place, objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle_id = add_bundle(remote)
    monkeypatch.setattr("bundle.remote._CHUNK_BYTES", 1000)
    other = objects.registry(tmp_path / "other")
    whole = sum(p.stat().st_size for p in remote.registry.path(bundle_id).rglob("*") if p.is_file())
    read, pieces = other._files.cat_file, []

    def broken(path: str, start: int | None = None, end: int | None = None) -> bytes:
        if len(pieces) == 7:
            raise ConnectionResetError("cut")
        pieces.append(read(path, start=start, end=end))
        return bytes(pieces[-1])

    with monkeypatch.context() as patch:
        patch.setattr(other._files, "cat_file", broken)
        with pytest.raises(RegistryUnavailable, match="cut"):
            other.path(bundle_id)
        assert not (other.root / "bundles" / bundle_id).exists()
    got = sum(map(len, pieces)) - len(pieces[0])  # the first one is the manifest, by itself
    asked = counted(other, monkeypatch)
    assert other.path(bundle_id).is_dir()
    assert sum(size for _, size in asked) == whole - got


def test_processes_that_share_a_folder_fetch_a_bundle_once(
    remote: Place, objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle_id = add_bundle(remote)
    workers = [objects.registry(tmp_path / "shared") for _ in range(3)]
    asked = counted(workers[0], monkeypatch)  # one file system for all of them
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda registry: registry.path(bundle_id), workers))
    assert len(set(paths)) == 1
    whole = sum(path.stat().st_size for path in paths[0].rglob("*") if path.is_file())
    assert sum(size for _, size in asked) == whole


def test_a_damaged_object_is_refused_and_fetched_again_once_it_is_right(
    remote: Place, objects: ObjectStore, tmp_path: Path
) -> None:
    first, second = (add_bundle(remote, bias=bias) for bias in (0.0, 1.0))
    remote.registry.promote(first)
    model = objects.path("bundles", second, "actr.onnx")
    right = objects.files.cat_file(model)
    objects.files.pipe_file(model, b"x" * len(right))
    with serving(settings(objects, remote, tmp_path / "cache")) as client:
        remote.registry.promote(second)
        refused = lambda: client.get("/v1/models").json()["refusals"]  # noqa: E731
        eventually(lambda: bool(refused()))
        assert refused()[0]["kind"] == "bundle"
        assert "actr.onnx: checksum differs" in refused()[0]["reason"]
        assert client.post("/v1/score", json=body()).json()["model"] == first
        assert not list((tmp_path / "cache").glob(".partial-*"))
        objects.files.pipe_file(model, right)
        eventually(lambda: client.post("/v1/score", json=body()).json()["model"] == second)


def test_a_copy_that_was_damaged_on_this_machine_is_fetched_again(
    remote: Place, objects: ObjectStore, tmp_path: Path
) -> None:
    bundle_id = add_bundle(remote)
    remote.registry.promote(bundle_id)
    folder = objects.registry(tmp_path / "cache").path(bundle_id)
    (folder / "actr.onnx").write_bytes(b"damaged")
    with serving(settings(objects, remote, tmp_path / "cache")) as client:
        eventually(lambda: client.get("/readyz").status_code == 200)
        refusal = client.get("/v1/models").json()["refusals"][0]
        assert refusal["kind"] == "unavailable"
        assert "it is fetched again" in refusal["reason"]
        assert client.post("/v1/score", json=body()).json()["model"] == bundle_id


def test_a_copy_that_is_whole_is_not_fetched_again(
    remote: Place, objects: ObjectStore, tmp_path: Path
) -> None:
    other, bundle_id = objects.registry(tmp_path / "other"), add_bundle(remote)
    other.path(bundle_id)
    assert other.renew(bundle_id)
    assert (other.root / "bundles" / bundle_id).is_dir()


def test_of_processes_that_find_the_same_copy_damaged_each_tries_again_and_once(
    remote: Place, objects: ObjectStore, tmp_path: Path
) -> None:
    bundle_id = add_bundle(remote)
    both = [objects.registry(tmp_path / "shared") for _ in range(2)]
    (both[0].path(bundle_id) / "actr.onnx").write_bytes(b"damaged")
    assert [one.renew(bundle_id) for one in both] == [True, True]
    assert not (both[0].root / "bundles" / bundle_id).exists()
    assert (both[1].path(bundle_id) / "actr.onnx").read_bytes() != b"damaged"
    assert [one.renew(bundle_id) for one in both] == [False, False]


def test_who_waits_for_another_process_to_fetch_is_ended_too(
    remote: Place, objects: ObjectStore, tmp_path: Path
) -> None:
    bundle_id = add_bundle(remote)
    first, second = (objects.registry(tmp_path / "shared") for _ in range(2))
    with ThreadPoolExecutor(1) as pool, first._alone():
        waiting = pool.submit(second.path, bundle_id)
        second.close()
        with pytest.raises(RegistryUnavailable, match="closed"):
            waiting.result(timeout=10)


def test_sigterm_ends_a_process_that_still_fetches_its_first_bundle(
    remote: Place, objects: ObjectStore, tmp_path: Path
) -> None:
    remote.registry.promote(add_bundle(remote))
    cache = tmp_path / "cache"
    code = f"""
        import bundle.remote
        from service.app import serve
        from service.settings import Settings

        bundle.remote._CHUNK_BYTES = 1  # takes minutes
        cache = Path({str(cache)!r})
        settings = Settings({objects.url!r}, "file://{tmp_path}", registry_cache=cache)
        serve(settings, "127.0.0.1", {free_port()}, workers=1)
    """
    command = [sys.executable, "-c", "from pathlib import Path\n" + textwrap.dedent(code)]
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent)
    try:
        eventually(lambda: bool(list(cache.glob(".partial-*/*"))), timeout_s=30)
        process.terminate()
        assert process.wait(timeout=15) == 0
        assert list(cache.glob(".partial-*/*"))
    finally:
        process.kill()


def test_a_download_ends_with_its_process(
    remote: Place, objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bundle.remote._CHUNK_BYTES", 1000)
    bundle_id, other = add_bundle(remote), objects.registry(tmp_path / "other")
    read, num = other._files.cat_file, []

    def closed(path: str, **kwargs: Any) -> Any:
        num.append(path)
        if len(num) == 5:
            other.close()
        return read(path, **kwargs)

    monkeypatch.setattr(other._files, "cat_file", closed)
    with pytest.raises(RegistryUnavailable, match="closed during a download"):
        other.path(bundle_id)
    assert len(num) == 5


def test_what_is_received_steps_back_for_requests(
    remote: Place, objects: ObjectStore, tmp_path: Path
) -> None:
    from fsspec.asyn import iothread

    create_app(settings(objects, remote, tmp_path / "cache"))
    own = os.getpriority(os.PRIO_PROCESS, os.getpid())
    assert os.getpriority(os.PRIO_PROCESS, iothread[0].native_id) == own + NICENESS


def test_an_object_store_that_is_away_disturbs_nobody_and_is_followed_again_later(
    remote: Place, objects: ObjectStore, tmp_path: Path
) -> None:
    first, second = (add_bundle(remote, bias=bias) for bias in (0.0, 1.0))
    remote.registry.promote(first)
    token = {"authorization": "Bearer secret"}
    with serving(settings(objects, remote, tmp_path / "cache", control_token="secret")) as client:
        objects.process.send_signal(signal.SIGSTOP)
        try:
            refused = client.post(f"/v1/models/{second}/promote", headers=token)
            assert refused.status_code == 503, refused.text
            assert "imeout" in refused.json()["detail"]
            eventually(lambda: bool(client.get("/v1/models").json()["refusals"]), timeout_s=40)
            models = client.get("/v1/models").json()
            assert models["refusals"][0]["kind"] == "registry"
            assert models["live"]["id"] == first
            assert client.post("/v1/score", json=body()).json()["model"] == first
        finally:
            objects.process.send_signal(signal.SIGCONT)
        remote.registry.promote(second)
        eventually(lambda: client.post("/v1/score", json=body()).json()["model"] == second)


def test_of_two_who_promote_at_the_same_time_one_is_told_and_nothing_is_lost(
    remote: Place, objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [add_bundle(remote, bias=bias) for bias in (0.0, 1.0, 2.0)]
    other = objects.registry(tmp_path / "other")
    replaced = RemoteRegistry._replace_current

    def late(self: RemoteRegistry, content: str) -> None:
        monkeypatch.setattr(RemoteRegistry, "_replace_current", replaced)
        other.promote(ids[1])
        replaced(self, content)

    for before in (None, ids[0]):
        if before:
            other.promote(before)
        monkeypatch.setattr(RemoteRegistry, "_replace_current", late)
        with pytest.raises(RegistryError, match="changed by another at the same time"):
            remote.registry.promote(ids[2])
        assert names(other) == (ids[1], before)
    remote.registry.promote(ids[2])
    assert names(other) == (ids[2], ids[1])


def test_a_promotion_whose_answer_was_lost_is_no_ones_else(
    remote: Place, objects: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [add_bundle(remote, bias=bias) for bias in (0.0, 1.0)]
    assert isinstance(remote.registry, RemoteRegistry)
    put = remote.registry._files.pipe_file

    def lost(*args: Any, **kwargs: Any) -> None:
        put(*args, **kwargs)
        raise TimeoutError("no answer")

    monkeypatch.setattr(remote.registry._files, "pipe_file", lost)
    for bundle_id in ids:
        remote.registry.promote(bundle_id)
    remote.registry.rollback()
    assert names(remote.registry) == (ids[0], ids[1])


def test_a_list_that_could_not_be_had_is_no_short_list(
    remote: Place, objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_bundle(remote)
    other = objects.registry(tmp_path / "other")
    call = other._files._call_s3

    async def slow_down(method: str, *args: Any, **kwargs: Any) -> Any:
        if method == "list_objects_v2":
            raise OSError("SlowDown")
        return await call(method, *args, **kwargs)

    def listing(*_: Any, **__: Any) -> Any:
        raise OSError("SlowDown")

    monkeypatch.setattr(other._files, "_call_s3", slow_down)
    monkeypatch.setattr(other._files, "_iterdir", listing)
    with pytest.raises(RegistryUnavailable, match="SlowDown"):
        other.ids()


def test_a_download_that_went_on_with_another_content_begins_again(
    remote: Place, objects: ObjectStore, tmp_path: Path
) -> None:
    bundle_id = add_bundle(remote)
    other = objects.registry(tmp_path / "other")
    partial = other.root / f".partial-{bundle_id}"
    partial.mkdir(parents=True)
    (partial / "actr.onnx").write_bytes(b"of before")
    with pytest.raises(RegistryUnavailable, match="fetched again from the start"):
        other.path(bundle_id)
    assert other.path(bundle_id).is_dir()


def test_a_download_ends_where_somebody_promotes_or_rolls_back(
    remote: Place, objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bundle.remote._CHUNK_BYTES", 1000)
    ids = [add_bundle(remote, bias=bias) for bias in (0.0, 1.0)]
    for bundle_id in ids:
        remote.registry.promote(bundle_id)
    other = objects.registry(tmp_path / "other")
    read, num = other._files.cat_file, []

    def rolled_back(path: str, **kwargs: Any) -> Any:
        num.append(path)
        if len(num) == 5:
            remote.registry.rollback()
        return read(path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(other._files, "cat_file", rolled_back)
        with pytest.raises(RegistryUnavailable, match="has changed meanwhile"):
            other.path(ids[1])
    assert other.path(ids[1]).is_dir()  # whoever wants it all the same


def test_the_folder_on_this_machine_holds_what_is_in_use_and_no_more(
    remote: Place, objects: ObjectStore, tmp_path: Path
) -> None:
    ids = [add_bundle(remote, bias=bias) for bias in (0.0, 1.0, 2.0, 3.0)]
    other = objects.registry(tmp_path / "other")
    for bundle_id in ids:
        other.promote(bundle_id)
        (other.root / f".partial-{ids[0]}").mkdir(exist_ok=True)
        assert other.path(bundle_id).is_dir()
    assert {path.name for path in (other.root / "bundles").iterdir()} == {ids[2], ids[3]}
    assert not list(other.root.glob(".partial-*"))


def test_where_there_is_no_room_nothing_is_fetched(
    remote: Place, objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle_id = add_bundle(remote)
    other = objects.registry(tmp_path / "other")
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr("bundle.remote.shutil.disk_usage", lambda _: usage)
    with pytest.raises(RegistryUnavailable, match="100 bytes free"):
        other.path(bundle_id)
    assert not list(other.root.glob(".partial-*"))


def test_a_bundle_whose_upload_broke_off_is_not_there_and_can_be_published_again(
    remote: Place, objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, num = objects.files.put_file, []

    def broken(source: str, target: str) -> None:
        num.append(target)
        if len(num) == 3:
            raise ConnectionResetError("cut")
        put(source, target)

    with monkeypatch.context() as patch:
        assert isinstance(remote.registry, RemoteRegistry)
        patch.setattr(remote.registry._files, "put_file", broken)
        with pytest.raises(RegistryUnavailable, match="cut"):
            add_bundle(remote)
    other = objects.registry(tmp_path / "other")
    assert other.ids() == []
    bundle_id = add_bundle(remote)
    assert objects.registry(tmp_path / "third").ids() == [bundle_id]
    assert other.path(bundle_id).is_dir()


def test_what_an_upload_or_a_removal_left_is_swept_a_day_later_and_nothing_else(
    remote: Place, objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, half = (add_bundle(remote, bias=bias) for bias in (0.0, 1.0))
    objects.files.rm_file(objects.path("bundles", half, MANIFEST))
    for name in ("README.md", ".keep/it"):
        objects.files.pipe_file(objects.path("bundles", name), b"somebody's own")
    other = objects.registry(tmp_path / "other")
    assert other.remnants() == []
    monkeypatch.setattr("bundle.registry.REMNANT_S", -5.0)
    assert other.remnants() == [f"bundles/{half}"]
    other.sweep(f"bundles/{half}")
    assert other.remnants() == []
    assert not objects.files.exists(objects.path("bundles", half))
    assert objects.files.exists(objects.path("bundles", "README.md"))
    assert other.path(whole).is_dir()


def test_a_bundle_that_lacks_an_object_is_neither_promoted_nor_opened(
    remote: Place, objects: ObjectStore, tmp_path: Path
) -> None:
    bundle_id = add_bundle(remote)
    objects.files.rm_file(objects.path("bundles", bundle_id, "golden.json"))
    other = objects.registry(tmp_path / "other")
    for act in (other.promote, other.path):
        with pytest.raises(BundleError, match=r"golden\.json: missing"):
            act(bundle_id)


@pytest.mark.parametrize("name", ["../../escaped", "/escaped", "items/../../../escaped"])
def test_a_manifest_cannot_have_a_file_written_outside(
    remote: Place, objects: ObjectStore, tmp_path: Path, name: str
) -> None:
    bundle_id = add_bundle(remote)
    path = objects.path("bundles", bundle_id, MANIFEST)
    manifest = json.loads(objects.files.cat_file(path))
    manifest["files"][name] = "0" * 64
    objects.files.pipe_file(path, json.dumps(manifest).encode())
    with pytest.raises(BundleError, match="can't be a file of it"):
        objects.registry(tmp_path / "other").path(bundle_id)


@pytest.mark.parametrize("broke_off", [False, True])
def test_removing_takes_the_bundle_away_here_and_there(
    remote: Place, objects: ObjectStore, tmp_path: Path, broke_off: bool
) -> None:
    ids = [add_bundle(remote, bias=bias) for bias in (0.0, 1.0)]
    if broke_off:
        remote.registry.read(ids[0])
        objects.files.rm_file(objects.path("bundles", ids[0], MANIFEST))
    remote.registry.remove(ids[0])
    assert objects.registry(tmp_path / "other").ids() == [ids[1]]
    assert remote.registry.ids() == [ids[1]]
    assert objects.files.find(objects.path("bundles", ids[0])) == []
    with pytest.raises(RegistryError, match=f"there are: {ids[1]}"):
        remote.registry.path(ids[0])


def test_any_file_system_of_fsspec_will_do(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/registry"
    place = make_place(tmp_path)
    place = replace(place, registry=open_registry(url, tmp_path / "producer"))
    ids = [add_bundle(place, bias=bias) for bias in (0.0, 1.0)]
    other = open_registry(f"{url}/", tmp_path / "other")
    for bundle_id in ids:
        other.promote(bundle_id)
    assert names(place.registry) == (ids[1], ids[0])
    assert place.registry.rollback().current == ids[0]
    assert other.path(ids[0]).is_dir()


@pytest.mark.parametrize("spoil", [b'{"curr', b"[]", b'{"current": 1}'])
def test_a_pointer_that_cannot_be_read_says_so_and_is_replaced_by_a_promotion(
    remote: Place, objects: ObjectStore, spoil: bytes
) -> None:
    bundle_id = add_bundle(remote)
    objects.files.pipe_file(objects.path("current.json"), spoil)
    for _ in range(2):
        with pytest.raises(RegistryError, match="unreadable"):
            remote.registry.current()
    remote.registry.promote(bundle_id)
    assert names(remote.registry) == (bundle_id, None)


@pytest.mark.parametrize(
    ("where", "cache", "expected"),
    [
        ("s3://bucket", None, "needs a folder"),
        ("nosuch://bucket", Path("cache"), r"nosuch.*pip install 'ecdctr\[s3\]'"),
    ],
)
def test_a_url_that_cannot_be_used_says_what_is_lacking(
    where: str, cache: Path | None, expected: str
) -> None:
    with pytest.raises(RegistryError, match=expected):
        open_registry(where, cache)


def test_the_verbs_take_a_url(
    remote: Place,
    objects: ObjectStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ids = [add_bundle(remote, bias=bias) for bias in (0.0, 1.0)]
    run: Callable[..., None] = lambda *words: ecdctr.main(  # noqa: E731
        ["--workspace", str(tmp_path / "own"), *words, "--registry", objects.url]
    )
    run("promote", ids[0])
    run("promote", ids[1])
    run("rollback")
    assert f"current: {ids[0]}, previous: {ids[1]}" in capsys.readouterr().out
    assert names(remote.registry) == (ids[0], ids[1])
    run("prune", "--keep", "1")
    assert capsys.readouterr().out == ""  # all are live or may be
