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
    print_captions(console, Counter(whose_caption(sample.triple.caption, captions) for sample in samples))
    _print_worst(console, samples, _enlargement, f"enlarged above {_MUCH_ENLARGED:g}x", _MUCH_ENLARGED, "{:.1f}x")
    _print_worst(console, samples, _cropped, f"cropped by more than {_MUCH_CROPPED:.0%}", _MUCH_CROPPED, "{:.0%}")


def print_captions(console: Console, counts: Counter[str]) -> None:
    """counts: samples by `whose_caption`."""
    total = counts.total()
    of_each = ", ".join(f"{counts[whose]} {whose}" for whose in (OWN, DEFAULT, NONE))
    console.print(Text(f"captions of {total} samples: {of_each}"), soft_wrap=True)
    lacking = counts[NONE] + (counts[DEFAULT] if counts[OWN] else 0)  # a default for all is meant
    if 2 * lacking > total:
        warning = (
            f"{lacking} of {total} samples have no caption of their own. Captions are .txt files beside the target, "
            "called like it, or the column or member that the config names; data.captions.default is for the others."
        )
        console.print(Text(warning, style="bold yellow"), soft_wrap=True)


def _print_worst(
    console: Console,
    samples: Sequence[PlannedSample],
    measure: Callable[[PlannedSample], float],
    what: str,
    limit: float,
    form: str,
) -> None:
    upright = [sample for sample in samples if not sample.flip]
    much = [(value, sample) for sample in upright if (value := measure(sample)) > limit]
    if much:
        much.sort(key=lambda pair: (-pair[0], pair[1].key))
        names = ", ".join(f"{sample.triple.name} ({form.format(value)})" for value, sample in much[:_NAMED])
        text = f"{what}: {len(much)} of {len(upright)} samples, the most {printable(names)}"
        console.print(Text(text, style="yellow"), soft_wrap=True)


def _enlargement(sample: PlannedSample) -> float:
    return sample.crop.width / sample.size[0]


def _cropped(sample: PlannedSample) -> float:
    """Share of the picture's area that is cut off."""
    return 1 - sample.bucket.width * sample.bucket.height / (sample.crop.width * sample.crop.height)
