"""A hub on this machine in the place of the real one."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.fetch.hub_server import Hub
from tests.patience import PATIENCE


@pytest.fixture
def hub(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """It holds the tiny model, and beside it what a run does not need. Nobody is logged in; the cache is empty."""
    shutil.copytree(tiny_model, tmp_path / "on-the-hub")
    (tmp_path / "on-the-hub" / "flux1-fill-dev.safetensors").write_bytes(b"as large again")
    (tmp_path / "on-the-hub" / "README.md").write_text("a card")
    (tmp_path / "on-the-hub" / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    hub = Hub(tmp_path / "on-the-hub")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("DOWNLOAD", "ETAG"):  # seconds until an answer begins
        monkeypatch.setattr(f"huggingface_hub.constants.HF_HUB_{name}_TIMEOUT", int(PATIENCE))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield hub
    hub.close()
