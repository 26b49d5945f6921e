import pytest

from configs.errors import InputError
from data.sources.folders import list_folders
from data.sources.problems import Findings
from data.sources.tables import find_tables
from data.sources.walk import walk_folder


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def names_below(folder):
    return [
        f"{parent}/{name}".removeprefix(f"{folder}/") for parent, names in walk_folder(folder, "x") for name in names
    ]


def test_all_that_is_not_hidden_is_found_in_order(tmp_path):
    write(tmp_path, "b", "a", ".c", "d/e", "d/.f/g", ".h/i", "d/j/k")
    assert names_below(tmp_path) == ["a", "b", "d/e", "d/j/k"]


def test_links_to_folders_are_followed(tmp_path):
    """As where a part of a set lies on another disk; twice the same folder is no loop."""
    write(tmp_path, "here/a", "there/b", "there/c/d")
    (tmp_path / "here" / "one").symlink_to(tmp_path / "there")
    (tmp_path / "here" / "two").symlink_to("../there/c")
    assert names_below(tmp_path / "here") == ["a", "one/b", "one/c/d", "two/d"]


@pytest.mark.parametrize("target", [".", "..", "../..", "../../there"])
def test_a_link_without_end_is_refused(tmp_path, target):
    write(tmp_path, "here/a/x", "there/x")
    (tmp_path / "here" / "a" / "loop").symlink_to(target)
    (tmp_path / "there" / "back").symlink_to("../here/a")
    with pytest.raises(InputError, match=r"^here: .* leads back to a folder above it, by a link\. Remove"):
        list(walk_folder(tmp_path / "here", "here"))


def test_pictures_and_tables_behind_links_are_found(tmp_path):
    write(tmp_path, "disk/a.png", "disk/metadata.jsonl")
    for role in ("target", "mask"):
        (tmp_path / role).mkdir()
        (tmp_path / role / "more").symlink_to(tmp_path / "disk")
    (item,) = list_folders(tmp_path / "target", tmp_path / "mask", None, "photos", Findings())
    assert item.name == "more/a"
    assert find_tables(str(tmp_path / "target"), "photos") == [f"{tmp_path}/target/more/metadata.jsonl"]
