from data.sources.near_names import NearNames

NAMES = sorted(f"{word}_{number}" for word in ("cat", "dog") for number in range(1000, 2000))


def test_a_slip_of_the_keys_is_found_among_many():
    assert NearNames(NAMES).nearest("cat-1007") == "cat_1007"
    assert NearNames(NAMES).nearest("dog_1007x") == "dog_1007"


def test_what_is_like_none_has_none():
    assert NearNames(NAMES).nearest("portrait") is None and NearNames([]).nearest("cat") is None


def test_hints_end():
    names = NearNames(NAMES, hints=1)
    assert names.nearest("cat-1007") and names.nearest("cat-1007") is None
