"""What a person should know of a plan before it is encoded: captions, and pictures much enlarged or much cut off."""

from collections import Counter
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

from configs.data_schema import CaptionsConfig
from data.samples.plan import PlannedSample
from data.sources.items import DEFAULT, NONE, OWN, whose_caption
from data.sources.problems import printable

_MUCH_ENLARGED, _MUCH_CROPPED = 1.5, 0.2  # times its sides; share of its area
_NAMED = 5


def print_summary(console: Console, samples: Sequence[PlannedSample], captions: CaptionsConfig) -> None:
    """How many samples have a caption of their own, and how many are enlarged or cropped by much, the worst by name."""
    print_captions(console, count_captions(samples, captions))
    for line in describe_sizes(samples):
        console.print(Text(line, style="yellow"), soft_wrap=True)


def count_captions(samples: Sequence[PlannedSample], captions: CaptionsConfig) -> Counter[str]:
    """Samples by `whose_caption`."""
    return Counter(whose_caption(sample.triple.caption, captions) for sample in samples)


def print_captions(console: Console, counts: Counter[str]) -> None:
    """counts: of `count_captions`."""
    console.print(Text(f"captions of {counts.total()} samples: {describe_captions(counts)}"), soft_wrap=True)
    if warning := lacking_captions(counts):
        console.print(Text(warning, style="bold yellow"), soft_wrap=True)


def describe_captions(counts: Counter[str]) -> str:
    """How many samples have which caption: "60 of their own, 30 the default, 6 none"."""
    return ", ".join(f"{counts[whose]} {whose}" for whose in (OWN, DEFAULT, NONE))


def lacking_captions(counts: Counter[str]) -> str | None:
    """A warning if more than half of the samples have no caption of their own; None of one default for all, which is
    meant."""
    total = counts.total()
    lacking = counts[NONE] + (counts[DEFAULT] if counts[OWN] else 0)
    if 2 * lacking <= total:
        return None
    return (
        f"{lacking} of {total} samples have no caption of their own. Captions are .txt files beside the target, "
        "called like it, or the column or member that the config names; data.captions.default is for the others."
    )


def explain_untrained(dataset: str, held: int) -> tuple[str, str]:
    """(what, what to do) of a dataset that others train without.  held: its pictures, or samples, that are held out."""
    without = f"dataset {dataset} is not trained on, and the others share its weight"
    if held:
        return f"{without}: all {held} that it has are held out", "Lower data.holdout, or add pictures."
    left_out = "all of its pictures are left out by data.min_side or data.max_enlarge"
    return f"{without}: {left_out}", "Lower the one, raise the other, or take the dataset out of data.datasets."


def describe_sizes(samples: Sequence[PlannedSample]) -> list[str]:
    """A line for what is enlarged by much and one for what is cropped by much, where any sample is, the worst by
    name."""
    lines = (
        _worst(samples, _enlargement, f"enlarged above {_MUCH_ENLARGED:g}x", _MUCH_ENLARGED, "{:.1f}x"),
        _worst(samples, _cropped, f"cropped by more than {_MUCH_CROPPED:.0%}", _MUCH_CROPPED, "{:.0%}"),
    )
    return [line for line in lines if line is not None]


def _worst(
    samples: Sequence[PlannedSample], measure: Callable[[PlannedSample], float], what: str, limit: float, form: str
) -> str | None:
    upright = [sample for sample in samples if not sample.flip]
    much = [(value, sample) for sample in upright if (value := measure(sample)) > limit]
    if not much:
        return None
    much.sort(key=lambda pair: (-pair[0], pair[1].key))
    names = ", ".join(f"{sample.triple.name} ({form.format(value)})" for value, sample in much[:_NAMED])
    return f"{what}: {len(much)} of {len(upright)} samples, the most {printable(names)}"


def _enlargement(sample: PlannedSample) -> float:
    return sample.crop.width / sample.size[0]


def _cropped(sample: PlannedSample) -> float:
    """Share of the picture's area that is cut off."""
    return 1 - sample.bucket.width * sample.bucket.height / (sample.crop.width * sample.crop.height)
