"""The page of one run or several: one HTML file that needs no other, with what it draws as JSON inside."""

import base64
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from data.show.page_style import STYLES
from launch.report.run import RunReader

MOST_STEPS = 40  # whose grids are in a file; a run of more has them evenly spread
_WIDEST = 1600  # px, of a grid in a file

_HERE = Path(__file__).parent


def render_report(reader: RunReader) -> str:
    """The page of a run as it is now, pictures inside."""
    grids = [
        {"step": step} | {split: uri for split, name in names.items() if (uri := _as_data_uri(reader, name))}
        for step, names in _spread(sorted(reader.pictures().items()), MOST_STEPS)
    ]
    return render_page([reader.read() | {"grids": [grid for grid in grids if len(grid) > 1]}], live=False)


def render_page(runs: Sequence[dict[str, Any]], *, live: bool) -> str:
    """The page as HTML.  live: it asks its server for the runs, again and again; else it opens no connection.

    Whatever runs hold is text: it stands in the page as JSON whose <, > and & are escaped, and its script makes text
    nodes of it. The policy in its head lets no other script run.
    """
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own, connects = ("'self'", "'self'") if live else ("", "'none'")
    policy = (
        f"default-src 'none'; img-src data: {own}; connect-src {connects}; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    title = ", ".join(str(run["name"]) for run in runs) or "runs"
    return _TEMPLATE.render(title=title, policy=policy, script=script, shown={"live": live, "runs": list(runs)})


def _as_data_uri(reader: RunReader, name: str) -> str | None:
    """A grid of pictures as WEBP; None of one that cannot be read, as while it is written."""
    try:
        with Image.open(reader.folder / "samples" / name) as opened:
            picture = opened.convert("RGB")
        picture.thumbnail((_WIDEST, 10 * _WIDEST), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, format="WEBP", quality=82)
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _spread(steps: list[tuple[int, dict[str, str]]], most: int) -> list[tuple[int, dict[str, str]]]:
    """At most so many, the first and the last among them."""
    if len(steps) <= most:
        return steps
    return [steps[round(number * (len(steps) - 1) / (most - 1))] for number in range(most)]


_ENVIRONMENT = Environment(
    loader=FileSystemLoader([_HERE, STYLES]),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATE = _ENVIRONMENT.get_template("page.html.j2")
