import pytest
from pydantic import ValidationError

from configs.errors import InputError
from configs.schema import Config
from tests.configs.run_file import smallest, with_key


def test_one_resolution_needs_no_list() -> None:
    assert Config.model_validate(with_key("data.resolution", 64)).data.resolution == [64]


def test_datasets_have_names_of_their_own() -> None:
    raw = smallest()
    raw["data"]["datasets"] *= 2
    with pytest.raises(ValidationError, match="a name of its own"):
        Config.model_validate(raw)


@pytest.mark.parametrize("url", ["https://host/cache/sofa", "s3://bucket/cache/", "gs://bucket/a"])
def test_a_cache_may_be_a_url_if_its_shards_may_be_copied_somewhere(url):
    raw = with_key("data.cache", url)
    with pytest.raises(ValidationError, match="give a folder on each node's own disk"):
        Config.model_validate(raw)
    raw["data"]["local_cache"] = "/scratch"
    data = Config.model_validate(raw).data
    assert data.cache == url.rstrip("/")
    with pytest.raises(InputError, match=rf"data\.cache is {url.rstrip('/')}, but a cache is made in a folder"):
        _ = data.cache_folder


@pytest.mark.parametrize("side, pictures", [(64, 8), (512, 8), (768, 3), (1024, 2), (1536, 1), (4096, 1)])
def test_larger_pictures_go_through_the_vae_in_smaller_numbers(side: int, pictures: int) -> None:
    """By their pixels, so that a card of 24 GB holds them; captions still go through T5 by eights."""
    data = Config.model_validate(smallest()).data
    assert (data.encode_batch_size, data.pictures_at_once(side**2)) == (8, pictures)
    buckets = [pixels for pixels in (256**2, 512**2, 640**2, 768**2, 1024**2, 1536**2) if pixels <= side**2]
    most = max((pixels * data.pictures_at_once(pixels) for pixels in buckets), default=0)
    assert most <= data.pixels_at_once(side**2)
