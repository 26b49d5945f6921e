import logging
import warnings

import pytest

from configs.library_warnings import quiet_libraries


@pytest.fixture
def as_before(monkeypatch):
    """Loggers, filters and the environment of the other tests."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    logger = logging.getLogger("torchao")
    level = logger.level
    with warnings.catch_warnings():
        yield
    logger.setLevel(level)


def test_chatter_is_kept_off_and_errors_are_not(as_before, caplog):
    quiet_libraries()
    logging.getLogger("torchao").warning("no kernels here")
    logging.getLogger("torchao").error("a real fault")
    logging.getLogger("fluxfill").warning("ours")
    assert [record.message for record in caplog.records] == ["a real fault", "ours"]


def test_other_warnings_are_seen(as_before):
    quiet_libraries()
    with pytest.warns(UserWarning, match="of the user"):
        warnings.warn("of the user", UserWarning, stacklevel=1)
    with warnings.catch_warnings(record=True) as seen:
        quiet_libraries()
        warnings.warn("TypedStorage is deprecated", UserWarning, stacklevel=1)
    assert seen == []
