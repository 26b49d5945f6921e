import html
import json
import re

import numpy as np
import pytest
import torch

from tests.browser import dump
from tests.trainer.evaluation.photographs import PLACES, blurred, hole, in_hole, photograph
from trainer.evaluation.compare import Contender, compare, judge, say_verdict
from trainer.evaluation.page import FilledPicture, as_data_uri, render_page
from trainer.evaluation.scores import SCORES

LABELS = {"base": 6.0, "step 1": 3.0, "step 2": 1.0}  # and how much each blurs


def make_page(*, caption: str = "a photograph", key: str = "{name}", by: str = "hole_psnr") -> str:
    """Of four photographs, filled by three contenders who blur them."""
    random = np.random.default_rng(0)
    scores = {
        label: [
            {name: abs(random.normal(1, 0.1)) for name in SCORES} | {"hole_psnr": 30 - 2 * blur + number}
            for number in range(len(PLACES))
        ]
        for label, blur in LABELS.items()
    }
    contenders = [Contender(label, None if label == "base" else int(label[-1]), scores[label]) for label in LABELS]
    tables = compare(contenders, [0.05, 0.2, 0.2, 0.5], against="base")
    verdict = judge(contenders, by)
    pictures = [
        FilledPicture(
            key=key.format(name=name),
            caption=caption,
            hole_fraction=0.2,
            shown=as_data_uri(torch.where(hole(), 0.5, photograph(name))),
            target=as_data_uri(photograph(name)),
            fills={
                label: as_data_uri(in_hole(blurred(photograph(name), blur), photograph(name)))
                for label, blur in LABELS.items()
            },
            scores={label: scores[label][number] for label in LABELS},
        )
        for number, name in enumerate(PLACES)
    ]
    said = say_verdict(verdict, tables)
    return render_page("a run", "holdout", contenders, tables, verdict, said, pictures, ["LPIPS: left out."])


def text_of(page: str) -> str:
    """What a reader reads, without tags, on one line."""
    return " ".join(html.unescape(re.sub(r"<(style|title|script).*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL)).split())


def test_the_page_says_which_step_is_best_and_what_each_score_says():
    text = text_of(make_page())
    assert "Step 2 is best by PSNR in the hole" in text and "better than base by 10.0" in text
    assert all(f"{score.title} {score.says}" in text for name, score in SCORES.items() if "sigma" not in name)
    assert "LPIPS: left out." in text
    assert all(f"{title} for step 2, by PSNR in the hole" in text for title in ("Worst", "Best"))
    assert "0% to 10% 1 picture" in text and "10% to 30% 2 pictures" in text


def test_the_worst_comes_first_and_the_best_first_among_the_best():
    names = [*PLACES]
    assert re.findall(r"<h4>(\w+)", make_page()) == [names[0], names[1], names[3], names[2]]


def test_the_page_needs_no_other_file():
    page = make_page()
    assert "url(" not in page and "@import" not in page and "http" not in page and "fetch(" not in page
    assert all(source.startswith("data:image/webp") for source in re.findall(r'src="([^"]*)"', page))
    assert "<link" not in page and "<script src" not in page


def test_names_and_captions_are_text_whatever_they_hold():
    page = make_page(key="{name}<script>alert(1)</script>", caption="</p><img src=x onerror=alert(1)>\x1b[2J")
    assert page.count("<script>") == 1 and "onerror" not in re.sub("&lt;.*?&gt;", "", page) and "\x1b" not in page


# What a browser makes of a page: a script is put at its end, moves the sliders, and leaves its findings there.
_ASK = """<script>
addEventListener("load", () => {
const card = document.querySelector("article"), box = card.querySelector(".compare");
const over = box.querySelector(".over"), under = box.querySelector(".under"), slide = box.querySelector("input");
const move = (element, value) => { element.value = value; element.dispatchEvent(new Event("input")); };
const shown = [...document.images].filter(image => !image.hidden);
const found = {
  pictures: shown.length,
  seen: shown.filter(image => image.naturalWidth > 0 && image.getBoundingClientRect().width > 20).length,
  width: innerWidth, needed: document.documentElement.scrollWidth,
  paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
  clips: [], sides: [over.alt, under.alt], steps: [],
};
for (const value of [10, 90]) { move(slide, value); found.clips.push(getComputedStyle(over).clipPath); }
const tuned = card.querySelector('[data-side="tuned"]');
for (const value of [0, 1]) {
  move(document.getElementById("step"), value);
  const at = document.getElementById("at").textContent;
  found.steps.push([at, tuned.alt, under.src === tuned.src, under.src.slice(-60)]);
}
move(document.getElementById("right"), "target");
found.target = under.src === card.querySelector('[data-side="target"]').src;
document.body.innerHTML = "<pre>" + JSON.stringify(found) + "</pre>";
});
</script>"""


@pytest.mark.parametrize("width, dark", [(1280, False), (520, True)])
def test_in_a_browser_every_picture_is_seen_and_the_sliders_move(tmp_path, width, dark):
    asking = tmp_path / "asking.html"
    asking.write_text(make_page().replace("</body>", f"{_ASK}</body>"), encoding="utf-8")
    found = json.loads(
        html.unescape(re.search("<pre>({.*?})</pre>", dump(asking.as_uri(), tmp_path, width=width, dark=dark))[1])
    )
    assert found["seen"] == found["pictures"] == 4 * (2 + 4)  # two that are laid over each other, and a strip of four
    assert found["needed"] <= found["width"] == width
    paper, ink = (sum(map(int, re.findall(r"\d+", found[key])[:3])) for key in ("paper", "ink"))
    assert abs(paper - ink) > 500 and (paper < ink) == dark
    assert found["sides"] == ["base", "step 2"]
    assert found["clips"] == ["inset(0px 90% 0px 0px)", "inset(0px 10% 0px 0px)"]
    (first, second) = found["steps"]
    assert first[:3] == ["step 1", "step 1", True] and second[:3] == ["step 2", "step 2", True]
    assert first[3] != second[3] and found["target"]
