import pytest

from configs.legacy.left_open import mend_head, tell_uncounted, uncounted_weights
from configs.legacy.render import render_config
from tests.configs.legacy.old_files import import_arguments, import_job

HEAD = """\
# Imported from old.toml.
#
# Values that are null below have to be filled in:
# FILL IN data.datasets.0.mask: the folder of the masks,
# white: repaint
# FILL IN data.datasets.1.mask: the folder of the masks
# FILL IN train.steps: pictures x repeats
#
# What the old run really did:
"""
BEFORE = "data: {datasets: [{name: a, mask: null}, {name: b, mask: null}]}\ntrain: {steps: null}\n"


@pytest.mark.parametrize(
    "after, items",
    [
        (BEFORE, ["0.mask", "white", "1.mask", "train.steps"]),
        ("data: {datasets: [{name: a, mask: m}, {name: b, mask: null}]}\ntrain: {steps: null}\n", ["1.mask", "train"]),
        (
            "data: {datasets: [{name: b, mask: null}, {name: new, mask: m}]}\ntrain: {steps: null}\n",
            ["0.mask", "train"],
        ),
        ("data: {datasets: [{name: b, mask: m}]}\ntrain: {steps: null}\n", ["train.steps"]),
        ("data: {datasets: [{name: b, mask: m}]}\ntrain: {steps: 5}\n", []),
    ],
)
def test_the_head_lists_only_what_is_still_null_under_its_number(after, items):
    text = mend_head(HEAD + after, HEAD + BEFORE)
    assert text.endswith(after) and text.startswith("# Imported from old.toml.\n#\n")
    listed = [line for line in text.splitlines() if "FILL IN" in line or "white" in line]
    assert len(listed) == len(items)
    assert all(item in line for item, line in zip(items, listed, strict=True))
    assert ("have to be filled in" in text) == bool(items)
    assert "\n#\n# What the old run really did:\n" in text and "#\n#\n" not in text


def test_a_config_that_was_not_imported_stays_as_it_is():
    assert mend_head(BEFORE, BEFORE) == BEFORE and not uncounted_weights(BEFORE)


def test_weights_that_count_no_pictures_are_found_in_what_the_importers_write(tmp_path):
    sets = "".join(
        f'[[datasets.subsets]]\nimage_dir = "/{name}"\nnum_repeats = {n}\n' for name, n in (("a", 7), ("b", 2))
    )
    scripts = import_arguments(tmp_path / "old.toml", f"max_train_steps = 9\n[[datasets]]\n{sets}")
    job = "datasets:\n" + "".join(
        f"  - {{folder_path: /{name}, num_repeats: {n}}}\n" for name, n in (("a", 7), ("b", 2))
    )
    toolkit = import_job(tmp_path / "old.yaml", job)
    for imported in (scripts, toolkit):
        text = render_config(imported, "old", "new.yaml")
        assert uncounted_weights(text) == {"a": 7, "b": 2}
        assert "weight of a is 7, but must be the number of its pictures x 7" in tell_uncounted(text)[0]
        assert uncounted_weights(text.replace("weight: 7.0", "weight: 210")) == {"b": 2}
