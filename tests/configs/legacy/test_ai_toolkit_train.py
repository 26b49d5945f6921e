import pytest

from configs.errors import InputError
from tests.configs.legacy.old_files import import_job, line_of

PLACE = "model: {name_or_path: /m}\ndatasets: [{folder_path: /d}]\n"


@pytest.fixture
def translate(tmp_path):
    """The translation of a block `train`; `translate("{steps: 3}", pictures=...)`."""

    def make(train, pictures=None):
        return import_job(tmp_path / "old.yaml", f"{PLACE}train: {train}", pictures=pictures)

    return make


@pytest.mark.parametrize(
    "train, steps, size",
    [
        ("{}", 1000, 1),
        ("{steps: 2000, batch_size: 2}", 2000, 2),
        ("{steps: 2000, batch_size: 2, gradient_accumulation: 4}", 2000, 8),
        ("{steps: 2000, batch_size: 2, gradient_accumulation_steps: 4}", 500, 2),
        ("{steps: '2000', batch_size: 1, gradient_accumulation_steps: 1}", 2000, 1),
        ("{steps: 3, batch_size: 1, gradient_accumulation_steps: 4}", 1, 1),
        ("{steps: 5, batch_size: 2, gradient_accumulation: -1}", 5, 10),  # 10 pictures: 5 batches an epoch
        ("{steps: 5, batch_size: 3, gradient_accumulation: -1}", 5, 10),  # the last batch of the epoch holds one
        ("{steps: 50, batch_size: 2, gradient_accumulation_steps: -1}", 10, 2),
    ],
)
def test_updates_and_samples_of_an_update_are_those_of_the_old_run(translate, train, steps, size):
    settings = translate(train, pictures=10).config["train"]
    assert (settings["steps"], settings["global_batch_size"]) == (steps, size)


@pytest.mark.parametrize("pictures", [None, 0])
@pytest.mark.parametrize(
    "key, steps, size",
    [("gradient_accumulation", 50, None), ("gradient_accumulation_steps", None, 2)],
)
def test_what_an_update_an_epoch_comes_to_is_asked_for_where_no_pictures_can_be_counted(
    translate, key, steps, size, pictures
):
    imported = translate(f"{{steps: 50, batch_size: 2, {key}: -1}}", pictures)
    train = imported.config["train"]
    assert (train["steps"], train["global_batch_size"]) == (steps, size)
    asked = "train.steps" if steps is None else "train.global_batch_size"
    assert "--pictures" in imported.fill_in[asked]


@pytest.mark.parametrize(
    "train, expected",
    [
        ("{lr: '1e-4'}", {"lr": 1e-4}),
        ("{lr: 1e-4, unet_lr: 2e-4}", {"lr": 2e-4}),
        ("{optimizer: prodigy, lr: 1e-4}", {"optimizer": "prodigy", "lr": 1.0, "weight_decay": 0.0}),
        ("{optimizer: adamw}", {"optimizer": "adamw", "lr": 1e-6, "weight_decay": 0.01}),
        ("{max_grad_norm: 0}", {"max_grad_norm": None}),
        ("{gradient_checkpointing: false}", {"activation_checkpointing": False}),
        ("{ema_config: {use_ema: true}}", {"ema_decay": 0.999}),
        ("{ema_config: {use_ema: false, ema_decay: 0.9}}", {"ema_decay": None}),
        ("{ema_config: }", {"ema_decay": None}),
        ("{lr_scheduler: linear}", {"lr_schedule": "constant", "warmup_steps": 0}),
        ("{lr_scheduler: cosine_with_restarts}", {"lr_schedule": "cosine"}),
        ("{lr_scheduler: constant_with_warmup}", {"lr_schedule": "constant", "warmup_steps": 999}),
        (
            "{lr_scheduler: cosine, lr: 1e-4, lr_scheduler_params: {eta_min: 1e-5, num_warmup_steps: 40}, "
            "gradient_accumulation_steps: 4}",
            {"lr_schedule": "cosine", "lr_final_fraction": 0.1, "warmup_steps": 10},
        ),
    ],
)
def test_settings_of_the_training_are_translated(translate, train, expected):
    settings = translate(train).config["train"]
    assert {key: settings[key] for key in expected} == expected


@pytest.mark.parametrize(
    "train, flow",
    [
        ("{}", ("logit_normal", "none", 30.0)),
        ("{timestep_type: linear, cfg_scale: 1}", ("uniform", "none", 30.0)),
        ("{timestep_type: flux_shift, cfg_scale: 3.5}", ("uniform", "dynamic", 3.5)),
        ("{timestep_type: sigmoid, linear_timesteps: true}", ("uniform", "none", 30.0)),
        ("{timestep_type: one_step}", ("logit_normal", "dynamic", 30.0)),
    ],
)
def test_noise_levels_and_guidance_are_translated(translate, train, flow):
    settings = translate(train).config["flow"]
    assert (settings["timestep_sampling"], settings["shift"], settings["guidance"]) == flow


def test_what_is_not_trained_here_says_what_to_do(translate):
    imported = translate("{train_text_encoder: true, noise_offset: 0.1, prompt_dropout_prob: 0.2, min_snr_gamma: 5}")
    assert line_of(imported, "train_text_encoder").verdict == "no equivalent"
    assert line_of(imported, "noise_offset").verdict == "no equivalent"
    assert imported.config["data"]["captions"]["dropout"] == 0.2
    assert all(line.why for line in imported.lines if line.verdict == "no equivalent")


def test_sampling_that_was_off_validates_never(translate):
    assert translate("{disable_sampling: true}").config["validation"]["every_steps"] is None


def test_both_kinds_of_accumulation_are_refused_as_by_the_old_trainer(translate):
    with pytest.raises(InputError, match="has both gradient_accumulation and gradient_accumulation_steps"):
        translate("{gradient_accumulation: 2, gradient_accumulation_steps: 2}")


def test_what_was_switched_off_is_not_said_to_be_off_here_where_it_is_always_done(tmp_path):
    text = f"{PLACE}train: {{train_unet: false, train_text_encoder: false}}\nnetwork: {{transformer_only: false}}"
    imported = import_job(tmp_path / "old.yaml", text)
    assert line_of(imported, "train_unet").verdict == line_of(imported, "transformer_only").verdict == "no equivalent"
    assert line_of(imported, "train_text_encoder").why == "off here too"


def test_an_interval_of_0_was_never(tmp_path):
    text = f"{PLACE}save: {{save_every: 0}}\nsample: {{sample_every: 0}}"
    config = import_job(tmp_path / "old.yaml", text).config
    assert config["checkpoint"]["every_steps"] is config["validation"]["every_steps"] is None
