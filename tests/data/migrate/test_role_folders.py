import shlex

import pytest

from configs.errors import InputError
from data.migrate.find import find_in_folders
from data.migrate.report import OldFolders
from tests.data.migrate.made_old_pairs import save_triples
from tests.data.migrate.test_find import make_files, triples_of

STEMS = ("a", "b", "sub/c")


def make_roles(parent, *folders):
    for folder in folders:
        make_files(parent / folder, *(f"{stem}.png" for stem in STEMS))


def advised(folders):
    """The options that the message fills in."""
    with pytest.raises(InputError, match="would be learned as targets too") as told:
        find_in_folders(folders)
    return shlex.split(str(told.value).partition("Give each folder: ")[2])


@pytest.mark.parametrize(
    "target, mask, masked",
    [
        ("target", "mask", "masked"),
        ("target_image_dir", "mask_dir", "source_image_dir"),
        ("Images", "Masks", "masked_images"),
        ("2024/gt", "2024/masklabel", "2024/condlabel"),
        ("original", "mask", None),
        ("images", None, "source"),
        (".", "masks", "masked"),
        ("images/target", "images/mask", None),
        ("photos/sofa/images", "photos/sofa/masks", None),
        ("source/2024/target", "source/2024/mask", "source/2024/masked"),
        ("photos", "photos/mask", "photos/masked"),
    ],
)
def test_folders_of_roles_below_the_targets_are_refused_with_the_options(tmp_path, target, mask, masked):
    old = tmp_path / "my old"
    make_roles(old, *filter(None, (target, mask, masked)))
    options = advised(OldFolders(old))
    wanted = {"--target": target, "--mask": mask, "--masked": masked}
    assert options == [text for role, of in wanted.items() if of for text in (role, str(old / of))]
    given = dict(zip(options[::2], options[1::2], strict=True))
    found = find_in_folders(OldFolders(*(given.get(role) and tmp_path / given[role] for role in wanted)))
    assert list(triples_of(found)) == list(STEMS)


def test_ends_of_names_and_what_was_given_are_kept(tmp_path):
    make_files(tmp_path / "old/target", "a_target.png", "b.png")
    make_files(tmp_path / "old/mask", "A_mask.png", "b-masklabel.png", "of_another.png")
    make_files(tmp_path / "masked", "a.png")
    options = advised(OldFolders(tmp_path / "old", None, tmp_path / "masked"))
    places = ("old/target", "old/mask", "masked")
    assert options[1::2] == [str(tmp_path / place) for place in places]


def test_of_several_places_with_folders_of_roles_the_first_is_filled_in(tmp_path):
    make_roles(tmp_path, "first/images", "first/masks", "second/images", "second/masks")
    with pytest.raises(InputError, match=r"\(and what 1 more place.* by itself\): --target .*first/images --mask"):
        find_in_folders(OldFolders(tmp_path))


def test_masks_and_masked_pictures_without_their_targets_leave_the_folder_open(tmp_path):
    make_roles(tmp_path, "elsewhere", "mask", "masked")
    options = advised(OldFolders(tmp_path))
    assert options[:2] == ["--target", "DIR"] and options[3::2] == [str(tmp_path / "mask"), str(tmp_path / "masked")]


@pytest.mark.parametrize(
    "names",
    [
        ("mask/001.png", "mask/002.png", "hats/001.png", "hats/002.png"),  # masks to be worn
        ("images/a.png", "source/b.png", "masks/c.png"),  # not one name in common
        ("target/a.png", "target/b.png", "target/c.png"),
        ("images/001.png", "masks/001.png", "masks/cat.png", "masks/dog.png"),  # one by chance
    ],
)
def test_folders_that_are_only_called_so_are_targets(tmp_path, names):
    make_files(tmp_path, *names)
    assert len(find_in_folders(OldFolders(tmp_path)).triples) == len(names)


def test_one_folder_with_all_by_their_ends_is_read_as_ever(tmp_path):
    (tmp_path / "masks").mkdir()
    save_triples(tmp_path / "masks", 2)
    assert len(find_in_folders(OldFolders(tmp_path)).triples) == 2
