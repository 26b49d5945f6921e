import pytest

from configs.errors import InputError
from configs.legacy.draft import Draft, known_keys, ordered, show


def verdicts(draft, known=()):
    return {line.key: line.verdict for line in draft.finish(known).lines}


def test_numbers_may_be_one_or_several_and_written_as_text():
    draft = Draft({"one": "512", "several": [512, "768"], "wrong": [512, "large"]}, "it")
    assert draft.numbers("one", 0) == [512] and draft.numbers("several", 0) == [512, 768]
    assert draft.numbers("none", 1024) == [1024]
    with pytest.raises(InputError, match="wrong is large, but must be a number"):
        draft.numbers("wrong", 0)


def test_every_key_has_one_line_in_the_files_order_whatever_was_asked_of_it():
    draft = Draft({"a": 1, "b": {"c": [2, 3], "d": [{"e": None}, {"f": {}}]}}, "it")
    assert list(draft.leaves) == ["a", "b.c", "b.d[0].e", "b.d[1].f"]
    draft.put("b.c", "data.resolution", [2, 3])
    draft.drop("b.d[0].e", "not here")
    assert verdicts(draft) == {"a": "unknown key", "b.c": "taken", "b.d[0].e": "taken", "b.d[1].f": "unknown key"}


def test_a_value_is_taken_where_it_stays_and_converted_where_it_changes():
    draft = Draft({"lr": "1e-4", "decay": 1, "on": "yes", "norm": 0, "seed": 7}, "it")
    draft.put("lr", "train.lr", draft.number("lr", 0))
    draft.put("decay", "train.weight_decay", 1.0)
    draft.put("on", "train.compile", draft.flag("on"))
    draft.put("norm", "train.max_grad_norm", None)
    draft.put("seed", "run.seed", 7, "its word")
    draft.put("none", "train.steps", 10, "counted in updates")
    assert draft.config["train"] == {
        "lr": 1e-4,
        "weight_decay": 1.0,
        "compile": True,
        "max_grad_norm": None,
        "steps": 10,
    }
    assert draft.notes["train.steps"] == "the old trainer's default: counted in updates"
    assert draft.notes["train.lr"] == "lr 1e-4: a number"
    assert verdicts(draft) == {
        "lr": "converted",
        "decay": "taken",
        "on": "converted",
        "norm": "converted",
        "seed": "converted",
    }


def test_a_secret_is_as_if_it_was_not_there():
    draft = Draft({"token": "hf_abcdefghijKLMN", "lr": 1}, "it")
    draft.put("token", "run.name", draft.get("token", "try"))
    draft.answer("token", "taken", "x")
    imported = draft.finish(())
    assert imported.config["run"] == {"name": "try"}
    assert "hf_abc" not in str(imported)
    assert verdicts(draft)["token"] == "secret, dropped"


def test_what_is_switched_off_lacks_no_equivalent():
    draft = Draft({"a": 0.0, "b": False, "c": None, "d": 0.1, "x": {"e": True}}, "it")
    draft.drop_known(known_keys({"not here": "a b c d"}))
    draft.drop_known({"*": "nor that"}, "x.")
    assert verdicts(draft) == dict.fromkeys("abc", "taken") | dict.fromkeys(("d", "x.e"), "no equivalent")


def test_what_is_always_done_here_is_no_off_where_it_was_switched_off():
    draft = Draft({"a": True, "b": False, "c": "false", "d": 0, "e": "false", "f": None}, "it")
    draft.drop_known(known_keys({"done here": "a b c d e f"}), always=("a", "b", "c", "d", "f"))
    lines = {line.key: (line.verdict, line.new) for line in draft.finish(()).lines}
    assert lines == {
        **dict.fromkeys("af", ("taken", "always")),
        **dict.fromkeys("bcd", ("no equivalent", "")),
        "e": ("taken", "off"),
    }


def test_a_key_is_called_what_the_users_file_calls_it():
    draft = Draft({"steps": 2.5, "lr": 1}, "it", spelled={"steps": "epoch", "lr": "rate"})
    with pytest.raises(InputError, match=r"^epoch is 2\.5, but must be an integer"):
        draft.integer("steps", 1)
    draft.put("lr", "train.lr", 1)
    imported = draft.finish(())
    assert imported.notes["train.lr"] == "rate" and [line.key for line in imported.lines] == ["epoch", "rate"]


def test_an_unknown_key_is_compared_with_the_known_ones():
    draft = Draft({"train.lr_shceduler": 1, "train.none": 1}, "it")
    typo, other = draft.finish(("lr_scheduler", "noise_*")).lines
    assert "Was lr_scheduler meant?" in typo.why and "meant" not in other.why


@pytest.mark.parametrize("read", [Draft.number, Draft.integer])
def test_a_text_where_a_number_must_be_is_named(read):
    with pytest.raises(InputError, match=r"train\.steps is many, but must be a .*number"):
        read(Draft({"train": {"steps": "many"}}, "it"), "train.steps", 1)
    with pytest.raises(InputError, match="integer"):
        Draft({"steps": 1.5}, "it").integer("steps", 1)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "-inf", 10**400])
def test_a_number_that_is_not_finite_is_none(value):
    with pytest.raises(InputError, match="must be a number"):
        Draft({"lr": value}, "it").number("lr", 1)


def test_what_the_old_config_does_not_say_is_asked_for():
    draft = Draft({}, "it")
    draft.ask("data.datasets.0.mask", "the folder")
    imported = draft.finish(())
    assert imported.config == {"data": {"datasets": [{"mask": None}]}}
    assert imported.fill_in == {"data.datasets.0.mask": "the folder"}


def test_a_file_of_too_many_keys_is_refused():
    with pytest.raises(InputError, match="more than 5000 keys"):
        Draft({str(number): 1 for number in range(5001)}, "it")


def test_values_are_shown_on_one_line():
    assert show("a\n  b\x07") == "a b?"
    assert show([1, "ä"]) == '[1, "ä"]'
    assert len(show("x" * 100)) == 60


def test_sections_are_in_the_order_of_the_recipes():
    assert list(ordered({"train": {}, "version": 1, "run": {}})) == ["version", "run", "train"]
