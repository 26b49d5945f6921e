"""The figures that both READMEs quote are those of the committed results."""

import re

import pytest

from benchmarks.page import RESULTS, read
from benchmarks.page_tables import Lines


def _reader(lines: Lines) -> list[str]:
    pairs = [line for size in (512, 1024) for line in lines if (line["side"], line["batch_size"]) == (size, 2)]
    return [f"{line['share_of_cat']:.0%}".replace("%", " %") for line in pairs] + [
        f"{line['times_webdataset']:.1f}" for line in lines
    ]


def _scan(lines: Lines) -> list[str]:
    return [str(line["triples_a_second"]["scan"]) for line in lines] + [f"{line['times_plain']:.1f}" for line in lines]


def _order(lines: Lines) -> list[str]:
    rank = [line for line in lines if line["streams"] == 512]
    return [f"{line['seconds_to_first_batch']:.1f}" for line in rank] + [str(max(line["peak_mib"] for line in lines))]


def _start(lines: Lines) -> list[str]:
    plain = [line["cpu_seconds"] for line in lines if not line["validates"]]
    return [f"{seconds[build]:.2f}" for seconds in plain for build in ("this", "against")]


FIGURES = {
    "reader": _reader,
    "order": _order,
    "scan": _scan,
    "start": _start,
    "preprocess": lambda lines: [f"{100 * lines[-1]['job_share_of_bare']:.0f} %"],
    "planning": lambda lines: [f"{line['seconds']:.0f}" for line in lines if line["triples"] == 100_000],
    "verify": lambda lines: [
        f"{lines[-1]['gb_per_s'][way]:.1f}" for way in ("verify, 2 threads", "sha256sum, 2 processes", "cat, 1 process")
    ],
    "overhead": lambda lines: [f"{100 * (lines[-1]['ratio'] - 1):.1f} %"],
    "peer": lambda lines: [f"{lines[-1]['times_the_peers_samples_a_cpu_second']:.2f}"],
}


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
@pytest.mark.parametrize("name", FIGURES)
def test_a_row_quotes_its_result(name: str, readme: str) -> None:
    link = f"[{name}.jsonl](benchmarks/results/{name}.jsonl)"
    text = (RESULTS.parents[1] / readme).read_text(encoding="utf-8")
    [row] = [line for line in text.splitlines() if link in line]
    numbers = re.findall(r"-?\d+(?:\.\d+)?(?: %)?", row.replace(link, ""))
    for figure in FIGURES[name](read(RESULTS / f"{name}.jsonl")):
        assert figure in numbers, row
