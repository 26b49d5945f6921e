import os

import pytest

from data.migrate.look import look_at
from data.migrate.look_cache import LOOKS, LookCache
from tests.data.migrate.made_old_pairs import save_triples


@pytest.fixture
def triples(tmp_path):
    (tmp_path / "old").mkdir()
    return save_triples(tmp_path / "old", 3)


def look_again(folder, triples, *, complete=True, fails_at=None):
    """The looks, and the names of those that were taken."""
    taken = []

    def take(triple):
        if triple.name == fails_at:
            raise KeyboardInterrupt
        taken.append(triple.name)
        return look_at(triple, 10.0)

    cache = LookCache(folder, 10.0)
    try:
        looks = [cache.look(triple, take) for triple in triples]
    except KeyboardInterrupt:
        complete, looks = False, []
    cache.close(complete=complete)
    return looks, taken


def test_a_look_is_taken_once_until_a_file_changes(tmp_path, triples):
    looks, taken = look_again(tmp_path / "new", triples)
    assert taken == ["000", "001", "002"]
    assert look_again(tmp_path / "new", triples) == (looks, [])
    os.link(triples[0].target.place, tmp_path / "link.jpg")  # as a migration by hard links does
    assert look_again(tmp_path / "new", triples) == (looks, [])
    os.utime(triples[1].mask.place, ns=(0, 0))
    assert look_again(tmp_path / "new", triples)[1] == ["001"]
    assert len((tmp_path / "new" / LOOKS).read_text().splitlines()) == 3


def test_looks_of_a_run_that_was_stopped_count(tmp_path, triples):
    look_again(tmp_path / "new", triples, fails_at="002")
    with (tmp_path / "new" / LOOKS).open("a") as file:
        file.write('["half a li')
    assert look_again(tmp_path / "new", triples)[1] == ["002"]
    assert look_again(tmp_path / "new", triples)[1] == []


def test_what_was_wrong_is_looked_at_again(tmp_path, triples):
    data = (tmp_path / "old" / "001_target.jpg").read_bytes()
    (tmp_path / "old" / "001_target.jpg").write_bytes(data[:1000])
    assert look_again(tmp_path / "new", triples)[0][1].problems
    assert look_again(tmp_path / "new", triples)[1] == ["001"]
