import pytest

from launch.replaced_datasets import take_over

NEW = [{"name": "m", "target": "x", "mask": "mx"}, {"name": "s", "target": "y", "mask": "my"}]
REST = "    - {name: rest, target: r, mask: rm}\n"
COUNT = "# the share in the mix: pictures x repeats. Put the number of pictures x 4 here"


def config(*entries: str, rest: str = REST) -> str:
    return "data:\n  datasets:\n" + rest + "".join(f"    - {entry}\n" for entry in entries)


def weights(entries):
    return [entry.get("weight") for entry in entries]


def test_one_keeps_all_that_does_not_say_where_its_pictures_are():
    old = "{weight: 3, flip: true, name: old, target: t, mask: {folder: f, label: 1, dilate: [0, 8], variants: 2}}"
    entries, notes = take_over(NEW[:1], [9], config(old), ["old"])
    mask = {"folder": "mx", "dilate": [0, 8], "variants": 2}
    assert entries == [{"name": "m", "target": "x", "mask": mask, "flip": True, "weight": 3}]
    assert list(entries[0])[:3] == ["name", "target", "mask"] and not notes


@pytest.mark.parametrize(
    "old, rest, expected",
    [
        ("{name: old, target: t, flip: true, weight: 3}", REST, [2.0, 1.0]),
        ("{name: old, target: t, flip: true}", REST, [0.666667, 0.333333]),
        ("{name: old, target: t, flip: true}", "", [None, None]),
        (f"name: old\n      target: t\n      flip: true\n      weight: 4.0 {COUNT}", REST, [24.0, 12.0]),
        (f"name: old\n      target: t\n      flip: true\n      {COUNT}\n      weight: 4.0", REST, [24.0, 12.0]),
        (f"name: old\n      target: t\n      flip: true\n      weight: 36 {COUNT}", REST, [24.0, 12.0]),
    ],
)
def test_several_share_the_weight_by_their_pictures_and_all_are_flipped(old, rest, expected):
    entries, _ = take_over(NEW, [6, 3], config(old, rest=rest), ["old"])
    assert weights(entries) == expected
    assert [entry["flip"] for entry in entries] == [True, True]


def test_what_several_old_ones_do_not_agree_on_is_told():
    old = ["{name: a, target: t, flip: true, check_masks: warn}", "{name: b, target: u, check_masks: warn, weight: 4}"]
    entries, notes = take_over(NEW[:1], [9], config(*old), ["a", "b"])
    assert entries == [{**NEW[0], "check_masks": "warn", "weight": 5.0}]
    assert notes == [
        "flip: not taken over, as a, b differ in it. Give it to the new datasets by hand.",
        "m: weight 5, of the 5 of a, b",
    ]


def test_the_same_migration_again_changes_no_weight():
    again = [{**entry, "weight": count} for entry, count in zip(NEW, [6, 3], strict=True)]
    text = config(*(f"{{name: {name}, target: t, weight: {weight}}}" for name, weight in (("m", 6), ("s", 3))))
    entries, notes = take_over(again, [6, 3], text, ["m", "s"])
    assert weights(entries) == [6, 3] and not notes


def test_a_weight_that_is_yet_to_be_filled_in_is_the_default():
    entries, _ = take_over(NEW, [6, 3], config("{name: old, target: t, weight: null}"), ["old"])
    assert weights(entries) == [0.666667, 0.333333]


def test_weights_that_were_rounded_are_not_split_anew():
    counts = [18, 3]
    first, _ = take_over(NEW, counts, config("{name: old, target: t, weight: 5}"), ["old"])
    text = config(*(f"{{name: {entry['name']}, target: t, weight: {entry['weight']}}}" for entry in first))
    second, notes = take_over(NEW, counts, text, ["m", "s"])
    assert weights(second) == weights(first) == [4.28571, 0.714286] and not notes


def test_nothing_is_taken_over_where_nothing_is_replaced():
    assert take_over(NEW, [6, 3], config("{name: old, target: t}"), []) == (NEW, [])
