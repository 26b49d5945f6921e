"""Pictures to scan: in folders, in tars, and what was read of them."""

import pytest

from configs.data_schema import DataConfig
from tests.data.sources.made_scans import members_of, scanned_by, write_folders, write_tar


@pytest.fixture
def reads(monkeypatch):
    """The pictures that were read, in order."""
    seen = []

    def count(file, **limits):
        seen.append(str(file))
        return _read_picture(file, **limits)

    from data.sources.scan import read_picture as _read_picture

    monkeypatch.setattr("data.sources.scan.read_picture", count)
    return seen


@pytest.fixture
def scan(tmp_path):
    """Scans a dataset: `scan(copies_gib=1, tars=...)` -> its items and facts."""

    def run(*, copies_gib=1, thorough=False, **dataset):
        config = {"name": "photos", **dataset}
        data = DataConfig.model_validate({"cache": tmp_path / "cache", "datasets": [config], "copies_gib": copies_gib})
        advanced = []
        scanned = scanned_by(data, advanced.append, thorough=thorough)
        assert sum(advanced) == len(scanned)
        return scanned

    return run


@pytest.fixture
def folders(tmp_path):
    write_folders(tmp_path)
    return {"target": tmp_path / "target", "mask": tmp_path / "mask"}


@pytest.fixture
def tars(folders, tmp_path):
    for letter in "ab":
        write_tar(tmp_path / f"{letter}.tar", members_of(tmp_path, letter))
    return tmp_path
