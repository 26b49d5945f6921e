from pathlib import Path

import pytest

from configs.dataset_schema import DatasetConfig
from data.migrate.datasets import RANDOM_MASKS, entries, part_by_kind
from data.migrate.report import MigratedTriple


def triple(name, *, hole_from="mask", keeps_source=False, kept=True):
    return MigratedTriple(
        name=name,
        target="t",
        mask="m",
        masked="s",
        hole_from=hole_from,
        opaque_target=False,
        keeps_source=keeps_source,
        caption=None,
        caption_from="none",
        width=8,
        height=8,
        hole_share=0.5,
        problems=(),
        kept=kept,
    )


@pytest.mark.parametrize(
    "options, keys",
    [
        ({}, {"mask": "/new/mask"}),
        ({"keeps_source": True}, {"mask": "/new/mask", "source": "/new/source"}),
        ({"hole_from": "none"}, {"mask": RANDOM_MASKS}),
    ],
)
def test_triples_of_one_kind_are_one_dataset(options, keys):
    triples = part_by_kind(
        [triple("a", **options), triple("b/c", **options), triple("d", hole_from="alpha", kept=False)]
    )
    assert [each.name for each in triples] == ["a", "b/c", "d"]
    kept = [each for each in triples if each.kept]
    (entry,) = entries(kept, Path("/new"), "migrated")
    assert entry == {"name": "migrated", "target": "/new/target"} | keys
    DatasetConfig(**entry)


def test_triples_with_and_without_source_are_two_datasets_that_are_mixed_by_their_size():
    triples = part_by_kind([triple("a"), triple("b", hole_from="difference"), triple("c", keeps_source=True)])
    assert [each.name for each in triples] == ["with_mask/a", "with_mask/b", "with_source/c"]
    found = entries(triples, Path("/new"), "old")
    assert found == [
        {"name": "old-with_mask", "target": "/new/target/with_mask", "mask": "/new/mask/with_mask", "weight": 2},
        {
            "name": "old-with_source",
            "target": "/new/target/with_source",
            "mask": "/new/mask/with_source",
            "source": "/new/source/with_source",
            "weight": 1,
        },
    ]


def test_folders_of_repeats_are_datasets_with_what_a_pass_sees_of_them_as_weight():
    found = entries([triple("10_cat/a"), triple("10_cat/b"), triple("3_a dog/x")], Path("/new"), "old")
    assert [(entry["name"], entry["target"], entry["weight"]) for entry in found] == [
        ("old-10_cat", "/new/target/10_cat", 20),
        ("old-3_a_dog", "/new/target/3_a dog", 3),
    ]
    (entry,) = entries([triple("10_cat/a"), triple("b")], Path("/new"), "old")
    assert entry["target"] == "/new/target" and "weight" not in entry


def test_folders_that_differ_in_what_a_name_cannot_have_are_datasets_of_their_own():
    found = entries([triple("10_猫/a"), triple("10_狗/b")], Path("/new"), "old")
    assert [(entry["name"], entry["target"]) for entry in found] == [
        ("old-10__", "/new/target/10_狗"),
        ("old-10__-2", "/new/target/10_猫"),
    ]
    assert all(DatasetConfig(**entry) for entry in found)
