import errno
import io
import json
import os
import sys
import tarfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from configs.data_schema import DataConfig
from configs.errors import InputError, StorageFailed
from data.sources.download_cache import delete_copies
from data.sources.problems import TRUNCATED, Findings, ProblemsFound
from data.sources.scan import scan_dataset

NAMES = [f"{letter}/{number:02d}" for letter in "ab" for number in range(10)]


def picture_bytes(seed, size=(24, 16), *, mask=False):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    pixels = np.where(pixels > 127, 250, 5).astype(np.uint8) if mask else np.stack([pixels] * 3, -1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_folders(folder, names=NAMES):
    for number, name in enumerate(names):
        for role in ("target", "mask"):
            path = folder / role / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture_bytes(number, mask=role == "mask"))
        (folder / "target" / f"{name}.txt").write_text(f"caption {number}")


def write_tar(path, pictures):
    """pictures: member name -> bytes."""
    with tarfile.open(path, "w") as archive:
        for name, data in pictures.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


@pytest.fixture
def reads(monkeypatch):
    """The pictures that were read, in order."""
    seen = []

    def count(file, **limits):
        seen.append(str(file))
        return _read_picture(file, **limits)

    from data.sources.scan import read_picture as _read_picture

    monkeypatch.setattr("data.sources.scan.read_picture", count)
    return seen


def scanned_by(data, advance=lambda count: None, **options):
    findings = Findings()
    scanned = scan_dataset(data.datasets[0], data, advance, findings, **options)
    findings.raise_problems()
    return scanned


@pytest.fixture
def scan(tmp_path):
    """Scans a dataset: `scan(copies_gib=1, tars=...)` -> its items and facts."""

    def run(*, copies_gib=1, thorough=False, **dataset):
        config = {"name": "photos", **dataset}
        data = DataConfig.model_validate({"cache": tmp_path / "cache", "datasets": [config], "copies_gib": copies_gib})
        advanced = []
        scanned = scanned_by(data, advanced.append, thorough=thorough)
        assert sum(advanced) == len(scanned)
        return scanned

    return run


@pytest.fixture
def folders(tmp_path):
    write_folders(tmp_path)
    return {"target": tmp_path / "target", "mask": tmp_path / "mask"}


def facts_by_name(scanned):
    return {entry.item.name: (entry.item.caption, entry.target[:5], entry.mask and entry.mask[:5]) for entry in scanned}


def test_facts_are_of_the_pictures(scan, folders):
    scanned = scan(**folders)
    assert [entry.item.name for entry in scanned] == NAMES
    for number, entry in enumerate(scanned):
        assert entry.item.caption == f"caption {number}"
        assert entry.target[1:3] == entry.mask[1:3] == (24, 16)
        assert (entry.mask.darkest, entry.mask.brightest) == (5, 250)
        assert entry.target.content == entry.item.target.read(1 << 20).content
    assert len({entry.target.content for entry in scanned}) == len(NAMES)


def test_nothing_is_read_twice(scan, folders, reads):
    first = scan(**folders)
    assert len(reads) == 2 * len(NAMES) == len(set(reads))
    reads.clear()
    assert scan(**folders) == first
    assert reads == []


def test_storage_that_fails_ends_the_scan_and_blames_no_picture(scan, tmp_path, monkeypatch, no_waits):
    write_folders(tmp_path, [f"{number:03d}" for number in range(200)])
    reads = []

    def fail(path, offset, size):
        reads.append(path)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("data.sources.picture_file._read_local", fail)
    with pytest.raises(StorageFailed, match=r"\.png: cannot be read \(Input/output error\): failed 8 time"):
        scan(target=tmp_path / "target", mask=tmp_path / "mask")
    assert len(set(reads)) < 300, "it would take as long a wait for each of the 400"


@pytest.mark.parametrize("change", ["pixels", "pixels, size and time as before", "mask", "new", "removed"])
def test_every_change_is_seen(scan, folders, reads, tmp_path, change):
    scan(**folders)
    path = tmp_path / "target" / "a" / "03.png"
    before = path.stat()
    if change == "new":
        write_folders(tmp_path, ["c/new"])
    elif change == "removed":
        (tmp_path / "mask" / "a" / "03.png").unlink(), path.unlink()
    elif change == "mask":
        (tmp_path / "mask" / "a" / "03.png").write_bytes(picture_bytes(99, mask=True))
    else:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1  # of the last chunk's checksum, which decoders do not look at
        path.write_bytes(data)
        if "time" in change:  # as rsync and cp --preserve leave it
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            assert path.stat().st_mtime_ns == before.st_mtime_ns
    reads.clear()
    found = facts_by_name(scan(**folders))
    fresh_cache = {"cache": tmp_path / "fresh", "datasets": [{"name": "photos", **folders}]}
    data = DataConfig.model_validate(fresh_cache)
    assert found == facts_by_name(scanned_by(data))


def test_a_caption_is_read_every_time(scan, folders, reads, tmp_path):
    scan(**folders)
    reads.clear()
    (tmp_path / "target" / "a" / "03.txt").write_text("another")
    assert facts_by_name(scan(**folders))["a/03"][0] == "another"
    assert reads == []


def test_a_picture_written_again_within_the_same_tick_is_seen(scan, folders, tmp_path):
    """Files that were written just now: what is found is good only once a later change would show in their times."""
    path = tmp_path / "target" / "a" / "00.png"
    for number in range(5):
        path.write_bytes(picture_bytes(100 + number))
        found = scan(**folders)[0]
        assert found.target.content == found.item.target.read(1 << 20).content


def results(tmp_path):
    return sorted((tmp_path / "cache" / "scan" / "photos").iterdir())


@pytest.mark.parametrize("damage", [b"", b"<!DOCTYPE html>", None])
def test_damaged_results_are_found_out_anew(scan, folders, reads, tmp_path, damage):
    first = scan(**folders)
    (file,) = results(tmp_path)
    text = file.read_bytes()
    file.write_bytes(text.replace(b"24", b"25", 1) if damage is None else damage)
    reads.clear()
    assert scan(**folders) == first
    assert len(reads) == 2 * len(NAMES)
    assert file.read_bytes() == text


def test_what_is_gone_is_forgotten(scan, folders, tmp_path):
    scan(**folders)
    old = results(tmp_path)
    write_folders(tmp_path, ["new"])
    scan(**folders)
    assert len(results(tmp_path)) == 1 and results(tmp_path) != old


def test_a_change_reads_a_part_of_a_large_set_anew(scan, reads, tmp_path):
    names = [f"{number:04d}" for number in range(600)]
    write_folders(tmp_path, names)
    folders = {"target": tmp_path / "target", "mask": tmp_path / "mask"}
    scan(**folders)
    assert len(results(tmp_path)) == 16
    reads.clear()
    write_folders(tmp_path, ["one-more"])
    scan(**folders)
    assert 0 < len(reads) < 2 * 100


def test_what_another_worker_found_is_taken_over(folders, reads, tmp_path):
    """One stops halfway while another scans to the end, and goes on then: together they read each picture once."""
    write_folders(tmp_path, [f"{number:04d}" for number in range(600)])
    data = DataConfig.model_validate({"cache": tmp_path / "cache", "datasets": [{"name": "photos", **folders}]})
    halfway, other_is_done, counts = threading.Event(), threading.Event(), []

    def stop_halfway(count):
        counts.append(count)
        if sum(counts) > 310:
            halfway.set()
            assert other_is_done.wait(30)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(scanned_by, data, stop_halfway)
        assert halfway.wait(30)
        second = scanned_by(data)
        other_is_done.set()
        assert first.result() == second and len(second) == 620
    assert len(reads) == 2 * 620


def test_every_picture_at_fault_is_named_and_the_good_ones_are_kept(scan, reads, tmp_path):
    names = [f"{number:04d}" for number in range(600)]
    write_folders(tmp_path, names)
    folders = {"target": tmp_path / "target", "mask": tmp_path / "mask"}
    for name in ("0007", "0100"):
        (tmp_path / "mask" / f"{name}.png").write_text("<!DOCTYPE html>")
    with pytest.raises(InputError) as caught:
        scan(**folders)
    lines = str(caught.value).splitlines()
    assert [Path(line.partition(":")[0]).stem for line in lines] == ["0007", "0100"]
    for name in ("0007", "0100"):
        (tmp_path / "mask" / f"{name}.png").write_bytes(picture_bytes(1, mask=True))
    reads.clear()
    scan(**folders)
    assert 0 < len(reads) < 2 * 200


def test_a_config_that_names_the_caption_column_takes_no_result_of_one_that_does_not(scan, tmp_path, folders):
    rows = [{"target": f"target/a/0{n}.png", "mask": "mask/a/00.png", "text": "a poem"} for n in (0, 1)]
    rows[1]["caption"] = "a cat"
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = str(tmp_path / "one.jsonl")
    assert [entry.item.caption for entry in scan(table=table)] == ["a poem", "a cat"]
    assert [entry.item.caption for entry in scan(table=table, columns={"caption": "caption"})] == [None, "a cat"]


def test_a_picture_that_was_cut_off_is_found_by_decoding_once(scan, folders, tmp_path, monkeypatch):
    sound, decoded = scan(**folders), []
    assert scan(thorough=True, **folders) == sound
    monkeypatch.setattr("data.sources.scan.load_picture", lambda *a, **k: decoded.append(a))
    scan(**folders)
    scan(thorough=True, **folders)
    assert not decoded, "that they can be decoded was found out before"
    monkeypatch.undo()
    path = tmp_path / "target" / "a" / "00.png"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ProblemsFound) as caught:
        scan(thorough=True, **folders)
    assert [(problem.kind, problem.where) for problem in caught.value.problems] == [(TRUNCATED, str(path))]


# --- tars -------------------------------------------------------------------------------------------------------------


def members_of(tmp_path, letter):
    members = {}
    for number in range(10):
        name = f"{letter}/{number:02d}"
        members[f"{number:02d}.png"] = (tmp_path / "target" / f"{name}.png").read_bytes()
        members[f"{number:02d}.mask.png"] = (tmp_path / "mask" / f"{name}.png").read_bytes()
        members[f"{number:02d}.txt"] = (tmp_path / "target" / f"{name}.txt").read_bytes()
    return members


@pytest.fixture
def tars(folders, tmp_path):
    for letter in "ab":
        write_tar(tmp_path / f"{letter}.tar", members_of(tmp_path, letter))
    return tmp_path


def test_tars_hold_what_folders_hold(scan, folders, tars, reads):
    from_folders = facts_by_name(scan(**folders))
    assert facts_by_name(scan(tars=f"{tars}/{{a,b}}.tar")) == from_folders
    reads.clear()
    again = scan(tars=f"{tars}/{{a,b}}.tar")
    assert facts_by_name(again) == from_folders and reads == []
    for entry in again:
        for file, facts in ((entry.item.target, entry.target), (entry.item.mask, entry.mask)):
            assert file.read(1 << 20).content == facts.content


def test_only_the_tar_that_changed_is_read_anew(scan, tars, reads):
    scan(tars=[f"{tars}/a.tar", f"{tars}/b.tar"])
    write_tar(tars / "b.tar", {"new.png": picture_bytes(7), "new.mask.png": picture_bytes(7, mask=True)})
    reads.clear()
    scanned = scan(tars=[f"{tars}/a.tar", f"{tars}/b.tar"])
    assert [entry.item.name for entry in scanned] == [*NAMES[:10], "b/new"]
    assert reads == [f"{tars}/b.tar: new.png", f"{tars}/b.tar: new.mask.png"]


def test_every_damaged_tar_is_named(scan, tars):
    os.truncate(tars / "a.tar", 3000)
    (tars / "b.tar").write_text("<!DOCTYPE html>" * 100)
    with pytest.raises(InputError) as caught:
        scan(tars=[f"{tars}/a.tar", f"{tars}/b.tar", f"{tars}/c.tar"])
    lines = str(caught.value).splitlines()
    assert ["cut off" in lines[0], "no tar; it begins" in lines[1], "no such tar" in lines[2]] == [True] * 3


def test_a_picture_in_a_tar_that_is_none_is_named(scan, tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": b"<html>", "1.mask.png": picture_bytes(1, mask=True)})
    with pytest.raises(InputError, match=r"a\.tar: 1\.png: not a readable picture \(not one of PNG, .*b'<html>'\)"):
        scan(tars=str(tmp_path / "a.tar"))


def test_rows_that_are_there_twice_are_refused(scan, tmp_path, folders):
    row = '{"target": "target/a/00.png", "mask": "mask/a/00.png"}\n'
    (tmp_path / "one.jsonl").write_text(row * 2)
    with pytest.raises(InputError, match=r"target/a/00\.png: is there twice, with the same mask, source and caption\."):
        scan(table=str(tmp_path / "one.jsonl"))


def test_names_that_meet_are_refused(scan, tmp_path, folders):
    rows = [{"target": f"target/a/{n}.png", "mask": "mask/a/00.png", "id": "same"} for n in ("00", "01")]
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, rows)))
    message = r"target/a/01\.png: makes a second sample of the name same in dataset photos, beside"
    with pytest.raises(InputError, match=message):
        scan(table=str(tmp_path / "one.jsonl"), columns={"name": "id"})


def test_rows_of_one_picture_are_samples_of_their_own(scan, tmp_path, folders):
    rows = [{"target": "target/a/00.png", "mask": f"mask/a/0{number}.png"} for number in range(3)]
    rows += [rows[0] | {"caption": "another"}, {"target": "target/a/01.png", "mask": "mask/a/01.png"}]
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scanned = scan(table=str(tmp_path / "one.jsonl"))
    assert [entry.item.name for entry in scanned] == [
        *("target/a/00", "target/a/00#2", "target/a/00#3", "target/a/00#4", "target/a/01"),
    ]
    assert len({entry.target.content for entry in scanned[:4]}) == 1, "of one split"


@pytest.mark.parametrize(
    "dataset",
    [
        {"tars": "cache/shards/{000..001}.tar"},
        {"tars": ["elsewhere/a.tar", "cache/shards/mine/b.tar"]},
        {"tars": "link/a.tar"},
        {"table": "cache/copies/list.jsonl"},
        {"table": "cache/shards"},
        {"target": "cache/validation", "mask": "masks"},
        {"target": "targets", "mask": "cache/scan/masks"},
    ],
)
def test_pictures_in_folders_that_the_cache_clears_are_refused(scan, tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "cache" / "shards")
    with pytest.raises(InputError, match=r"lies in a folder of data.cache .* Move the pictures elsewhere"):
        scan(**dataset)


# --- pictures inside tables -------------------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path):
    """A dataset of five pictures that lie, with their masks, inside a table."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {role: [picture_bytes(n, mask=role == "mask") for n in range(5)] for role in ("target", "mask")}
    parquet.write_table(pa.table(columns), tmp_path / "list.parquet")
    return {"table": str(tmp_path / "list.parquet")}


def test_pictures_inside_a_table_are_read_once(scan, parquet, reads, tmp_path):
    """Also when their pack went, as it does once all is encoded."""
    first = scan(**parquet)
    read_all(first)
    assert len(reads) == 10
    reads.clear()
    assert scan(**parquet) == first
    delete_copies(tmp_path / "cache")
    again = scan(**parquet)
    assert again == first and reads == []
    read_all(again)


def test_pictures_inside_a_table_that_changed_are_read_anew(scan, parquet, reads, tmp_path):
    import pyarrow as pa
    from pyarrow.parquet import write_table

    scan(**parquet)
    columns = {"target": [picture_bytes(9)], "mask": [picture_bytes(9, mask=True)]}
    write_table(pa.table(columns), tmp_path / "list.parquet")
    reads.clear()
    read_all(scan(**parquet))
    assert len(reads) == 2


def test_a_cache_may_be_called_otherwise(scan, parquet, reads, tmp_path):
    scan(**parquet)
    (tmp_path / "cache").rename(tmp_path / "moved")
    data = DataConfig.model_validate({"cache": tmp_path / "moved", "datasets": [{"name": "photos", **parquet}]})
    reads.clear()
    read_all(scanned_by(data))
    assert reads == []


# --- remote -----------------------------------------------------------------------------------------------------------


def requests_of_files(requests):
    """Those that are not for a file's state."""
    return [(path, wanted) for path, wanted in requests if wanted != "bytes=0-0"]


def read_all(scanned):
    """As encoding does, checked against the facts."""
    for entry in scanned:
        for file, facts in ((entry.item.target, entry.target), (entry.item.mask, entry.mask)):
            assert file.read(1 << 20).content == facts.content


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
    asked, both_scan = Counter(), threading.Barrier(2)

    def get(handler):
        asked[handler.path] += 1
        if handler.path == "/target/a/00.png":
            both_scan.wait(10)
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
