from pathlib import Path
from typing import Annotated

import pytest

from configs.data_schema import CaptionsConfig
from configs.loading import load_config
from configs.resume_settings import compare_settings, marks_of
from configs.schema import Config, FlowConfig
from configs.section import ANOTHER_RUN, NO_MATTER, Section, Shapes

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def changed(*overrides: str, known: dict | None = None) -> tuple[list[str], list[str]]:
    """(keys in force, keys refused) of the demo with overrides, beside the demo."""
    found = compare_settings(load_config(DEMO), load_config(DEMO, overrides), known or {})
    return [change.key for change in found[0]], [change.key for change in found[1]]


def test_every_key_says_what_another_value_means_for_a_run_that_goes_on():
    marks = marks_of(Config)
    assert {key.partition(".")[0] for key in marks} == set(Config.model_fields)
    assert all(mark.effect for mark in marks.values() if mark is not None and mark.kind == "in force")


def test_a_key_that_does_not_say_it_is_found():
    class WithColour(FlowConfig):
        colour: str = "red"

    class InSection(Section):
        flow: WithColour = WithColour()

    class InUnion(Section):
        flow: list[WithColour | CaptionsConfig] | None = None

    class OfTheCache(CaptionsConfig):
        colour: Annotated[str, Shapes.NOTHING] = "red"

    for section in (WithColour, InSection, InUnion, OfTheCache):
        with pytest.raises(TypeError, match=r"\.colour does not say what another value means for a run that goes on"):
            marks_of(section)

    class Marked(Section):
        flow: Annotated[WithColour, NO_MATTER] = WithColour()

    marks = marks_of(Marked)
    assert marks["flow.colour"] == NO_MATTER and marks["flow.guidance"].kind == "in force"


@pytest.mark.parametrize(
    "override, in_force",
    [
        ("train.lr=3e-4", ["train.lr"]),
        ("train.steps=7000", ["train.steps"]),
        ("flow.guidance=1", ["flow.guidance"]),
        ("data.captions.dropout=0.5", ["data.captions.dropout"]),
        ("checkpoint.async=false", []),
        ("validation.every_steps=null", []),
        ("slurm.env={A: b}", []),
        ("slurm.container={runtime: pyxis, image: a}", []),
        ("parallel.engine=ddp", []),
        ("run.name=other", []),
        ("data.cache=elsewhere", []),
        ("data.resolution=128", []),  # the samples themselves are compared
    ],
)
def test_what_may_change(override, in_force):
    assert changed(override) == (in_force, [])


@pytest.mark.parametrize(
    "override, refused",
    [
        ("run.seed=7", ["run.seed"]),
        ("method={type: lora, alpha: 64}", ["method.alpha", "method.rank", "method.targets", "method.type"]),
        ("train.optimizer=prodigy", ["train.optimizer"]),
        ("train.global_batch_size=32", ["train.global_batch_size"]),
        ("data.datasets.0.weight=2", ["data.datasets.photographs.weight"]),
    ],
)
def test_what_would_be_another_run(override, refused):
    overrides = [override] + (["train.lr=1"] if "prodigy" in override else [])
    assert [key for key in changed(*overrides)[1] if key not in ("method.init_from",)] == refused


def test_what_is_known_replaces_what_the_text_tells():
    assert changed("model.base=moved", known={"model.base": ("", "")}) == ([], [])
    assert changed(known={"model.base": ("a (1)", "a (2)")}) == ([], ["model.base"])


def test_a_message_has_both_values():
    before, now = load_config(DEMO), load_config(DEMO, ["train.lr=3e-4"])
    ((change,), _) = compare_settings(before, now, {})
    assert str(change) == f"train.lr is 0.0003, the run has {before.train.lr!r}"
    assert change.mark != ANOTHER_RUN


def test_a_run_goes_on_without_the_adapter_that_it_began_with():
    lora = "method={type: lora, rank: 4, init_from: old}"
    before, now = load_config(DEMO, [lora]), load_config(DEMO, [lora, "method.init_from=null"])
    assert compare_settings(before, now, {}) == ([], [])
    assert [change.key for change in compare_settings(now, before, {})[1]] == ["method.init_from"]
