"""The key that was meant by one that does not exist."""

import difflib
from collections.abc import Iterable

_BATCH_SIZES = (
    "Two batch sizes mean it: train.global_batch_size (samples per update, over all GPUs) and train.micro_batch_size "
    "(samples per GPU and forward pass); how many passes make an update follows from the two."
)
_EPOCHS = "A run is counted in train.steps: pictures x epochs / train.global_batch_size."

OTHER_WORDS = {
    "base_model": "model.base",
    "model_path": "model.base",
    "name_or_path": "model.base",
    "pretrained_model_name_or_path": "model.base",
    "dtype": "model.precision",
    "mixed_precision": "model.precision",
    "output_dir": "run.dir",
    "training_folder": "run.dir",
    "training_seed": "run.seed",
    "linear": "method.rank",
    "lora_rank": "method.rank",
    "network_dim": "method.rank",
    "linear_alpha": "method.alpha",
    "lora_alpha": "method.alpha",
    "network_alpha": "method.alpha",
    "target_modules": "method.targets",
    "pretrained_lora_path": "method.init_from",
    "cache_dir": "data.cache",
    "folder_path": "data.datasets.0.target",
    "image_dir": "data.datasets.0.target",
    "target_image_dir": "data.datasets.0.target",
    "mask_dir": "data.datasets.0.mask",
    "mask_path": "data.datasets.0.mask",
    "control_path": "data.datasets.0.source",
    "inpaint_path": "data.datasets.0.source",
    "source_image_dir": "data.datasets.0.source",
    "num_repeats": "data.datasets.0.weight",
    "urls": "data.datasets.0.tars",
    "webdataset": "data.datasets.0.tars",
    "image_column": "data.datasets.0.columns.target",
    "caption_column": "data.datasets.0.columns.caption",
    "random_flip": "data.datasets.0.flip",
    "flip_aug": "data.datasets.0.flip",
    "caption_dropout_rate": "data.captions.dropout",
    "prompt_dropout_prob": "data.captions.dropout",
    "default_caption": "data.captions.default",
    "max_sequence_length": "data.captions.text_length",
    "trigger_word": "data.captions.trigger",
    "num_workers": "data.reader_threads",
    "max_steps": "train.steps",
    "max_train_steps": "train.steps",
    "num_train_steps": "train.steps",
    "learning_rate": "train.lr",
    "lr_scheduler": "train.lr_schedule",
    "lr_warmup_steps": "train.warmup_steps",
    "num_warmup_steps": "train.warmup_steps",
    "adam_weight_decay": "train.weight_decay",
    "gradient_checkpointing": "train.activation_checkpointing",
    "timestep_type": "flow.timestep_sampling",
    "weighting_scheme": "flow.timestep_sampling",
    "cfg_scale": "flow.guidance",
    "guidance_scale": "flow.guidance",
    "distributed_type": "parallel.engine",
    "eval_steps": "validation.every_steps",
    "sample_every": "validation.every_steps",
    "validation_steps": "validation.every_steps",
    "num_inference_steps": "validation.sampler_steps",
    "sample_steps": "validation.sampler_steps",
    "checkpointing_steps": "checkpoint.every_steps",
    "save_every": "checkpoint.every_steps",
    "save_steps": "checkpoint.every_steps",
    "checkpoints_total_limit": "checkpoint.keep_last",
    "max_step_saves_to_keep": "checkpoint.keep_last",
    "save_total_limit": "checkpoint.keep_last",
    "report_to": "logging.trackers",
}
"""Other trainers' words for the same thing."""

_ADVICE = {
    "batch_size": _BATCH_SIZES,
    "train_batch_size": _BATCH_SIZES,
    "gradient_accumulation": _BATCH_SIZES,
    "gradient_accumulation_steps": _BATCH_SIZES,
    "epochs": _EPOCHS,
    "num_epochs": _EPOCHS,
    "num_train_epochs": _EPOCHS,
}
"""Other trainers' words for what no single key here says."""

REMOVED = {
    "checkpoint.requantize": "Remove it: 8-bit optimizer state that another engine or number of GPUs goes on with is "
    "quantized again by itself, and the log says so.",
    "data.write_through": "Remove it: with data.mode online every finished shard of data.cache is read, and `fluxfill "
    "preprocess` beside the run makes them (docs/online.md).",
    "slurm.preprocess_tasks": "Write slurm.preprocess.tasks: the jobs that preprocess have keys of their own.",
}
"""Keys of earlier releases, which a config that was saved by one of them still holds."""

_ALIKE = 0.6  # difflib ratio from which two names are taken for the same one, misspelt
_NEAR = 0.1  # added for names of the same section


def suggest_key(section: str, name: str, keys: Iterable[str]) -> str:
    """A sentence that says what to write in the place of the unknown key `name`.

    section: dotted, "" at the top.  keys: every dotted key of the schema.  In order: what became of a key of an earlier
    release, another trainer's word for it, the very name in another section, the name that looks most like it (in this
    section rather than in another).
    """
    if (removed := REMOVED.get(f"{section}.{name}")) is not None:
        return removed
    keys = list(keys)
    word = name.lower()
    if word in _ADVICE:
        return _ADVICE[word]
    if word in OTHER_WORDS:
        return f"Did you mean {OTHER_WORDS[word]}?"
    here = {_last(key): key for key in keys if _parent(key) == section}
    if word in here:  # right but for upper case
        return f"Did you mean {here[word]}?"
    elsewhere = [key for key in keys if _last(key) == word]
    if elsewhere:
        return f"Did you mean {' or '.join(elsewhere)}?"
    advice = {other: f"Did you mean {key}?" for other, key in OTHER_WORDS.items()} | _ADVICE
    advice |= {_last(key): f"Did you mean {key}?" for key in keys}
    advice |= {own: f"Did you mean {key}?" for own, key in here.items()}
    alike = {other: difflib.SequenceMatcher(None, other, word).ratio() + (other in here) * _NEAR for other in advice}
    nearest = max(alike, key=alike.__getitem__)
    if alike[nearest] >= _ALIKE:
        return advice[nearest]
    place = f"Keys of {section}" if section else "Sections"
    return f"{place}: {', '.join(here)}."


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _parent(key: str) -> str:
    return key.rpartition(".")[0]
