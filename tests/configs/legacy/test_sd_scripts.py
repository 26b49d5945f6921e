import tomllib
from collections import Counter

import pytest

from configs.legacy.detect import import_file
from configs.legacy.words import DEV, TRAINS_DEV
from tests.configs.legacy.old_files import SAMPLES, import_arguments, import_sample, leaves, line_of


@pytest.fixture
def translate(tmp_path):
    """The translation of arguments, in TOML."""

    return lambda text, pictures=None: import_arguments(tmp_path / "old.toml", text, pictures=pictures)


def test_arguments_and_datasets_are_translated_to_the_last_value():
    imported = import_sample("sd_scripts.toml")
    assert imported.config == {
        "version": 1,
        "run": {"name": "red_sofa", "dir": "output", "seed": 42},
        "model": {"base": DEV, "precision": "fp8"},
        "method": {"type": "lora", "rank": 16, "alpha": 1.0},
        "data": {
            "cache": "cache/red_sofa",
            "holdout": 8,
            "datasets": [
                {"name": "sofas", "target": "/data/sofas", "mask": "/data/sofa-masks", "flip": True, "weight": 90.0},
                {
                    "name": "rooms",
                    "target": "/data/rooms",
                    "mask": {"random": {"brush": 0.6, "box": 0.2, "outpaint": 0.2}, "variants": 4},
                    "weight": 30.0,
                },
            ],
            "resolution": [1024],
            "captions": {"default": "a room", "dropout": 0.0},
        },
        "train": {
            "steps": 300,  # 10 epochs of 30 x 3 + 30 samples, 4 an update
            "global_batch_size": 4,
            "optimizer": "adamw8bit",
            "lr": 1e-4,
            "weight_decay": 0.05,
            "max_grad_norm": None,
            "activation_checkpointing": True,
            "lr_schedule": "cosine",
            "warmup_steps": 15,
        },
        "flow": {"timestep_sampling": "logit_normal", "shift": 3.1582, "guidance": 30.0},
        "checkpoint": {"every_steps": 60},
    }
    assert line_of(imported, "wandb_api_key").verdict == "secret, dropped"
    assert line_of(imported, "netwrk_dropout").verdict == "unknown key"
    assert "Was network_dropout meant?" in line_of(imported, "netwrk_dropout").why
    assert any("1 / 16 = 0.0625" in sentence for sentence in imported.really_did)
    assert imported.really_did[0].endswith(TRAINS_DEV)


def test_every_key_of_both_files_has_one_line():
    flat = tomllib.loads((SAMPLES / "sd_scripts.toml").read_text())
    arguments = [key.rpartition(".")[2] for key in leaves(flat)]
    datasets = list(leaves(tomllib.loads((SAMPLES / "sd_scripts_datasets.toml").read_text())))
    assert Counter(line.key for line in import_sample("sd_scripts.toml").lines) == Counter(arguments + datasets)


@pytest.mark.parametrize(
    "text, flow",
    [
        ("", ("uniform", 3.0, 30.0)),
        ('timestep_sampling = "flux_shift"\nguidance_scale = 3.5', ("logit_normal", "dynamic", 3.5)),
        ('timestep_sampling = "sigmoid"\ndiscrete_flow_shift = 3.0', ("logit_normal", "none", 30.0)),
    ],
)
def test_noise_levels_and_guidance_are_translated(translate, text, flow):
    settings = translate(text).config["flow"]
    assert (settings["timestep_sampling"], settings["shift"], settings["guidance"]) == flow


@pytest.mark.parametrize(
    "text, steps, size",
    [
        ("", 1600, 1),
        ("max_train_steps = 900\ntrain_batch_size = 2\ngradient_accumulation_steps = 3", 900, 6),
        ("max_train_epochs = 2\nmax_train_steps = 900", None, 1),
    ],
)
def test_steps_are_updates_and_epochs_count_before_them(translate, text, steps, size):
    imported = translate(text)
    settings = imported.config["train"]
    assert (settings["steps"], settings["global_batch_size"]) == (steps, size)
    assert ("train.steps" in imported.fill_in) == (steps is None)


def test_lokr_keeps_its_factor_and_what_is_not_trained_here_is_said(translate):
    lokr = translate('network_args = ["algo=lokr", "factor=8"]\nnetwork_dim = 16')
    assert lokr.config["method"] == {"type": "lokr", "rank": 16, "factor": 8, "alpha": 1.0}
    assert translate('network_args = ["algo=lokr", "factor=-1"]').config["method"]["factor"] == "auto"
    loha = translate('network_args = ["algo=loha"]\nnetwork_dim = 16\nnetwork_alpha = 16')
    assert loha.config["method"] == {"type": "lora", "rank": 16, "alpha": 16.0}
    assert "there is no loha here" in line_of(loha, "network_module").why
    assert any("was a loha" in sentence for sentence in loha.really_did)


def test_what_is_always_done_here_is_not_off_where_it_was(translate):
    imported = translate("enable_bucket = false\nnetwork_train_unet_only = false\ncache_latents = false\nsdpa = true")
    for key in ("enable_bucket", "network_train_unet_only", "cache_latents"):
        assert line_of(imported, key).verdict == "no equivalent"
    assert (line_of(imported, "sdpa").verdict, line_of(imported, "sdpa").new) == ("taken", "always")


def test_0_is_off_and_not_every_step(translate):
    imported = translate("max_train_steps = 900\nsave_every_n_steps = 0\nsample_every_n_steps = 0")
    assert imported.config["checkpoint"] == imported.config["validation"] == {"every_steps": None}
    assert line_of(imported, "save_every_n_steps").new == "checkpoint.every_steps: null"
    imported = translate("max_train_epochs = 0\nmax_train_steps = 900\nunet_lr = 0\nlearning_rate = 1e-4")
    assert (imported.config["train"]["steps"], imported.config["train"]["lr"]) == (900, 1e-4)


def test_keys_of_sd_scripts_are_known(translate):
    known = """
save_every_n_steps = 500
save_every_n_epochs = 2
lr_scheduler = "cosine_with_min_lr"
lr_scheduler_min_lr_ratio = 0.1
blockwise_fused_optimizers = true
debiased_estimation_loss = true
epoch = 3
max_train_steps = 900
"""
    imported = translate(known)
    assert not [line.key for line in imported.lines if line.verdict == "unknown key"]
    assert imported.config["train"]["lr_final_fraction"] == 0.1
    assert line_of(imported, "save_every_n_epochs").verdict == "no equivalent"


def test_an_adapter_is_never_taken_for_a_full_fine_tune(tmp_path):
    (tmp_path / "old.toml").write_text('output_name = "a"\noptimizer_type = "AdamW"\nnetwork_dim = 8\n')
    imported = import_file(tmp_path / "old.toml", {}, lambda folder: None)
    assert imported.config["method"] == {"type": "lora", "rank": 8, "alpha": 1.0}


def test_an_alpha_of_0_stands_for_the_rank(translate):
    imported = translate("network_dim = 8\nnetwork_alpha = 0")
    assert imported.config["method"]["alpha"] == 8.0
    assert not any("alpha" in sentence for sentence in imported.really_did)


def test_a_warm_up_that_is_a_share_of_unknown_steps_is_asked_for(translate):
    imported = translate("max_train_epochs = 10\nlr_warmup_steps = 0.05")
    assert imported.config["train"]["warmup_steps"] is None
    assert imported.fill_in["train.warmup_steps"] == "0.05 x train.steps"
    assert line_of(imported, "lr_warmup_steps").verdict == "no equivalent"
