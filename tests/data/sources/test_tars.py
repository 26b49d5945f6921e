import json
import re
import unicodedata

import pytest

from configs.dataset_schema import DatasetConfig
from configs.errors import InputError
from data.sources.problems import CAPTIONS, Findings
from data.sources.tars import expand_tars, list_tar, tar_name
from tests.data.sources.made_scans import write_tar
from tests.payloads import canary_pickle


@pytest.fixture
def items_of(tmp_path):
    """Lists a tar of these members: `items_of(members, masks=True, **members_config)`."""

    def make(members, *, masks=True, **config):
        path = tmp_path / "photos-0.tar"
        write_tar(path, members)
        dataset = DatasetConfig.model_validate({"name": "web", "tars": str(path), "members": config})
        findings = Findings()
        items = list_tar(str(path), path, dataset, findings, masks=masks)
        findings.raise_problems()
        return items

    return make


def read(file):
    return file.read(1 << 20).data


def test_members_of_one_key_make_an_item(items_of):
    members = {
        "a/cat.target.png": b"cat",
        "a/cat.mask.png": b"cat's mask",
        "a/cat.txt": "a cat, 猫".encode(),
        "dog.jpg": b"dog",
        "dog.json": json.dumps({"caption": "a dog", "width": 3}).encode(),
        "dog.MASK.PNG": b"dog's mask",
        "bare.webp": b"bare",
        "bare.mask.png": b"bare's mask",
    }
    items = items_of(members)
    assert [(item.name, item.caption) for item in items] == [
        ("photos-0/a/cat", "a cat, 猫"),
        ("photos-0/dog", "a dog"),
        ("photos-0/bare", None),
    ]
    assert [read(item.target) for item in items] == [b"cat", b"dog", b"bare"]
    assert [read(item.mask) for item in items] == [b"cat's mask", b"dog's mask", b"bare's mask"]
    assert [item.target.suffix for item in items] == [".png", ".jpg", ".webp"]
    assert all(item.source is None for item in items)


def test_what_members_are_called_is_the_configs_choice(items_of):
    members = {"1.after.png": b"after", "1.before.png": b"before", "1.hole.png": b"hole", "1.prompt.txt": b"text"}
    (item,) = items_of(
        members, target="after.png", source=["before.jpg", "before.png"], mask="hole.png", caption="prompt.txt"
    )
    assert (read(item.target), read(item.source), read(item.mask)) == (b"after", b"before", b"hole")
    assert item.caption == "text"


def test_random_masks_need_no_members(items_of):
    (item,) = items_of({"1.jpg": b"one", "1.mask.png": b"not looked at"}, masks=False)
    assert item.mask is None


def test_what_is_no_samples_is_passed_over(items_of):
    (item,) = items_of(
        {"__meta__.json": b"{}", ".hidden.png": b"", "a/._x.png": b"", "README": b"", "1.png": b"1"}, masks=False
    )
    assert item.name == "photos-0/1"


@pytest.mark.fault(27, "pickles beside the pictures of a tar, which WebDataset's decoder runs")
def test_members_that_are_programs_are_not_read(items_of, tmp_path):
    canary = tmp_path / "canary"
    suffixes = ("pkl", "pickle", "pyd", "pth", "cls", "json.pkl", "py")
    payload = canary_pickle(canary)
    members = {f"1.{suffix}": payload for suffix in suffixes}
    (item,) = items_of({"1.jpg": b"1", "1.mask.png": b"2", "1.txt": b"a cat", **members})
    assert (item.caption, read(item.target), read(item.mask)) == ("a cat", b"1", b"2")
    assert not canary.exists()


@pytest.mark.parametrize(
    "members, config, message",
    [
        (
            {"1.jpg": b"", "1.mask.png": b"", "2.jpg": b"", "3.mask.png": b""},
            {},
            [
                r"photos-0\.tar: sample 2 has no mask \(mask\.png, .*\), but jpg\. Add it, or correct .*mask\.",
                r"photos-0\.tar: sample 3 has no target \(target\.png, .*, jpg, .*\), but mask\.png\. Add it",
            ],
        ),
        ({"1.jpg": b"", "1.mask.png": b""}, {"source": "before.png"}, [r"sample 1 has no source \(before\.png\), but"]),
        (
            {"1.jpg": b"", "1.JPG": b"", "1.mask.png": b""},
            {},
            [r"photos-0\.tar: 1\.jpg is there twice\. Write the tar"],
        ),
        ({"1.jpg": b"", "1.mask.png": b"", "1.txt": b"gr\xfcn"}, {}, [r"photos-0\.tar: 1\.txt: not UTF-8 text"]),
        ({"1.jpg": b"", "1.mask.png": b"", "1.json": b"[1]"}, {}, [r"photos-0\.tar: 1\.json: no JSON object"]),
        ({"1.jpg": b"", "1.mask.png": b"", "1.json": b'{"caption": 3}'}, {}, [r"1\.json: its caption is no text"]),
        (
            {"1.jpg": b"", "1.mask.png": b"", "1.json": b'{"caption": "a \\ud83d"}'},
            {},
            [r"photos-0\.tar: 1\.json: its caption holds half a character"],
        ),
        ({"1.jpg": b"", "1.mask.png": b"", "1.json": b"[" * 100_000}, {}, [r"1\.json: no JSON object \(.*recursion"]),
        ({"README": b"x"}, {}, [r"photos-0\.tar: holds no sample\. Remove it from data\.datasets\.\*\.tars"]),
    ],
)
def test_samples_that_lack_something_are_named(items_of, members, config, message):
    with pytest.raises(InputError) as caught:
        items_of(members, **config)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(message)
    for line, pattern in zip(lines, message, strict=True):
        assert re.search(pattern, line)


def test_a_caption_of_a_gigabyte_is_not_read(items_of):
    with pytest.raises(InputError, match=r"photos-0\.tar: 1\.txt: 2097152 bytes are no caption, .* 1 MiB\. Shorten or"):
        items_of({"1.jpg": b"", "1.mask.png": b"", "1.txt": bytes(2 << 20)})


def test_braces_and_lists_name_many_tars():
    found = expand_tars(["s3://bucket/a/photos-{00..02}.tar", "more/x{1,2}.tar"], "web")
    assert found == [*(f"s3://bucket/a/photos-0{number}.tar" for number in range(3)), "more/x1.tar", "more/x2.tar"]


@pytest.mark.parametrize(
    "patterns, message",
    [
        (["a-{0..1.tar"], r"dataset web: tars a-\{0\.\.1\.tar: Unbalanced braces"),
        (["s3://b/a-{0..1.tar?token=secret"], r"dataset web: tars s3://b/a-\{0\.\.1\.tar: Unbalanced braces"),
        (["a/0.tar", "b/0.tar"], r"dataset web: a/0\.tar and b/0\.tar have the same name"),
        (["0.tar", "0.tar"], r"dataset web: 0\.tar and 0\.tar have the same name"),
        (["{pipe:cat ,https://a/}0.tar"], r"dataset web: tar is pipe:cat 0\.tar, but only https://, s3://, gs:// are"),
        (["file:///etc/0.tar"], r"dataset web: tar is file:///etc/0\.tar, but only https://, s3://, gs:// are read"),
    ],
)
def test_tars_that_may_not_be_read_are_refused(patterns, message):
    with pytest.raises(InputError, match=message):
        expand_tars(patterns, "web")


def test_a_tar_is_called_by_its_file_alone():
    assert tar_name("https://host/path/photos-01.tar?token=secret/x.y") == "photos-01"
    assert tar_name("/a/b.c/photos.train.tar") == "photos"


def test_a_pattern_or_a_folder_names_the_tars_that_are_there(tmp_path):
    for name in ("a-0.tar", "a-1.tar", "b.tar", "a-0.json"):
        (tmp_path / name).touch()
    names = [f"{tmp_path}/{name}" for name in ("a-0.tar", "a-1.tar", "b.tar")]
    assert expand_tars([f"{tmp_path}/*.tar"], "web") == names == expand_tars([str(tmp_path)], "web")
    assert expand_tars([f"{tmp_path}/{{a-?,b}}.tar"], "web") == names
    for nothing in (f"{tmp_path}/c-*.tar", str(tmp_path / "empty")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=r"dataset web: tars \S+: no \.tar is there"):
            expand_tars([nothing], "web")
    with pytest.raises(InputError, match=r"a server is not asked which files it has\. Write their numbers in braces"):
        expand_tars(["s3://bucket/a-*.tar"], "web")


def test_each_of_several_masks_makes_a_sample(items_of):
    members = {"1.jpg": b"one", "1.mask0.png": b"m0", "1.mask_01.png": b"m1", "1.txt": b"a cat", "2.jpg": b"two"}
    items = items_of(members | {"2.mask.png": b"m", "2.mask1.png": b"m1"})
    assert {item.name: (read(item.target), read(item.mask), item.caption) for item in items} == {
        "photos-0/1.mask0": (b"one", b"m0", "a cat"),
        "photos-0/1.mask_01": (b"one", b"m1", "a cat"),
        "photos-0/2": (b"two", b"m", None),
        "photos-0/2.mask1": (b"two", b"m1", None),
    }


@pytest.mark.parametrize(
    "members, caption",
    [
        ({"1.caption": b"a cat"}, "a cat"),
        ({"1.json": b'{"text": "a cat"}'}, "a cat"),
        ({"1.json": b'{"caption": null, "text": "a cat"}'}, "a cat"),
        ({"1.json": b'{"caption": "a cat", "text": "a poem"}'}, "a cat"),
        ({"1.txt": b" \n", "1.json": b'{"caption": "a cat"}'}, "a cat"),
        ({"1.json": b'{"text": 3}'}, None),
    ],
)
def test_a_caption_is_where_it_cannot_be_anything_else(items_of, members, caption):
    (item,) = items_of({"1.jpg": b"", "1.mask.png": b""} | members)
    assert item.caption == caption


def test_members_that_may_hold_captions_are_noted(tmp_path):
    path, findings = tmp_path / "photos-0.tar", Findings()
    write_tar(
        path, {"1.jpg": b"", "1.mask.png": b"", "1.prompt": b"a cat", "__MACOSX/1.jpg": b"", "__MACOSX/2.png": b""}
    )
    dataset = DatasetConfig.model_validate({"name": "web", "tars": str(path)})
    assert len(list_tar(str(path), path, dataset, findings, masks=True)) == 1 and findings.problems == []
    (note,) = findings.notes
    assert note.kind == CAPTIONS and note.what == "samples without a caption (txt, caption, json) have prompt"


@pytest.mark.parametrize("form, other", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_both_of_unicodes_forms_are_one(items_of, form, other):
    name = unicodedata.normalize(form, "größe/é")
    (item,) = items_of({f"{name}.jpg": b"", f"{unicodedata.normalize(other, name)}.mask.png": b"mask"})
    assert item.name == f"photos-0/{name}" and read(item.mask) == b"mask"
