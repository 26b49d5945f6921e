from pathlib import Path

import pytest

from tests.configs.run_file import VALID


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(VALID, encoding="utf-8")
    return path
