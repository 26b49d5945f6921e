import json

import pytest
import yaml

from tests.trainer.adapters.live_models import lora
from tests.trainer.export.made_checkpoints import WHOLE, make_checkpoint
from trainer.export.card import MASK, base_licence, metadata_of, write_card
from trainer.export.trained import open_trained


@pytest.fixture
def trained(tiny_model, tmp_path):
    return open_trained(make_checkpoint(tiny_model, lora(alpha=12), tmp_path / "sofa")[0], "ema")


def test_metadata_is_the_runs_and_the_same_every_time(trained, tiny_model):
    found = metadata_of(trained, "comfyui", "fp32")
    assert found == metadata_of(trained, "comfyui", "fp32")
    said = {name.removeprefix("fluxfill."): text for name, text in found.items()}
    assert (said["run"], said["step"], said["weights"]) == ("sofa", "3", "ema")
    assert (said["guidance"], said["shift"], said["mask"]) == ("30", "dynamic", MASK)
    assert json.loads(said["method"])["alpha"] == 12
    assert said["base"] == tiny_model.name and len(said["config_sha256"]) == 64 and len(said["base_fingerprint"]) == 32
    assert all(isinstance(text, str) and str(tiny_model.parent) not in text for text in found.values())


def test_another_config_has_another_hash(tiny_model, tmp_path):
    hashes = {
        metadata_of(open_trained(make_checkpoint(tiny_model, lora(alpha=alpha), tmp_path / "a")[0], "live"), "x", "y")[
            "fluxfill.config_sha256"
        ]
        for alpha in (4, 8)
    }
    assert len(hashes) == 2


@pytest.mark.parametrize(
    "card, licence",
    [
        (None, "that of the base"),
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: my-licence\n---\n", "my-licence"),
    ],
)
def test_the_licence_is_that_of_the_base(trained, tmp_path, card, licence):
    model = tmp_path / "model"
    model.mkdir()
    if card is not None:
        (model / "README.md").write_text(card)
    object.__setattr__(trained, "model", model)
    assert base_licence(trained) == licence


def test_of_bfls_own_models_the_licence_is_known(trained):
    config = trained.config
    named = config.model.model_copy(update={"base": "black-forest-labs/FLUX.1-Fill-dev"})
    object.__setattr__(trained, "config", config.model_copy(update={"model": named}))
    assert base_licence(trained) == "flux-1-dev-non-commercial-license"


def test_the_card_is_one_that_the_hub_can_read(trained, tmp_path):
    named = trained.config.model.model_copy(update={"base": "black-forest-labs/FLUX.1-Fill-dev"})
    object.__setattr__(trained, "config", trained.config.model_copy(update={"model": named}))
    write_card(trained, tmp_path, metadata_of(trained, "diffusers", "fp32"), "Load it.")
    _, front, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["base_model"] == "black-forest-labs/FLUX.1-Fill-dev"
    assert (head["base_model_relation"], head["license"]) == ("adapter", "other")
    assert head["license_name"] == "flux-1-dev-non-commercial-license" and "lora" in head["tags"]
    assert all(words in text for words in ("# sofa", "Load it.", MASK, "Guidance: 30", "| step | 3 |"))
    assert "![" not in text  # there was no validation


@pytest.mark.parametrize("method, form, relation", [(lora(), "merged", "finetune"), (WHOLE, "diffusers", "finetune")])
def test_a_whole_model_is_no_adapter(tiny_model, tmp_path, method, form, relation):
    trained = open_trained(make_checkpoint(tiny_model, method, tmp_path / "sofa")[0], "live")
    named = trained.config.model.model_copy(update={"base": "owner/model"})
    object.__setattr__(trained, "config", trained.config.model_copy(update={"model": named}))
    write_card(trained, tmp_path, metadata_of(trained, form, "bf16"), "Load it.")
    front = (tmp_path / "README.md").read_text().split("---\n", 2)[1]
    assert yaml.safe_load(front)["base_model_relation"] == relation


@pytest.mark.parametrize("validated", ["live", "ema"])
@pytest.mark.parametrize("exported", ["live", "ema"])
def test_the_pictures_of_the_steps_validation_are_shown_where_they_are_of_the_same_weights(
    tiny_model, tmp_path, validated, exported
):
    trained = open_trained(make_checkpoint(tiny_model, lora(), tmp_path / "sofa")[0], exported)
    validation = trained.config.validation.model_copy(update={"weights": validated})
    object.__setattr__(trained, "config", trained.config.model_copy(update={"validation": validation}))
    samples = tmp_path / "sofa" / "samples"
    samples.mkdir()
    (samples / "step-00000003-holdout.png").write_bytes(b"three")
    (samples / "step-00000004-holdout.png").write_bytes(b"four")
    out = tmp_path / "out"
    out.mkdir()
    write_card(trained, out, metadata_of(trained, "diffusers", "fp32"), "")
    assert ("![samples](samples.png)" in (out / "README.md").read_text()) == (validated == exported)
    assert (out / "samples.png").exists() == (validated == exported)
    if validated == exported:
        assert (out / "samples.png").read_bytes() == b"three"


@pytest.mark.parametrize("evaluated", ["live", "ema", None])
def test_scores_and_page_of_an_evaluation_of_the_step_are_taken_where_they_are_of_the_same_weights(
    trained, tmp_path, evaluated
):
    """The export is of the average."""
    folder, out = tmp_path / "sofa" / "evaluation", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    scores = {"base": {"hole_psnr": 10.0}, "step 3": {"hole_psnr": 20.0}}
    found = {"version": 1, "against": "base", "steps": {"step 3": 3}, "pictures": [{"scores": scores}]}
    (folder / "evaluation.json").write_text(json.dumps(found | ({"weights": evaluated} if evaluated else {})))
    (folder / "evaluation.html").write_text("page")
    write_card(trained, out, metadata_of(trained, "diffusers", "fp32"), "")
    text, is_taken = (out / "README.md").read_text(), evaluated == "ema"
    assert ("| hole_psnr | 10 | 20 |" in text) == ("[evaluation.html](evaluation.html)" in text) == is_taken
    assert (out / "evaluation.html").exists() == is_taken
