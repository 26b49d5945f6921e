"""A model that a run exported."""

from pathlib import Path

import pytest


@pytest.fixture
def exported(tiny_model: Path, tmp_path: Path) -> Path:
    """The folder of an export of `trained_model`, in fp32. The test may damage it."""
    import torch

    from tests.trainer.export.trained_models import trained_model
    from trainer.export.write import export_model

    transformer = trained_model(tiny_model)
    export_model(
        transformer, tiny_model, tmp_path / "final", weights=transformer.named_parameters(), dtype=torch.float32
    )
    return tmp_path / "final"
