import html
import json
import re
from dataclasses import replace

import pytest

from data.migrate.page import MOST_CARDS, render_page, write_page
from data.migrate.report import HoleColour, MigrationReport
from data.sources.problems import MASKS, Problem
from tests.browser import dump
from tests.data.migrate.made_reports import make_faulty_report, make_report, make_triple

COMMANDS = ["fluxfill check a.yaml", "fluxfill train a.yaml"]


def render(report: MigrationReport) -> str:
    return render_page(report, COMMANDS, lambda done, total: None, max_megapixels=1)


def text_of(page: str) -> str:
    """What a reader reads, without tags, on one line."""
    return " ".join(html.unescape(re.sub(r"<(style|title).*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL)).split())


def test_the_page_says_what_was_found_in_sentences(tmp_path):
    text = text_of(render(make_faulty_report(tmp_path)))
    for sentence in (
        "5 of 8 triples are ready to train on.",
        "White is the hole, seen in 8 of 8 pairs.",
        "exactly as FLUX.1 Fill expects it, with a hole of mid-grey",
        f"What is kept was hard-linked into {tmp_path / 'new'}. Nothing in the old folders was changed.",
        "3 triples are in quarantine.",
        "Two files became copies.",
        "fluxfill check a.yaml fluxfill train a.yaml",
        "name: migrated target: new/target mask: new/mask",
        "Good ones all 4",
    ):
        assert sentence in text


def test_every_problem_is_shown_with_its_cure_and_those_of_triples_with_pictures(tmp_path):
    report = make_faulty_report(tmp_path)
    page = render(report)
    articles = {
        re.search(r"<h4>(\S+)", article)[1]: article
        for article in re.findall(r"<article.*?</article>", page, re.DOTALL)
    }
    for triple in report.triples:
        for problem in triple.problems:
            text = text_of(articles[triple.name])
            assert problem.where in text and problem.what in text and problem.cure in text
            assert ("left out" in text) != triple.kept
            assert "data:image/webp" in articles[triple.name]
    assert "old/mask/lost.png belongs to no target. Add its target." in text_of(page)


def test_names_and_captions_are_text_whatever_they_hold(tmp_path):
    name = "<script>alert('1')&\x1b[2J\u202e"
    triple = make_triple(tmp_path, name, caption="</p><img src=x onerror=alert(1)>\udcff")
    bad = replace(
        triple, name=f"{name}2", kept=False, problems=(Problem(MASKS, name, "<b>is</b> bad", "<i>Mend</i>."),)
    )
    page = render(make_report(tmp_path / "new", [triple, bad], orphans={"<u>": ["<s>.png"]}))
    page.encode("utf-8")
    tags = set(re.findall(r"<(\w+)", page))
    assert not tags & {"script", "u", "s"} and "onerror" not in re.sub("&lt;.*?&gt;", "", page)
    assert "\x1b" not in page and "\u202e" not in page
    assert "<script>alert('1')&\\x1b[2J\\u202e" in text_of(page)


def test_the_page_needs_no_other_file_and_no_script(tmp_path):
    page = render(make_faulty_report(tmp_path))
    assert "<script" not in page and "url(" not in page and "@import" not in page and "http" not in page
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', page))
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', page))


def test_a_large_migration_makes_a_small_page(tmp_path):
    triple = make_triple(tmp_path, "a")
    problem = Problem(MASKS, "m.png", "is all black", "Paint it.")
    kept = [replace(triple, name=f"good-{number}") for number in range(10_000)]
    bad = [replace(triple, name=f"bad-{number}", kept=False, problems=(problem,)) for number in range(10_000)]
    report = make_report(
        tmp_path / "new", [*kept, *bad], orphans={"old": [f"{number}.png" for number in range(10_000)]}
    )
    drawn = []
    page = render_page(report, COMMANDS, lambda *count: drawn.append(count), max_megapixels=1)
    text = text_of(page)
    assert f"… and {10_000 - MOST_CARDS:,} more: all are in report.json." in text
    assert "36 of 10,000, evenly spread" in text and "bad-9999" not in text
    assert page.count("<article") == MOST_CARDS + 36 == len(drawn)
    assert len(page) < 3_000_000


def test_where_holes_come_from_if_not_from_masks_is_said(tmp_path):
    triple = make_triple(tmp_path, "a")
    others = [replace(triple, name=origin, hole_from=origin) for origin in ("alpha", "difference", "none")]
    text = text_of(render(make_report(tmp_path / "new", [triple, *others])))
    for words in ("made from transparency: 1.", "picture differ: 1.", "holes drawn at random while training: 1."):
        assert words in text


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"dry_run": True}, "without --dry-run"),
        ({"triples": (), "datasets": []}, "Nothing can be trained on yet."),
        ({"triples": (), "datasets": []}, "0 of 0 triples are ready to train on."),
        ({"hole": HoleColour("black", "given", 0, 0)}, "Black is the hole, as it was given."),
        ({"repeats": {"10_sofas": 10}}, "10_sofas was repeated 10 times"),
    ],
)
def test_what_is_out_of_the_ordinary_is_said(tmp_path, changes, sentence):
    report = replace(make_report(tmp_path / "new", [make_triple(tmp_path, "a")]), **changes)
    assert sentence in text_of(render(report))


# What a browser makes of a page: a script is put at the end of a copy, and leaves its findings there.
_ASK = """<script>
addEventListener("load", () => {
const pictures = [...document.images];
document.body.innerHTML = "<pre>" + JSON.stringify({
  pictures: pictures.length,
  seen: pictures.filter(picture => picture.naturalWidth > 0 && picture.getBoundingClientRect().width > 20).length,
  width: innerWidth,
  needed: document.documentElement.scrollWidth,
  paper: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.body).color,
}) + "</pre>";
});
</script>"""


@pytest.mark.parametrize("width, dark", [(1280, False), (1280, True), (520, False)])
def test_a_browser_shows_every_picture_at_any_width_in_light_and_dark(tmp_path, width, dark):
    report = make_faulty_report(tmp_path)
    path = write_page(report, COMMANDS, lambda done, total: None, max_megapixels=1)
    assert path == tmp_path / "new" / "report.html"
    page = path.read_text(encoding="utf-8")
    asking = tmp_path / "asking.html"
    asking.write_text(page.replace("</body>", f"{_ASK}</body>"), encoding="utf-8")
    found = json.loads(
        html.unescape(re.search("<pre>({.*?})</pre>", dump(asking.as_uri(), tmp_path, width=width, dark=dark))[1])
    )
    # Target, mask and two with its hole of each; a fifth where there is a source or a problem. Of "broken" the target
    # and both with a hole cannot be drawn, of "small" neither with a hole.
    assert found["seen"] == found["pictures"] == 3 * 4 + 5 + 5 + 2 + 5 + 3
    assert found["needed"] <= found["width"] == width
    paper, ink = (sum(map(int, re.findall(r"\d+", found[key])[:3])) for key in ("paper", "ink"))
    assert abs(paper - ink) > 500 and (paper < ink) == dark
