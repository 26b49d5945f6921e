import html
import json
import re

import pytest
from PIL import Image

from launch.report.page import MOST_STEPS, render_page, render_report
from launch.report.run import RunReader
from tests.browser import dump
from tests.launch.report.conftest import BEGIN, metrics_line

EVIL = "</script><script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">"
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy".*?>')


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_needs_no_other_file(make_run):
    page = render_report(RunReader(make_run("a")))
    outside = page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|url\(|@import|<script src|\bsrcdoc", outside)
    policy = html.unescape(POLICY.search(page)[0])
    assert "connect-src 'none'" in policy and "default-src 'none'" in policy
    assert all(grid["holdout"].startswith("data:image/webp") for grid in data_of(page)["runs"][0]["grids"])


def test_what_a_run_holds_never_becomes_markup(make_run):
    end = {"code": 1, "reason": EVIL, "step": 200, "again": None}
    page = render_report(RunReader(make_run("a", title=EVIL, key=EVIL, end=end)))
    assert page.count("<script") == page.count("</script>") == 2 and "<img" not in page
    assert data_of(page)["runs"][0]["name"] == EVIL


def test_pictures_of_very_many_steps_are_spread_and_a_half_written_one_is_left_out(make_run):
    run = make_run("a")
    for step in range(1, 100):
        Image.new("RGB", (8, 8)).save(run / "samples" / f"step-{step:08d}-train.png")
    (run / "samples" / "step-00000200-holdout.png").write_bytes(b"\x89PNG\r\n")
    grids = data_of(render_report(RunReader(run)))["runs"][0]["grids"]
    assert len(grids) == MOST_STEPS and (grids[0]["step"], grids[-1]["step"]) == (0, 200)
    assert "holdout" not in grids[-1] and "train" in grids[-1]


def test_in_a_browser_no_script_runs_but_the_pages_own(make_run, tmp_path):
    end = {"code": 1, "reason": EVIL, "step": 200, "again": None}
    page = render_report(RunReader(make_run("a", title=EVIL, key=EVIL, end=end)))
    place = tmp_path / "page.html"
    place.write_text(page.replace("</body>", "<script>document.title='ran'</script></body>"), encoding="utf-8")
    shown = dump(place.as_uri(), tmp_path)
    assert "<title>ran" not in shown and shown.count("<svg") > 5
    assert html.escape(EVIL, quote=False) in shown, "its text is there to read"


# What a browser makes of a page: a script at its end moves the sliders, and leaves its findings there.
_ASK = """<script>
addEventListener("load", () => {
const by = id => document.getElementById(id);
const move = (id, value) => { by(id).value = value; by(id).dispatchEvent(new Event("input")); };
const line = () => document.querySelector("#charts polyline.line").getAttribute("points");
const ticks = () => [...document.querySelectorAll("#charts svg")][0].textContent;
const image = () => document.querySelector("#grids img");
const box = document.querySelector("#charts .panel").getBoundingClientRect();
const found = {
  width: innerWidth, needed: document.documentElement.scrollWidth, panel: box.width,
  paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
  titles: [...document.querySelectorAll("#charts h3")].map(e => e.firstChild.textContent),
  kinds: [...new Set([...document.querySelectorAll("#charts [data-kind]")].map(e => e.dataset.kind))].sort(),
  inside: [...document.querySelectorAll("#charts svg")].every(e => e.getBoundingClientRect().height > 100),
  lines: [line()], ticks: [ticks()], grids: [], text: document.body.innerText,
};
move("smooth", 95); found.lines.push(line()); found.raw = document.querySelectorAll("polyline.raw").length;
move("smooth", 0); move("axis", "hours"); found.ticks.push(ticks());
const drawn = [...document.querySelector("#charts .panel").querySelectorAll("polyline.line")];
const points = drawn.flatMap(e => e.getAttribute("points").split(" "));
found.places = new Set(points.map(point => point.split(",")[0])).size;
document.getElementById("log").click(); found.ticks.push(ticks());
const tell = what => found.grids.push([what, image().src.slice(-90)]);
for (const value of [0, 2]) { move("grid-step", value); tell(document.querySelector("#grids output").textContent); }
move("grid-split", "train"); tell("train");
image().decode().then(() => { found.seen = image().naturalWidth;
  document.body.innerHTML = "<pre></pre>"; document.querySelector("pre").textContent = JSON.stringify(found); });
});
</script>"""


@pytest.mark.parametrize("width, dark", [(1280, False), (520, True)])
def test_in_a_browser_the_curves_are_drawn_and_the_sliders_move(make_run, tmp_path, width, dark):
    page = POLICY.sub("", render_report(RunReader(make_run("a"))))
    asking = tmp_path / "asking.html"
    asking.write_text(page.replace("</body>", f"{_ASK}</body>"), encoding="utf-8")
    shown = dump(asking.as_uri(), tmp_path, "--virtual-time-budget=5000", width=width, dark=dark)
    found = json.loads(html.unescape(re.search("<pre>({.*?})</pre>", shown, re.DOTALL)[1]))
    assert found["needed"] <= found["width"] == width and found["panel"] > 300 and found["inside"]
    paper, ink = (sum(map(int, re.findall(r"\d+", found[key])[:3])) for key in ("paper", "ink"))
    assert abs(paper - ink) > 500 and (paper < ink) == dark
    assert {"Loss", "Learning rate", "Gradient norm", "Samples a second (/s)", "Peak memory (GiB)"} <= set(
        found["titles"]
    )
    assert {"Wait for data, a step (s)", "PSNR in the hole (dB)"} <= set(found["titles"])
    assert found["kinds"] == ["preemption", "restart", "rollback", "skip"]
    assert found["places"] > 100, "of 200 steps, over hours: the clock is as fine as the steps"
    assert len(set(found["lines"])) == 2 and found["raw"] > 0 and len(set(found["ticks"])) == 3
    (first, second, third) = found["grids"]
    assert [first[0], second[0]] == ["step 0", "step 200"] and len({first[1], second[1], third[1]}) == 3
    assert found["seen"] == 640
    text = " ".join(found["text"].split())
    assert "nearest recipe is fill_lora; 1 of" in text and "train.lr 3e-05 0.0001" in text
    assert "8 x NVIDIA H100" in text and "11.4 GPU-hours in all" in text and "back to step 50" in text


def test_in_a_browser_a_run_that_has_hardly_begun_has_a_page(tmp_path):
    (tmp_path / "new").mkdir()
    place = tmp_path / "page.html"
    place.write_text(render_page([RunReader(tmp_path / "new").read() | {"grids": []}], live=False), encoding="utf-8")
    shown = dump(place.as_uri(), tmp_path)
    assert re.findall(r'<section id="(?:grids|events|cost|machines|settings)">(.*?)</section>', shown) == [""] * 5
    assert "<h1>new" in shown


def test_in_a_browser_runs_are_laid_over_each_other(make_run, tmp_path):
    runs = [RunReader(make_run(name, rate=rate)).read() | {"grids": []} for name, rate in (("a", 1.0), ("b", 1.5))]
    place = tmp_path / "page.html"
    place.write_text(render_page(runs, live=False), encoding="utf-8")
    shown = dump(place.as_uri(), tmp_path)
    loss = re.search(r"<h3>Loss.*?</svg>", shown, re.DOTALL)[0]
    assert "var(--r0)" in loss and "var(--r1)" in loss
    assert len(re.findall(r'<label title=".*?"><input type="checkbox">', shown)) == 2


def test_in_a_browser_the_loss_of_a_last_step_that_was_not_finite_is_no_earlier_ones(make_run, tmp_path):
    run = make_run("a")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(metrics_line(201, BEGIN + 9000.0, bad=True)) + "\n")
    place = tmp_path / "page.html"
    place.write_text(render_report(RunReader(run)), encoding="utf-8")
    assert "<b>not finite</b><span>loss, last step</span>" in dump(place.as_uri(), tmp_path)
