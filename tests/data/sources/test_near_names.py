from data.sources.near_names import NearNames

NAMES = sorted(f"{word}_{number}" for word in ("cat", "dog") for number in range(1000, 2000))


def test_a_slip_of_the_keys_is_found_among_many():
    assert NearNames(NAMES).nearest("cat-1007") == "cat_1007"
    assert NearNames(NAMES).nearest("dog_1007x") == "dog_1007"


def test_case_and_marks_make_no_other_name():
    assert NearNames(["A", *NAMES]).nearest("a") == "A"
    assert NearNames(NAMES).nearest("CAT 1007") == "cat_1007"
    assert NearNames(["-"]).nearest("_") is None, "nothing is left to compare"


def test_another_number_is_another_picture():
    names = NearNames(["photo_0001", "photo_0003"])
    assert names.nearest("photo_0002") is None and names.nearest("photo_01") == "photo_0001"


def test_numbers_may_have_zeros_ahead_and_names_go_on():
    names = NearNames(["1", "2", "12", "cat_seg", "cathedral"])
    assert (names.nearest("001"), names.nearest("0012"), names.nearest("010")) == ("1", "12", None)
    assert (names.nearest("cat"), names.nearest("cat_seg_v2")) == ("cat_seg", "cat_seg")


def test_what_is_like_none_has_none():
    assert NearNames(NAMES).nearest("portrait") is None and NearNames([]).nearest("cat") is None


def test_hints_end():
    names = NearNames(NAMES, hints=1)
    assert names.nearest("cat-1007") and names.nearest("cat-1007") is None
