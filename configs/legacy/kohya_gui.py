"""The JSON that the kohya_ss GUI saves: sd-scripts' arguments, some by other words, which the GUI turns into a TOML."""

from collections.abc import Collection
from typing import Any

from configs.legacy.draft import Imported, known_keys
from configs.legacy.sd_scripts import Dialect, import_sd_scripts
from configs.legacy.words import CountPictures

_WORDS = {
    "resolution": "max_resolution",
    "optimizer_type": "optimizer",
    "network_module": "LoRA_type",
    "network_weights": "lora_network_weights",  # of its earlier releases
}
_ITS_OWN = {"LoRA_type", "flux1_checkbox", "max_resolution", "lr_warmup", "LyCORIS_preset", "model_list"}
_LAYERS = "which layers are adapted, all by one rank: method.targets, method.rank"
_KNOWN = known_keys(
    {
        "only FLUX.1 is trained": "flux1_checkbox sdxl* sd3_* lumina* anima* hunyuan* model_list chroma*",
        _LAYERS: (
            "LyCORIS_preset conv_* down_lr_weight mid_lr_weight up_lr_weight block_* train_blocks split_qkv "
            "train_double_block_indices train_single_block_indices img_*_dim txt_*_dim single_*dim in_dims "
            "enable_all_linear train_norm train_on_input"
        ),
        "adapters are trained without dropout": "rank_dropout* module_dropout",
        "not a part of LoRA, or of LoKr as it is trained here": (
            "use_cp use_tucker use_scalar constrain rescaled decompose_both unit bypass_mode dora_wd loraplus_*"
        ),
        "only LoKr has a factor": "factor",
        "noise is drawn plainly": "noise_offset_type",
        "text encoders are never trained": "train_t5xxl t5xxl_lr",
        "how the GUI last saved its file": "save_as_bool",
        "pictures and captions are encoded once, to disk": "flux1_cache_text_encoder_outputs*",
        "text encoders and VAE come with model.base": "flux1_clip_l flux1_t5xxl",
        "`fluxfill train` starts a process per GPU; choose some by CUDA_VISIBLE_DEVICES": (
            "num_processes num_machines multi_gpu gpu_ids main_process_port extra_accelerate_launch_args"
        ),
        "set train.compile: regional": "dynamo_*",
        "logging.trackers: tensorboard": "use_wandb",
        "arguments of sd-scripts, by hand: look for each in sd-scripts' documentation": "additional_parameters",
    }
)


def is_kohya_gui(keys: Collection[str]) -> bool:
    """Whether a file with these keys was saved by the GUI."""
    return "LoRA_type" in keys or len(_ITS_OWN.intersection(keys)) > 1


def import_kohya_gui(
    settings: dict[str, Any], datasets: dict[str, Any] | None, count_pictures: CountPictures
) -> Imported:
    """Translate a saved configuration. datasets: what its dataset_config names, if it was found."""
    spelled = {argument: word for argument, word in _WORDS.items() if word in settings and argument not in settings}
    argument_of = {word: argument for argument, word in spelled.items()}
    arguments = {argument_of.get(key, key): value for key, value in settings.items()}
    by_epoch = not (_is_set(settings, "max_train_steps") or _is_set(settings, "max_train_epochs"))
    by_epoch = by_epoch and not settings.get("dataset_config")  # with which the GUI counts nothing itself
    epochs = "epoch" if by_epoch else "max_train_epochs"
    return import_sd_scripts(arguments, datasets, count_pictures, Dialect("the kohya_ss GUI", spelled, _KNOWN, epochs))


def _is_set(settings: dict[str, Any], key: str) -> bool:
    """The GUI's word for none is 0, or an empty text."""
    return settings.get(key) not in (None, "", 0, "0")
