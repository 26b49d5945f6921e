"""The figures that both READMEs and pages of docs/ quote are those of the committed results."""

import re

import pytest

from benchmarks.page import RESULTS, ROOT, read
from benchmarks.page_tables import Lines

_NUMBER = r"-?\d+(?:,\d{3})*(?:\.\d+)?(?: %)?"


def _reader(lines: Lines) -> list[str]:
    of_batch = {size: [line for line in lines if line["batch_size"] == size] for size in (2, 1, 4)}
    assert all([line["side"] for line in pair] == [512, 1024] for pair in of_batch.values())
    with_noise = [line["fluxfill_with_noise_samples_per_s"] / line["webdataset_samples_per_s"] for line in of_batch[2]]
    return [
        *(f"{line['share_of_cat']:.0%}".replace("%", " %") for line in of_batch[2]),
        *(f"{line['times_webdataset']:.1f}" for pair in of_batch.values() for line in pair),
        *(f"{ratio:.1f}" for ratio in with_noise),
    ]


def _scan(lines: Lines) -> list[str]:
    by_kind = {line["pictures"]: line for line in lines}
    own = [
        text
        for kind in ("jpeg", "png")
        for text in (str(by_kind[kind]["triples_a_second"]["scan"]), f"{by_kind[kind]['times_plain']:.1f}")
    ]
    decoding = f"{by_kind['png']['decode_alone_times_plain']:.1f}"
    return [*own, decoding, *(f"{by_kind[kind]['migrate_times_plain']:.1f}" for kind in ("jpeg", "png"))]


def _order(lines: Lines) -> list[str]:
    """Of the default, at the start of an epoch and late in it; then of dealt shards, where both are one figure."""
    one, dealt = ([line for line in lines if (line["streams"] == 1) == is_default] for is_default in (True, False))
    assert all([line["share_of_epoch"] for line in pair] == [0, 0.9] for pair in (one, dealt))
    seconds = [f"{line['seconds_to_first_batch']:.1f}" for line in (*one, *dealt)]
    return [*seconds[:2], str(dealt[0]["streams"]), *set(seconds[2:]), str(max(line["peak_mib"] for line in lines))]


def _memory(lines: Lines) -> list[str]:
    """Of a LoRA at 1024 px, those that checkpoint all blocks before those that checkpoint none."""
    gib = {line["way"]: line["gib"] for line in lines if (line.get("method"), line["side"]) == ("lora", 1024)}
    return [str(gib[way]) for way in ("ours_least", "in_loop", "ours", "naive")]


def _traffic(lines: Lines) -> list[str]:
    gb = {(line["build"], line["case"]): line["traffic_gb"] for line in lines if line["blocks"] == 57}
    cases = ("lora, checkpointing", "lora")
    return [f"{gb[build, case]:,.0f}" for build in ("after", "before") for case in cases]


def _cached_sample(lines: Lines) -> list[str]:
    mib = {
        (line["captions"], line["masks"], line["text_dtype"]): f"{line['bytes_per_sample'] / 2**20:.2f}"
        for line in lines
        if line["side"] == 1024
    }
    [files] = {line["file_per_mask_bytes_per_sample"] for line in lines if (line["side"], line["masks"]) == (1024, 4)}
    columns = (("unique", 1, "bf16"), ("unique", 1, "int8"), ("one", 1, "bf16"), ("unique", 4, "bf16"))
    return [*(mib[column] for column in columns), f"{files / 2**20:.2f}"]


def _start(lines: Lines) -> list[str]:
    plain = [line["cpu_seconds"] for line in lines if not line["validates"]]
    return [f"{seconds[build]:.2f}" for build in ("this", "against") for seconds in plain]


FIGURES = {
    "reader": _reader,
    "order": _order,
    "before_after": _memory,
    "step_cost": _traffic,
    "cache_size": _cached_sample,
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
    text = (ROOT / readme).read_text(encoding="utf-8")
    [row] = [line for line in text.splitlines() if link in line]
    rest = iter(re.findall(_NUMBER, row.replace(link, "")))
    for figure in FIGURES[name](read(RESULTS / f"{name}.jsonl")):
        assert figure in rest, f"{figure} is not there, or not in its turn: {row}"


@pytest.mark.parametrize("folder", ["docs", "docs/zh"])
def test_what_the_guard_costs_is_what_was_measured(folder: str) -> None:
    text = (ROOT / folder / "running.md").read_text(encoding="utf-8")
    [line] = [line for line in text.replace("\n", " ").split("`rollbacks.json`") if "benchmarks/guard.py" in line]
    said = re.findall(_NUMBER, line[: line.index("benchmarks/guard.py")])
    assert [number for number in said if "%" in number] == [
        f"{found['percent_of_step']} %" for found in read(RESULTS / "guard.jsonl")
    ]


@pytest.mark.parametrize("folder", ["docs", "docs/zh"])
def test_the_bytes_of_cached_samples_are_those_measured(folder: str) -> None:
    lines = read(RESULTS / "cache_size.jsonl")
    shards = {(line["captions"], line["masks"], line["text_dtype"], line["side"]): line for line in lines}
    kinds = [
        ("unique", 1, "bf16"),
        ("unique", 1, "int8"),
        ("one", 1, "bf16"),
        ("unique", 4, "bf16"),
        ("unique", 4, "int8"),
    ]
    rows = [[shards[*kind, side]["bytes_per_sample"] for side in (512, 1024)] for kind in kinds]
    files = {
        masks: [shards["unique", masks, "bf16", side]["file_per_mask_bytes_per_sample"] for side in (512, 1024)]
        for masks in (1, 4)
    }
    expected = [files[1], *rows[:3], files[4], *rows[3:]]
    text = (ROOT / folder / "cache-format.md").read_text(encoding="utf-8")
    said = re.findall(r"\| ([\d.]+) MiB \| ([\d.]+) MiB \|", text)
    assert said == [tuple(f"{size / 2**20:.2f}" for size in row) for row in expected]
