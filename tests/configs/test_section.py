import pytest
from pydantic import ValidationError

from configs.schema import Config
from tests.configs.run_file import smallest, with_key


def test_config_is_frozen() -> None:
    config = Config.model_validate(smallest())
    with pytest.raises(ValidationError, match="frozen"):
        config.train.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    "place", ["pipe:cat x", "http://host/a", "file:///a", "s3://", "https://host/a?key=b", "", 3, None]
)
def test_a_cache_elsewhere_is_refused(place):
    with pytest.raises(ValidationError, match=r"only https://|names no bucket|has a \? or #|must be a path or a URL"):
        Config.model_validate(with_key("data.cache", place))
