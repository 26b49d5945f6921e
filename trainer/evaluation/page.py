"""The page evaluation.html: scores, curves and pictures of all contenders, in one file that needs no other."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from data.show.page_style import STYLES
from data.show.picture_grid import to_picture
from data.sources.problems import printable
from trainer.evaluation.compare import Contender, ScoreTable, Verdict, count_pictures, show
from trainer.evaluation.scores import SCORES

_SIDE = 512  # px, of the longest side of a picture
_CASES = 6  # of the worst, and of the best
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _EDGE = 320, 150, 44, 12, 16  # of a curve's drawing, and of its margins
_CURVES = ("hole_psnr", "hole_ssim", "hole_ciede2000", "hole_flip", "hole_perceptual", "loss", "seam_error", "detail")
_SHOWN, _TARGET = "given", "target"


@dataclass(frozen=True)
class FilledPicture:
    """A picture of the evaluation. shown: with its hole; fills: of each contender, pasted back; all as data URIs."""

    key: str
    caption: str
    hole_fraction: float
    shown: str
    target: str
    fills: dict[str, str]
    scores: dict[str, dict[str, float]]


@dataclass(frozen=True)
class _Curve:
    """A score over steps, in units of its drawing.  band: a polygon of the intervals.  baseline: y of the contender
    that all are held against."""

    score: str
    line: str
    band: str
    dots: list[tuple[float, float, str]]
    baseline: float
    ticks: list[tuple[float, str]]
    steps: list[tuple[float, str]]


@dataclass(frozen=True)
class _Case:
    picture: FilledPicture
    score: str


def as_data_uri(picture: Tensor) -> str:
    """A picture, fp32 [3, H, W] in [0, 1], as WEBP for a page."""
    small, buffer = to_picture(picture), io.BytesIO()
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    small.save(buffer, format="WEBP", quality=82)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def render_page(
    run: str,
    data: str,
    contenders: Sequence[Contender],
    tables: Mapping[str, ScoreTable],
    verdict: Verdict,
    said: Sequence[str],
    pictures: Sequence[FilledPicture],
    absent: Sequence[str],
) -> str:
    """The page as HTML. contenders: first the one that all others are held against."""
    worst, best = _choose_cases(pictures, verdict)
    steps = [each.label for each in contenders if each.step is not None]
    return _TEMPLATE.render(
        run=run,
        data=data,
        labels=[each.label for each in contenders],
        steps=steps,
        against=contenders[0].label,
        best=verdict.best,
        said=said,
        num_pictures=len(pictures),
        by=SCORES[verdict.score],
        tables=tables,
        scores=SCORES,
        curves=[_draw_curve(contenders, tables[name]) for name in _CURVES if name in tables] if len(steps) > 1 else [],
        size=tables[verdict.score],
        groups=[("Worst", worst), ("Best", best)],
        absent=absent,
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        right=_RIGHT,
    )


def _choose_cases(pictures: Sequence[FilledPicture], verdict: Verdict) -> tuple[list[_Case], list[_Case]]:
    """The pictures on which the best step does worst, and best, by the score that decides."""
    score = SCORES[verdict.score]
    known = [picture for picture in pictures if verdict.score in picture.scores[verdict.best]]
    # As a picture's own figure, not as the gain over the base: what a user would see first.
    known.sort(key=lambda picture: float(score.goodness(picture.scores[verdict.best][verdict.score])))  # type: ignore[arg-type]
    cases = [
        _Case(picture, f"{show(picture.scores[verdict.best][verdict.score])} {score.unit}".strip()) for picture in known
    ]
    count = min(_CASES, (len(cases) + 1) // 2)
    return cases[:count], cases[count:][-_CASES:][::-1]


def _draw_curve(contenders: Sequence[Contender], table: ScoreTable) -> _Curve:
    on_curve = [(each.step, table.means[each.label]) for each in contenders if each.step is not None]
    base = table.means[contenders[0].label]
    low = min(min(mean.low for _, mean in on_curve), base.mean)
    high = max(max(mean.high for _, mean in on_curve), base.mean)
    room = (high - low) * 0.08 or 1.0
    low, high = low - room, high + room
    first, last = on_curve[0][0] or 0, on_curve[-1][0] or 1

    def x(step: int | None) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * ((step or 0) - first) / max(last - first, 1), 1)

    def y(value: float) -> float:
        return round(_EDGE + (_HEIGHT - 2 * _EDGE) * (high - value) / (high - low), 1)

    upper = [f"{x(step)},{y(mean.high)}" for step, mean in on_curve]
    lower = [f"{x(step)},{y(mean.low)}" for step, mean in on_curve]
    marks = (low + room, (low + high) / 2, high - room)
    return _Curve(
        table.score,
        " ".join(f"{x(step)},{y(mean.mean)}" for step, mean in on_curve),
        " ".join(upper + lower[::-1]),
        [(x(step), y(mean.mean), f"step {step}: {show(mean.mean)}") for step, mean in on_curve],
        y(base.mean),
        [(y(value), show(value)) for value in marks],
        [(x(step), str(step)) for step, _ in (on_curve[0], on_curve[-1])],
    )


_ENVIRONMENT = Environment(
    loader=FileSystemLoader([Path(__file__).parent, STYLES]),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda value: printable(value) if type(value) is str else value,  # not Markup, which a macro gave
)
_ENVIRONMENT.filters["show"] = show
_ENVIRONMENT.filters["count_pictures"] = count_pictures
_TEMPLATE = _ENVIRONMENT.get_template("page.html.j2")
