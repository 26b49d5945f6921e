import pytest

from data.migrate.names import Partners, base_of, repeats_of, split_by_ends


@pytest.mark.parametrize(
    "role, name, base",
    [
        ("mask", "a/cat_mask", "a/cat"),
        ("mask", "cat-mask", "cat"),
        ("mask", "cat.mask2", "cat"),
        ("mask", "cat_MASK_01", "cat"),
        ("mask", "cat-masklabel", "cat"),
        ("mask", "cat_M", "cat"),
        ("mask", "cat_m", "cat_m"),
        ("mask", "mask", "mask"),
        ("mask", "unmasked", "unmasked"),
        ("masked", "cat_masked", "cat"),
        ("masked", "cat-condlabel", "cat"),
        ("masked", "cat_F", "cat"),
        ("target", "cat_G", "cat"),
        ("target", "a_mask/cat", "a_mask/cat"),
    ],
)
def test_the_end_of_a_name_says_its_role(role, name, base):
    assert base_of(name, role) == base


def test_one_folder_is_split_by_ends_whose_target_is_there():
    names = {"a", "a_mask", "a_masked", "b_G", "b_M", "b_F", "c_mask"}
    assert split_by_ends(names, ["mask", "masked"]) == {
        "target": {"a", "b_G"},
        "mask": {"a_mask", "b_M", "c_mask"},
        "masked": {"a_masked", "b_F"},
    }
    photographs = {"carnival_mask", "x"}
    assert split_by_ends(photographs, ["mask", "masked"]) == {"target": photographs}


def test_repeats_are_what_a_folder_in_front_says():
    assert [repeats_of(name) for name in ("10_cat/a", "10_cat", "cat/10_a", "0_x/a")] == [10, None, None, None]


def test_the_name_as_it_is_spelled_comes_first():
    assert Partners(["cat_mask", "Cat", "CAT", "cat"], "mask").of("cat") == ["cat", "cat_mask"]
    assert Partners(["CAT-mask"], "mask").of("cat") == ["CAT-mask"]
    assert Partners(["cat_mask_1", "cat_mask_2"], "mask").of("cat") == ["cat_mask_1", "cat_mask_2"]
    assert Partners(["dog"], "mask").of("cat") == []
