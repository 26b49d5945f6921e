import pytest

from demo.old_folders import make_old_folders


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """Forty old triples, which no test may change."""
    return make_old_folders(tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="session")
def planted_black(tmp_path_factory):
    """The same with masks that are black in the hole."""
    return make_old_folders(tmp_path_factory.mktemp("old_black"), white_is_hole=False)
