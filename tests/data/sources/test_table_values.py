"""Lists as CSV, Parquet and Arrow files, and pictures inside them (data/sources/tables.py)."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from configs.errors import InputError
from data.sources.problems import ProblemsFound
from data.sources.tables import find_tables
from tests.data.sources.made_tables import items_of
from tests.payloads import canary_pickle

needs_pyarrow = pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed: pip install 'fluxfill[parquet]'"
)


def write_csv(tmp_path, *lines):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "metadata.csv").write_text("".join(f"{line}\n" for line in lines))
    return tmp_path / "hub" / "metadata.csv"


@pytest.mark.parametrize(
    "line, message",
    [
        (
            "a.png,m.png,a red, old car",
            r"line 3: 1 cell\(s\) more than the first line has columns, from 'old car' on\. Put",
        ),
        ("a.png,m.png,a, b, c", r"line 3: 2 cell\(s\) more"),
        ('a.png,m.png,"a red car', r"line 3: no CSV \(unexpected end of data\)"),
        (f"a.png,m.png,{'x' * 200_000}", r"line 3: no CSV \(field larger than"),
        (",m.png,text", r"line 3: no image, but "),
    ],
)
def test_a_line_of_a_csv_at_fault_is_named(tmp_path, line, message):
    table = write_csv(
        tmp_path, "file_name,mask_file_name,caption", 'b.png,m.png,"a red, old car"', line, "c.png,m.png,x"
    )
    with pytest.raises(InputError, match=rf"^{table}, {message}"):
        items_of(table, target="image")


def test_an_empty_cell_of_a_csv_is_none(tmp_path):
    """So it has the default caption, as the row of another list that has none."""
    table = write_csv(tmp_path, "file_name,mask_file_name,caption", "a.png,m.png,", "b.png,m.png", "c.png,m.png,x")
    assert [item.caption for item in items_of(table, target="image")] == [None, None, "x"]


def write_arrow(path, columns, *, stream=True):
    import pyarrow as pa
    from pyarrow import parquet

    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=2)
        return path
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


@needs_pyarrow
@pytest.mark.parametrize("name, stream", [("list.parquet", True), ("list.arrow", True), ("list.arrow", False)])
def test_pictures_inside_a_table_are_copied_out(tmp_path, name, stream):
    pictures = [{"bytes": f"picture {number}".encode(), "path": f"{number}.jpg"} for number in range(5)]
    masks = [f"mask {number}".encode() for number in range(5)]
    captions = ["a", None, "c", "d", "e"]
    table = write_arrow(tmp_path / name, {"image": pictures, "mask": masks, "caption": captions}, stream=stream)
    with (tmp_path / "pack").open("wb") as packed:
        items = items_of(table, target="image", packed=packed, pack=tmp_path / "pack")
    assert [item.name for item in items] == [f"list/0000000{number}" for number in range(5)]
    assert [item.target.read(99).data for item in items] == [picture["bytes"] for picture in pictures]
    assert [item.mask.read(99).data for item in items] == masks
    assert [item.target.suffix for item in items] == [".jpg"] * 5
    assert [item.caption for item in items] == captions


@pytest.mark.fault(27, "a type of Arrow's that is a pickle, in a table's schema")
@needs_pyarrow
@pytest.mark.parametrize("name, stream", [("list.parquet", True), ("list.arrow", True), ("list.arrow", False)])
def test_a_type_that_is_a_pickle_is_not_made(tmp_path, name, stream):
    import pyarrow as pa

    canary = tmp_path / "canary"
    extension = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": canary_pickle(canary)}
    field = pa.field("target", pa.string(), metadata=extension)
    columns = pa.table({"target": ["a.png"], "mask": ["m.png"]}, schema=pa.schema([field, ("mask", pa.string())]))
    (item,) = items_of(write_arrow(tmp_path / name, columns, stream=stream))
    assert item.target.place == str(tmp_path / "a.png")
    assert not canary.exists()


@needs_pyarrow
def test_splits_of_a_hugging_face_folder_do_not_meet(tmp_path):
    """As save_to_disk writes them: files of one name in a folder for each split."""
    for split in ("train", "test"):
        (tmp_path / "hub" / split).mkdir(parents=True)
        write_arrow(tmp_path / "hub" / split / "data-00000-of-00001.arrow", {"target": [b"1"], "mask": [b"2"]})
    tables = find_tables(str(tmp_path / "hub"), "listed")
    names = [item.name for table in tables for item in items_of(Path(table), below=tmp_path / "hub")]
    assert names == [f"{split}/data-00000-of-00001/00000000" for split in ("test", "train")]


def test_what_datasets_left_beside_its_data_is_no_data(tmp_path):
    """Intermediate results of its map and filter, in a folder of save_to_disk and in one of its own cache."""
    ours = ["saved/data-00000-of-00002.arrow", "saved/data-00001-of-00002.arrow", "cache/photos-train.arrow"]
    ours += ["mine/cache-photos.arrow", "mine/state.json"]
    theirs = ["saved/cache-0123456789abcdef.arrow", "saved/cache-mine.arrow", "saved/tmpab12.arrow"]
    theirs += ["cache/cache-0123456789abcdef.arrow", "cache/cache-0123456789abcdef_00001_of_00004.arrow"]
    for name in ours + theirs:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    state = {"_data_files": [{"filename": f"data-0000{number}-of-00002.arrow"} for number in range(2)]}
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    found = find_tables(str(tmp_path), "listed")
    assert found == sorted(f"{tmp_path}/{name}" for name in ours if not name.endswith("json"))


@needs_pyarrow
def test_paths_in_a_parquet_table_are_paths(tmp_path):
    table = write_arrow(tmp_path / "list.parquet", {"target": ["a.png"], "mask": [{"path": "m.png", "bytes": None}]})
    (item,) = items_of(table)
    assert [file.place for file in item.pictures] == [f"{tmp_path}/a.png", f"{tmp_path}/m.png"]
    escaping = write_arrow(tmp_path / "list.parquet", {"target": ["../a.png"], "mask": ["m.png"]})
    with pytest.raises(InputError, match=r"list\.parquet, row 1: target is '\.\./a\.png', which leads out"):
        items_of(escaping)


@needs_pyarrow
@pytest.mark.parametrize("name", ["list.parquet", "list.arrow"])
def test_a_damaged_table_is_named(tmp_path, name):
    for damage in (lambda data: data[: len(data) // 2], lambda data: b"<!DOCTYPE html>", lambda data: b""):
        table = write_arrow(tmp_path / name, {"target": ["a.png"] * 100, "mask": ["m.png"] * 100})
        table.write_bytes(damage(table.read_bytes()))
        with pytest.raises(InputError, match=rf"{re.escape(str(table))}: "):
            items_of(table)


def test_a_csv_is_a_list(tmp_path):
    table = tmp_path / "list.csv"
    table.write_text('target,mask,text\na.png,m.png,"a cat, asleep"\nb.png,m.png,\n')
    assert find_tables(str(table), "listed") == [str(table)]
    assert [item.caption for item in items_of(table)] == ["a cat, asleep", None]


def test_blanks_behind_the_commas_of_a_csv_are_none_of_a_cells(tmp_path):
    table = tmp_path / "list.csv"
    table.write_text('target, mask, caption\na.png, m.png, "a cat, asleep"\n')
    (item,) = items_of(table)
    assert (item.mask.place, item.caption) == (f"{tmp_path}/m.png", "a cat, asleep")


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_a_csv_with_another_separator_is_refused_once(tmp_path, separator):
    table = tmp_path / "list.csv"
    table.write_text("".join(separator.join((cell, "m.png")) + "\n" for cell in ("target", "a.png", "b.png")))
    with pytest.raises(ProblemsFound, match=r"separated by .* Separate them by commas\.") as caught:
        items_of(table)
    assert len(caught.value.problems) == 1


@needs_pyarrow
def test_parquet_metadata_names_its_pictures_by_file_name(tmp_path):
    columns = {"file_name": ["a.png"], "mask_file_name": ["m.png"], "text": ["a cat"]}
    table = write_arrow(tmp_path / "metadata.parquet", columns)
    assert find_tables(str(tmp_path), "listed") == [str(table)]
    (item,) = items_of(table, below=tmp_path, target="image")
    assert (item.target.place, item.mask.place) == (f"{tmp_path}/a.png", f"{tmp_path}/m.png")
    assert item.caption == "a cat"
