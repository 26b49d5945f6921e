import io
import json
import sys
import unicodedata
from pathlib import Path

import pytest

from configs.errors import InputError
from data.sources.problems import CAPTIONS, Findings
from data.sources.tables import find_tables, list_table, names_are_below
from tests.data.sources.made_tables import dataset, items_of


def write_jsonl(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows))
    return path


def test_rows_of_a_list_make_items(tmp_path):
    rows = [
        {"target": "a/cat.jpg", "mask": "masks/cat.png", "caption": "a cat, 猫"},
        {"target": "./b.png", "mask": "https://host/x/b.png?token=s", "caption": None},
        {"target": "https://host/a/dog.jpg?token=secret", "mask": "m.png", "other": [1]},
    ]
    items = items_of(write_jsonl(tmp_path / "list.jsonl", rows[0], "", *rows[1:], "  "))
    assert [(item.name, item.caption) for item in items] == [("a/cat", "a cat, 猫"), ("b", None), ("host/a/dog", None)]
    assert [item.target.place for item in items] == [
        f"{tmp_path}/a/cat.jpg",
        f"{tmp_path}/b.png",
        "https://host/a/dog.jpg?token=secret",
    ]
    assert items[1].mask.place == "https://host/x/b.png?token=s"
    assert all(item.source is None for item in items)


def test_columns_are_called_as_the_config_says(tmp_path):
    table = write_jsonl(
        tmp_path / "list.jsonl", {"after": "x.jpg", "before": "y.jpg", "hole": "m.png", "text": "t", "id": 7}
    )
    (item,) = items_of(table, target="after", source="before", mask="hole", caption="text", name="id")
    assert item.name == "7" and item.caption == "t"
    assert [file.place.rpartition("/")[2] for file in item.pictures] == ["x.jpg", "m.png", "y.jpg"]


def test_paths_of_a_list_on_a_server_are_relative_to_it(tmp_path):
    file = write_jsonl(tmp_path / "copy", {"target": "a/cat.jpg", "mask": "m.png"})
    url = "https://host/data/list.jsonl?token=secret"
    below = names_are_below(url, url)
    (item,) = list_table(url, file, below, dataset(url), Findings(), masks=True, pack=tmp_path, packed=io.BytesIO())
    assert item.name == "a/cat"
    assert item.target.place == "https://host/data/a/cat.jpg"


@pytest.mark.parametrize(
    "path",
    ["../x.png", "a/../../x.png", "/etc/passwd", "a\0.png", "C:\\x.png", "..\\x.png", "\\x.png"],
)
@pytest.mark.parametrize("role", ["target", "mask"])
def test_a_path_that_leads_out_of_the_lists_folder_is_refused(tmp_path, path, role):
    table = write_jsonl(tmp_path / "list.jsonl", json.dumps({"target": "a.png", "mask": "m.png"} | {role: path}))
    with pytest.raises(InputError, match=rf"list\.jsonl, line 1: {role} is .*, which leads out of the table's folder"):
        items_of(table)


@pytest.mark.parametrize(
    "url", ["pipe:cat /etc/passwd", "file:///etc/passwd", "http://host/a.png", "simplecache::s3://a/b.png", "ftp://a/b"]
)
def test_a_scheme_that_is_not_allowed_is_refused(tmp_path, url):
    table = write_jsonl(tmp_path / "list.jsonl", {"target": "fine.png", "mask": url})
    with pytest.raises(InputError, match=r"list\.jsonl, line 1: mask is .*, but only https://, s3://, gs:// are read"):
        items_of(table)


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", r"list\.jsonl, line 2: no JSON \("),
        ("[]", r"list\.jsonl, line 2: no JSON object\. Write"),
        ({"target": "x.png"}, r"list\.jsonl, line 2: no mask, but target\. Add it, or correct .*columns\.mask\."),
        ({}, r"list\.jsonl, line 2: no target, but nothing\. Add it"),
        ({"target": "", "mask": "m"}, r"list\.jsonl, line 2: target is '': no path, URL or picture"),
        ({"target": 3, "mask": "m"}, r"list\.jsonl, line 2: target is 3: no path, URL or picture"),
        ({"target": "x", "mask": "m", "caption": 3}, r"list\.jsonl, line 2: caption is 3, no text"),
        ('{"target": "x", "mask": "m", "caption": "a \\ud83d"}', r"list\.jsonl, line 2: holds half a character"),
        ('{"target": "x\\udce9.png", "mask": "m"}', r"list\.jsonl, line 2: holds half a character"),
        ('{"target": "x", "mask": "m", "other": {"\\ud83d": 1}}', r"list\.jsonl, line 2: holds half a character"),
        ("[" * 100_000, r"list\.jsonl, line 2: no JSON \(.*recursion"),
        ({"target": ".", "mask": "m"}, r"list\.jsonl, line 2: target is '\.', the table's folder, no picture"),
        ({"target": "x", "mask": "./"}, r"list\.jsonl, line 2: mask is '\./', the table's folder, no picture"),
    ],
)
def test_a_row_at_fault_is_named(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        items_of(write_jsonl(tmp_path / "list.jsonl", {"target": "a.png", "mask": "m.png"}, row))


def test_a_whole_character_in_two_halves_is_one(tmp_path):
    (item,) = items_of(write_jsonl(tmp_path / "list.jsonl", '{"target":"a","mask":"m","caption":"\\ud83d\\ude00"}'))
    assert item.caption == "\U0001f600"


def test_a_url_that_names_no_picture_is_refused(tmp_path):
    url = "https://host/data/list.jsonl"
    file = write_jsonl(tmp_path / "copy", {"target": "https://host/data/", "mask": "m.png"})
    findings = Findings()
    below = names_are_below(url, url)
    list_table(url, file, below, dataset(url), findings, masks=True, pack=file, packed=io.BytesIO())
    with pytest.raises(InputError, match=r"list\.jsonl, line 1: https://host/data/ names a folder, no picture"):
        findings.raise_problems()


def test_all_rows_at_fault_are_named_at_once(tmp_path):
    table = write_jsonl(tmp_path / "list.jsonl", {"target": "a"}, {"target": "b", "mask": "m"}, {"mask": "m"})
    with pytest.raises(InputError) as caught:
        items_of(table)
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        f"{table}, line 1",
        f"{table}, line 3",
    ]


def test_a_caption_column_that_nobody_has_is_refused(tmp_path):
    table = write_jsonl(tmp_path / "list.jsonl", {"target": "a", "mask": "m", "text": "x"})
    assert items_of(table)[0].caption == "x"
    with pytest.raises(InputError, match=r"no row has the column captoin, but mask, target, text\. Correct"):
        items_of(table, caption="captoin")


def test_an_empty_list_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"list\.jsonl: holds no row"):
        items_of(write_jsonl(tmp_path / "list.jsonl", "", ""))


def test_a_list_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "list.jsonl").write_bytes(b'{"target": "gr\xfcn.png"}')
    with pytest.raises(InputError, match=r"list\.jsonl: not UTF-8 text"):
        items_of(tmp_path / "list.jsonl")


def test_an_imagefolder_names_its_pictures_in_metadata(tmp_path):
    write_jsonl(
        tmp_path / "hub" / "train" / "metadata.jsonl", {"file_name": "a.png", "mask_file_name": "m/a.png", "text": "A"}
    )
    write_jsonl(tmp_path / "hub" / "test" / "metadata.jsonl", {"image_file_name": "a.png", "mask_file_name": "m/a.png"})
    (tmp_path / "hub" / "more").mkdir()
    (tmp_path / "hub" / "more" / "metadata.csv").write_text('file_name,mask_file_name,text\nb.png,m/b.png,"B, b"\n')
    write_jsonl(tmp_path / "hub" / ".cache" / "metadata.jsonl", "not looked at")
    tables = find_tables(str(tmp_path / "hub"), "listed")
    found = {}
    for table in tables:
        for item in items_of(tmp_path / table, below=tmp_path / "hub", target="image"):
            found[item.name] = (item.target.place, item.mask.place)
    assert found == {
        name: (f"{tmp_path}/hub/{name}.png", f"{tmp_path}/hub/{name.replace('/', '/m/')}.png")
        for name in ("train/a", "test/a", "more/b")
    }
    (item,) = items_of(
        tmp_path / "hub" / "more" / "metadata.csv", below=tmp_path / "hub", target="image", caption="text"
    )
    assert item.caption == "B, b"


@pytest.mark.parametrize("place", ["{}/hub", "{}/hub/", "{}//hub", "hub", "./hub", "hub/.", "../{0.name}/hub"])
def test_names_do_not_hang_on_how_a_folder_is_written(tmp_path, monkeypatch, place):
    """They make the samples' keys, by which shards are dealt and masks are drawn."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "hub" / "train" / "metadata.jsonl", {"file_name": "a.png", "mask_file_name": "m.png"})
    place = place.format(tmp_path)
    (table,) = find_tables(place, "listed")
    (item,) = items_of(Path(table), below=place, target="image")
    assert item.name == "train/a"


@pytest.mark.parametrize(
    "place, message",
    [
        ("nothing", r"dataset listed: table .*nothing does not exist"),
        ("empty", r"dataset listed: table .*empty is a folder without metadata\.jsonl \(or \.csv\), \.parquet or"),
        ("list.txt", r"dataset listed: table .*list\.txt is no \.jsonl, \.csv, \.parquet or \.arrow file"),
        (
            "https://host/list.txt",
            r"dataset listed: table https://host/list\.txt is no \.jsonl, \.csv, \.parquet or",
        ),
    ],
)
def test_a_place_without_tables_is_named(tmp_path, monkeypatch, place, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("")
    with pytest.raises(InputError, match=message):
        find_tables(place, "listed")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_the_extra_that_is_missing_is_named(tmp_path, monkeypatch, suffix):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / f"list{suffix}").write_bytes(b"PAR1")
    with pytest.raises(
        InputError, match=r"need pyarrow .* Run `pip install 'fluxfill\[parquet\]'`, or write the list as"
    ):
        items_of(tmp_path / f"list{suffix}")


@pytest.mark.parametrize(
    "written", ["{folder}/deep/a.png", "deep\\a.png", ".\\deep\\a.png", "deep//a.png", "b/../deep/a.png"]
)
def test_a_path_within_the_lists_folder_may_be_written_in_other_ways(tmp_path, written):
    path = written.format(folder=tmp_path)
    (item,) = items_of(write_jsonl(tmp_path / "list.jsonl", {"target": path, "mask": "m.png"}))
    assert item.target.place == f"{tmp_path}/deep/a.png" and item.name == "deep/a"


def test_a_file_whose_name_holds_a_backslash_is_found(tmp_path):
    (tmp_path / "a\\b.png").write_bytes(b"")
    (item,) = items_of(write_jsonl(tmp_path / "list.jsonl", {"target": "a\\b.png", "mask": "m.png"}))
    assert item.target.place == f"{tmp_path}/a\\b.png"


@pytest.mark.parametrize(
    "columns, row, caption",
    [
        ({}, {"text": "a cat"}, "a cat"),
        ({}, {"caption": "a cat", "text": "a poem"}, "a cat"),
        ({}, {"caption": None, "text": "a cat"}, "a cat"),
        ({}, {"caption": " ", "text": "a cat"}, "a cat"),
        ({"caption": "caption"}, {"caption": None, "text": "a poem"}, None),
        ({}, {"prompt": "a cat"}, None),
    ],
)
def test_text_is_the_caption_where_nothing_else_is_named(tmp_path, columns, row, caption):
    table = write_jsonl(tmp_path / "list.jsonl", {"target": "a.png", "mask": "m.png"} | row)
    (item,) = items_of(table, **columns)
    assert item.caption == caption


def test_columns_that_may_be_captions_are_noted(tmp_path):
    table = write_jsonl(tmp_path / "list.jsonl", {"target": "a.png", "mask": "m.png", "prompt": "a cat"})
    findings = Findings()
    list_table(str(table), table, str(tmp_path), dataset(table), findings, masks=True, pack="pack", packed=io.BytesIO())
    (note,) = findings.notes
    assert (note.kind, note.what) == (CAPTIONS, "no row has the column caption or text, but prompt")


def test_a_list_without_a_column_that_may_be_captions_is_not_noted(tmp_path):
    table = write_jsonl(tmp_path / "list.jsonl", {"target": "a.png", "mask": "m.png"})
    findings = Findings()
    list_table(str(table), table, str(tmp_path), dataset(table), findings, masks=True, pack="pack", packed=io.BytesIO())
    assert findings.notes == []


@pytest.mark.parametrize("form, other", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_path_in_the_other_of_unicodes_forms_is_found(tmp_path, form, other):
    name = unicodedata.normalize(form, "é.png")
    (tmp_path / name).touch()
    (item,) = items_of(
        write_jsonl(tmp_path / "list.jsonl", {"target": unicodedata.normalize(other, name), "mask": "m"})
    )
    assert item.target.place == f"{tmp_path}/{name}"
