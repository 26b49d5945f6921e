"""Sixty triples with a fault of each kind among them: one run names every fault and no other, and when what it says is
done a second encodes all."""

import io
import re

import pytest
from rich.console import Console

from data.cache.manifest import read_manifest, read_shard_table
from data.preprocessing.run import preprocess
from data.show.statistics import count_cache
from data.sources.items import DEFAULT, NONE, OWN
from data.sources.problems import ProblemsFound
from tests.data import sixty_triples
from tests.data.sixty_triples import COUNT, FAULTS

_ENTRY = re.compile(r"  (?P<where>\S+): (?P<what>.*)")


def notes_in(text):
    """(kind, where, what) of the notes that a log shows."""
    kind, notes = "", []
    for line in text.splitlines():
        if heading := re.fullmatch(r"(\D+), \d+:", line):
            kind = heading[1]
        elif entry := _ENTRY.fullmatch(line):
            notes.append((kind, entry["where"], entry["what"]))
    return notes


@pytest.fixture
def config(demo_config, tmp_path):
    folder = tmp_path / "pictures"
    places = ", ".join(f"{role}: {folder}/{role}" for role in ("target", "mask", "source"))
    return demo_config(
        tmp_path / "cache",
        f"data.datasets=[{{name: sixty, {places}}}]",
        "data.resolution=32",
        "data.holdout=4",
        "data.captions.default=a place",
    )


def test_one_run_names_every_fault_and_when_they_are_cured_the_next_encodes_all(config, tmp_path):
    folder = tmp_path / "pictures"
    sixty_triples.write(folder)
    log = Console(file=io.StringIO(), record=True, width=80)
    with pytest.raises(ProblemsFound) as caught:
        preprocess(config, log, thorough=True)
    found = [(kind, where, what, False) for kind, where, what in notes_in(log.export_text())]
    found += [(problem.kind, problem.where, problem.what, True) for problem in caught.value.problems]
    assert not (tmp_path / "cache" / "shards").exists()
    for fault in FAULTS:
        matching = [
            entry
            for entry in found
            if entry[:2] == (fault.kind, f"{folder}/{fault.where}")
            and fault.what.format(folder=folder) in entry[2]
            and entry[3] == fault.stops
        ]
        assert len(matching) == 1, (fault, found)
        found.remove(matching[0])
    assert found == [], "false alarms"

    sixty_triples.cure(folder)
    log = Console(file=io.StringIO(), record=True, width=80)
    preprocess(config, log, thorough=True)
    text = log.export_text()
    assert notes_in(text) == []
    manifest, table = read_manifest(config.data.cache_folder), read_shard_table(config.data.cache_folder)
    assert table.samples.sum() == COUNT + 1, "one of them has two masks"
    counted = count_cache(config.data.cache_folder, manifest, table, range(len(table)), lambda: None)
    said = ", ".join(f"{counted.captions[whose]} {whose}" for whose in (OWN, DEFAULT, NONE))
    assert f"captions of {COUNT + 1} samples: {said}\n" in text
    assert 30 < counted.captions[OWN] < 45 and counted.captions[DEFAULT] == COUNT + 1 - counted.captions[OWN]
