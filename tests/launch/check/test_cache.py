import shutil

import pytest

from launch.check.cache import check_cache, has_finished_cache
from launch.check.model import check_model
from launch.check.pictures import check_pictures


@pytest.fixture
def look(situate, folder, progress):
    """(state, checks) of the cache of a config: `look("key=value", ..., pictures=True)`."""

    def run(*overrides: str, pictures: bool = True):
        situation = situate(*overrides)
        model, _ = check_model(folder / "model")
        found = check_pictures(situation, progress)[0] if pictures else None
        return check_cache(situation, model, found and found.samples)

    return run


@pytest.fixture
def finished(cache, folder):
    """The cache of all of the demo's triples in the place of the config's."""
    shutil.copytree(cache.folder, folder / "cache")
    return folder / "cache"


@pytest.fixture
def of_the_cache(triples):
    """The settings and pictures that it was made with."""
    return ["data.holdout=48", *(f"data.datasets.0.{role}={triples / role}" for role in ("target", "source", "mask"))]


def test_a_cache_that_is_not_there_is_counted_by_what_it_will_hold(look, situate):
    state, (made,) = look()
    assert not state.can_be_read and state.bytes_to_encode > 0
    assert made.state == "ok" and "6 samples in" in made.what and "are to be encoded" in made.what
    assert not has_finished_cache(situate().config)


def test_a_finished_cache_can_be_read(look, finished, of_the_cache, situate):
    for pictures in (True, False):
        state, (made,) = look(*of_the_cache, pictures=pictures)
        assert state == (True, 0) and made.state == "ok" and "96 samples" in made.what
    assert has_finished_cache(situate().config)


def test_pictures_that_came_since_are_to_be_encoded(look, finished, of_the_cache, triples, tmp_path):
    shutil.copytree(triples, tmp_path / "more")
    for role, name in (("target", "new.png"), ("source", "new.png"), ("mask", "new.png")):
        shutil.copy(min((triples / role).glob("*.png")), tmp_path / "more" / role / name)
    more = [f"data.datasets.0.{role}={tmp_path / 'more' / role}" for role in ("target", "source", "mask")]
    state, (whole, behind) = look(*of_the_cache, *more)
    assert state.can_be_read and state.bytes_to_encode > 0 and whole.state == "ok"
    assert behind.state == "ok" and "are to be encoded" in behind.what
    _, (_, behind) = look(*of_the_cache, *more, "data.preprocess=never")
    assert behind.state == "warning" and "fluxfill preprocess" in behind.cure


def test_a_cache_of_other_pictures_is_not_taken_for_that_of_the_config(look, finished):
    state, (made, *_) = look("data.holdout=48")
    assert not state.can_be_read and made.state == "error"


def test_another_encoder_and_other_settings_are_listed(look, finished, folder, of_the_cache):
    path = folder / "model" / "vae" / "config.json"
    path.write_text(path.read_text() + " ")
    state, (made,) = look(*of_the_cache, "data.captions.trigger=sofa", pictures=False)
    assert not state.can_be_read and made.state == "error" and "made by other settings" in made.what
    assert any("vae of model.base" in line for line in made.found)
    assert any("data.captions.trigger" in line for line in made.found)
    assert "fluxfill preprocess" in made.cure


def test_shards_that_are_missing_or_cut_off_are_named(look, finished, of_the_cache):
    tars = sorted(finished.rglob("*.tar"))
    tars[0].unlink()
    tars[1].write_bytes(tars[1].read_bytes()[:-512])
    state, (made,) = look(*of_the_cache, pictures=False)
    text = "\n".join((made.what, *made.found))
    assert not state.can_be_read and tars[0].name in text and tars[1].name in text


def test_shards_of_another_run_that_would_be_deleted_are_an_error(look, finished):
    _, checks = look("run.name=another", "data.datasets.0.name=others", "data.holdout=0")
    errors = [made for made in checks if made.state == "error"]
    assert any("would delete, which it holds for the run demo" in made.what for made in errors)


def test_never_preprocessed_is_an_error_and_online_needs_none(look):
    _, checks = look("data.preprocess=never", pictures=False)
    assert checks[0].state == "error" and "data.preprocess is never" in checks[0].what
    state, (made,) = look("data.mode=online")
    assert state == (False, 0) and made.state == "ok"
