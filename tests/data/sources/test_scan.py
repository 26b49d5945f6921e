import errno
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from configs.data_schema import DataConfig
from configs.errors import InputError, StorageFailed
from data.sources.download_cache import delete_copies
from data.sources.problems import TRUNCATED, ProblemsFound
from data.sources.scan import _UNIT_THREADS
from tests.data.sources.made_scans import (
    NAMES,
    facts_by_name,
    picture_bytes,
    read_all,
    scanned_by,
    write_folders,
    write_tar,
)
from tests.patience import PATIENCE


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
    all_halfway, other_is_done, counts = threading.Barrier(_UNIT_THREADS + 1, timeout=PATIENCE), threading.Event(), []

    def stop_halfway(count):
        counts.append(count)
        if sum(counts) > 310 and not other_is_done.is_set():
            all_halfway.wait()  # each with its unit read and kept
            assert other_is_done.wait(PATIENCE)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(scanned_by, data, stop_halfway)
        all_halfway.wait()
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


def test_a_folder_that_a_list_names_wrong_is_told_once_and_at_once(scan, tmp_path, folders):
    """Picture by picture it would look like a disk that went away, and be waited for."""
    rows = [{"target": f"tagret/a/{n}.png", "mask": f"mask/a/{n}.png"} for n in ("00", "01")]
    rows += [{"target": "target/a/02.png", "mask": "mask/b/gone.png"}, {"target": "target/a/03.png", "mask": "x"}]
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError) as caught:
        scan(table=str(tmp_path / "one.jsonl"))
    told = str(caught.value)
    assert told.count("tagret") == 1 and f"names 2 pictures in {tmp_path}/tagret/a, which is no folder" in told
    assert "mask/b/gone.png: no such picture" in told and f"{tmp_path}/x: no such picture" in told


def test_a_list_may_be_named_by_its_file_alone(scan, tmp_path, monkeypatch):
    (tmp_path / "one.jsonl").write_text('{"target": "a.png", "mask": "m.png"}')
    (tmp_path / "a.png").write_bytes(picture_bytes(0))
    (tmp_path / "m.png").write_bytes(picture_bytes(0, mask=True))
    monkeypatch.chdir(tmp_path)
    assert [entry.item.name for entry in scan(table="one.jsonl")] == ["a"]


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
