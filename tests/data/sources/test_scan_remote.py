"""Scanning tars, lists and pictures on servers and in buckets (data/sources/scan.py)."""

import io
import json
import os
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from configs.errors import InputError
from data.sources.download_cache import delete_copies
from tests.data.sources.made_scans import NAMES, facts_by_name, picture_bytes, read_all, write_tar
from tests.patience import PATIENCE


def requests_of_files(requests):
    """Those that are not for a file's state."""
    return [(path, wanted) for path, wanted in requests if wanted != "bytes=0-0"]


def test_a_remote_tar_is_fetched_once(scan, folders, tars, serve_folder, tmp_path, reads):
    expected = facts_by_name(scan(**folders))
    url, requests = serve_folder(tars)
    scanned = scan(tars=f"{url}/{{a,b}}.tar")
    assert facts_by_name(scanned) == expected
    read_all(scanned)
    assert sorted(requests_of_files(requests)) == [("/a.tar", None), ("/b.tar", None)]

    reads.clear(), requests.clear()
    again = scan(tars=f"{url}/{{a,b}}.tar")
    assert facts_by_name(again) == expected and reads == [] and requests_of_files(requests) == []
    delete_copies(tmp_path / "cache")
    assert not (tmp_path / "cache" / "copies").exists()
    read_all(again[:2])
    assert [path for path, wanted in requests_of_files(requests) if wanted] == ["/a.tar"] * 4, "single pictures"


def test_what_another_is_writing_is_left_to_it(tmp_path):
    """A late helper or a dry run, while this job ends."""
    copies = tmp_path / "cache" / "copies"
    copies.mkdir(parents=True)
    for name in ("a.copy", "b.pictures", "c.copy.0123abcd.part", "d.copy.4567cdef.part"):
        (copies / name).write_text("x")
    os.utime(copies / "d.copy.4567cdef.part", (0, 0))
    delete_copies(tmp_path / "cache")
    assert [file.name for file in copies.iterdir()] == ["c.copy.0123abcd.part"]
    os.utime(copies / "c.copy.0123abcd.part", (0, 0))
    for _ in range(2):
        delete_copies(tmp_path / "cache")
        assert not copies.exists()


def test_copies_go_although_a_new_one_comes_meanwhile(tmp_path, monkeypatch):
    copies = tmp_path / "cache" / "copies"
    copies.mkdir(parents=True)
    (copies / "a.copy").write_text("x")
    unlink = Path.unlink

    def unlink_slowly(path, **options):
        unlink(path, **options)
        (copies / "new.copy.0123abcd.part").write_text("x")

    monkeypatch.setattr(Path, "unlink", unlink_slowly)
    delete_copies(tmp_path / "cache")
    assert [file.name for file in copies.iterdir()] == ["new.copy.0123abcd.part"]


def test_without_room_for_copies_pictures_are_fetched_one_by_one(scan, tars, serve_folder, tmp_path):
    url, requests = serve_folder(tars)
    scanned = scan(tars=f"{url}/{{a,b}}.tar", copies_gib=0)
    assert list((tmp_path / "cache" / "copies").iterdir()) == []
    requests.clear()
    read_all(scanned)
    assert len(requests) == 40 and all(wanted for _, wanted in requests)


def test_a_remote_tar_that_changed_is_fetched_again(scan, tars, serve_folder):
    url, _ = serve_folder(tars)
    scan(tars=f"{url}/a.tar")
    write_tar(tars / "a.tar", {"new.png": picture_bytes(7), "new.mask.png": picture_bytes(7, mask=True)})
    (entry,) = scan(tars=f"{url}/a.tar")
    assert entry.item.name == "a/new"
    read_all([entry])


def test_a_remote_tar_that_is_cut_is_named_by_its_url_and_not_kept(scan, tars, serve_folder, tmp_path):
    os.truncate(tars / "a.tar", 3000)
    url, _ = serve_folder(tars)
    with pytest.raises(InputError, match=rf"^{url}/a\.tar: cut off"):
        scan(tars=f"{url}/a.tar")
    assert list((tmp_path / "cache" / "copies").iterdir()) == []


def test_a_connection_that_ends_early_is_tried_again(scan, tars, serve, monkeypatch):
    monkeypatch.setattr("data.storage.retry.FIRST_WAIT_SECONDS", 0.001)
    data, calls = (tars / "a.tar").read_bytes(), []

    def get(handler):
        calls.append(handler.headers.get("Range"))
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.send_header("ETag", "1")
        handler.end_headers()
        handler.wfile.write(data if len(calls) == 3 else data[:5000])

    scanned = scan(tars=f"{serve(get)}/a.tar")
    assert [entry.item.name for entry in scanned] == NAMES[:10]
    assert calls == ["bytes=0-0", None, None]


@pytest.mark.parametrize("copies_gib", [1, 0])
def test_a_list_of_urls_is_fetched_once_if_there_is_room(scan, folders, serve_folder, tmp_path, reads, copies_gib):
    expected = [entry[1:] for entry in facts_by_name(scan(**folders)).values()]
    url, requests = serve_folder(tmp_path)
    rows = [{"target": f"{url}/target/{name}.png", "mask": f"{url}/mask/{name}.png", "id": name} for name in NAMES]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = {"table": str(tmp_path / "list.jsonl"), "columns": {"name": "id"}}
    scanned = scan(**dataset, copies_gib=copies_gib)
    assert [facts[1:] for facts in facts_by_name(scanned).values()] == expected
    assert len(requests) == 40
    read_all(scanned)
    assert len(requests) == (40 if copies_gib else 80)
    reads.clear()
    read_all(scan(**dataset, copies_gib=copies_gib))
    assert reads == []


def test_workers_that_copy_the_same_pictures_at_once_each_find_their_own(scan, folders, serve, tmp_path):
    """Two workers on one list of URLs; the server answers each in an order of its own."""
    asked, lock, both_scan = Counter(), threading.Lock(), threading.Barrier(2, timeout=PATIENCE)

    def get(handler):
        with lock:
            asked[handler.path] += 1
        if handler.path == "/target/a/00.png":
            both_scan.wait()
        number = int(handler.path[-6:-4])
        time.sleep(0.002 * (number if asked[handler.path] == 1 else 10 - number))
        data = (tmp_path / handler.path.lstrip("/")).read_bytes()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    url = serve(get)
    rows = [{"target": f"{url}/target/{name}.png", "mask": f"{url}/mask/{name}.png"} for name in NAMES]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with ThreadPoolExecutor(2) as pool:
        for scanned in pool.map(lambda _: scan(table=str(tmp_path / "list.jsonl")), range(2)):
            read_all(scanned)
    assert set(asked.values()) == {2}
    read_all(scan(table=str(tmp_path / "list.jsonl")))
    assert set(asked.values()) == {2}, "copied once more by each worker, and read from the copies since"


def test_a_list_on_a_server_and_its_pictures(scan, folders, serve_folder, tmp_path):
    expected = [entry[1:] for entry in facts_by_name(scan(**folders)).values()]
    rows = [{"target": f"target/{name}.png", "mask": f"mask/{name}.png"} for name in NAMES]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    url, _ = serve_folder(tmp_path)
    scanned = scan(table=f"{url}/list.jsonl")
    assert [entry.item.name for entry in scanned] == [f"target/{name}" for name in NAMES]
    assert [facts[1:] for facts in facts_by_name(scanned).values()] == expected
    read_all(scanned)


def test_a_picture_that_the_server_lacks_is_named_at_once_and_no_token(scan, serve_folder, tmp_path):
    url, requests = serve_folder(tmp_path)
    row = {"target": f"{url}/nothing.png?token=secret", "mask": f"{url}/m.png"}
    (tmp_path / "list.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=rf"{url}/nothing\.png: the server answers 404 Not Found\. Correct the URL"):
        scan(table=str(tmp_path / "list.jsonl"))
    assert len(requests) == 2, "each is asked for once: what the server lacks it lacks"


def test_no_message_holds_the_token_of_a_signed_url(scan, serve, no_waits, caplog):
    """Neither the log's of attempts, nor the error's in the end."""
    url = serve(lambda handler: handler.send_error(503))
    with pytest.raises(InputError, match=rf"^{url}/a\.tar: failed 8 time\(s\)") as caught:
        scan(tars=f"{url}/a.tar?X-Amz-Signature=secret")
    assert "attempt 8 of 8" in caplog.text
    assert "secret" not in str(caught.value) + caplog.text


@pytest.fixture
def bucket(monkeypatch):
    """Stands for s3: a file system in memory, with ETags. `bucket["name/a.tar"] = bytes`."""

    class Bucket(MemoryFileSystem):
        protocol = ("s3",)
        store: ClassVar[dict] = {}
        pseudo_dirs: ClassVar[list] = [""]

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.removeprefix("s3://").strip("/")

        def info(self, path, **options):
            return super().info(path, **options) | {"ETag": str(hash(bytes(self.store[path].getbuffer())))}

        def _open(self, path, mode="rb", **options):
            if mode != "rb":
                return super()._open(path, mode, **options)
            return io.BytesIO(self.store[path].getvalue())  # its own: threads would share a memory file's position

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", Bucket)
    return Bucket()


def test_tars_and_lists_in_a_bucket(scan, folders, tars, bucket, reads, tmp_path):
    expected = facts_by_name(scan(**folders))
    for letter in "ab":
        bucket.pipe(f"s3://photos/{letter}.tar", (tars / f"{letter}.tar").read_bytes())
    scanned = scan(tars="s3://photos/{a,b}.tar", copies_gib=0)
    assert facts_by_name(scanned) == expected
    read_all(scanned)
    reads.clear()
    assert facts_by_name(scan(tars="s3://photos/{a,b}.tar")) == expected and reads == []

    rows = []
    for name in NAMES:
        for role in ("target", "mask"):
            bucket.pipe(f"s3://photos/list/{role}/{name}.png", (tmp_path / role / f"{name}.png").read_bytes())
        rows.append({"target": f"target/{name}.png", "mask": f"mask/{name}.png", "id": name})
    bucket.pipe("s3://photos/list/list.jsonl", "\n".join(map(json.dumps, rows)).encode())
    listed = scan(table="s3://photos/list/list.jsonl", columns={"name": "id"})
    assert [facts[1:] for facts in facts_by_name(listed).values()] == [facts[1:] for facts in expected.values()]
    read_all(listed)
