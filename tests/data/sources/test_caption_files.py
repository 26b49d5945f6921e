import pytest

from configs.errors import InputError
from data.sources.caption_files import note_other_files, note_unused_texts, read_caption_file
from data.sources.folders import list_folders
from data.sources.problems import CAPTIONS, Findings
from tests.data.sources.made_triples import make_files, triples_of


def noted(note, *arguments):
    findings = Findings()
    note(*arguments, findings)
    assert findings.problems == [] and all(problem.kind == CAPTIONS for problem in findings.notes)
    return {problem.where: problem.what for problem in findings.notes}


def test_a_caption_that_is_not_utf8_or_gone_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("grün".encode("latin-1"))
    for name, message in (("a.txt", "not UTF-8 text"), ("b.txt", "cannot be read")):
        with pytest.raises(InputError, match=rf"{name}: {message}"):
            read_caption_file(str(tmp_path / name))


def test_a_file_called_caption_is_one(tmp_path):
    for role in ("target", "mask"):
        make_files(tmp_path / role, "a.png", "b.png")
    (tmp_path / "target" / "a.caption").write_text("a cat")
    (tmp_path / "target" / "b.caption").write_text("not this one")
    (tmp_path / "target" / "b.txt").write_text("a dog")
    assert [triple.caption for triple in triples_of(tmp_path)] == ["a cat", "a dog"]


@pytest.mark.parametrize(
    "path, name, what",
    [
        ("t/cat.png.txt", "cat.png", "is not read as the caption of cat"),
        ("t/CAT.txt", "CAT", "is not read as the caption of cat"),
        ("m/cat.txt", "cat", "is not read, but cat.txt"),
        ("m/portrait_12.txt", "portrait_12", "is not read"),
        ("t/dig.txt", "dig", "belongs to no picture"),
        ("t/portrait-12.txt", "portrait-12", "belongs to no picture; the nearest is portrait_12"),
    ],
)
def test_a_caption_that_belongs_to_no_picture_is_noted(path, name, what):
    names = {"cat", "portrait_12"}
    assert noted(note_unused_texts, {path: name, "t/cat.txt": "cat"}, {"t/cat.txt"}, names) == {path: what}


def test_of_two_captions_of_a_picture_the_one_that_is_read_is_named(tmp_path):
    for role in ("target", "mask"):
        make_files(tmp_path / role, "a.png")
    for name in ("target/a.txt", "target/a.caption", "mask/a.txt", "target/a.tags"):
        (tmp_path / name).write_text("a cat")
    findings = Findings()
    list_folders(tmp_path / "target", tmp_path / "mask", None, "cats", findings)
    assert {note.where.removeprefix(f"{tmp_path}/"): note.what for note in findings.notes} == {
        "target/a.caption": "is not read, but a.txt",
        "mask/a.txt": "is not read, but a.txt",
        "target/a.tags": "is not read as a caption",
    }


def test_json_beside_a_picture_and_lists_are_noted_and_no_other():
    files = {
        "t/cat.json": "cat",
        "t/cat.png.json": "cat.png",
        "t/metadata.jsonl": "metadata",
        "t/settings.json": "settings",
    }
    assert noted(note_other_files, files, {"cat"}) == {
        "t/cat.json": "is not read as a caption",
        "t/cat.png.json": "is not read as a caption",
        "t/metadata.jsonl": "a list of pictures is not read where target is a folder",
    }
