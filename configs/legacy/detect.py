"""Which program an old config was written for, and its translation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.legacy.ai_toolkit import PROCESSES, import_sd_trainer
from configs.legacy.draft import Imported, show
from configs.legacy.finetune import import_finetune
from configs.legacy.kohya_gui import import_kohya_gui, is_kohya_gui
from configs.legacy.read_file import fill_variables, read_old_file
from configs.legacy.sd_scripts import import_sd_scripts
from configs.legacy.simpletuner import import_simpletuner
from configs.legacy.words import CountPictures

_SD_SCRIPTS = {
    "network_module",
    "network_dim",
    "output_name",
    "max_train_epochs",
    "optimizer_type",
    "dataset_config",
    "t5xxl",
}
# It alone has one of the first two, and asks for both; the others are in other trainers' files too.
_SIMPLETUNER_ALONE = {"model_family", "data_backend_config"}
_SIMPLETUNER = _SIMPLETUNER_ALONE | {
    *("model_type", "lora_rank", "base_model_precision", "pretrained_model_name_or_path", "max_train_steps"),
}
_ONETRAINER = {"training_method", "base_model_name", "output_model_destination", "concept_file_name", "concepts"}
_KNOWN = (
    "Known are ai-toolkit's training jobs (YAML or JSON, a process of type sd_trainer, or of the older finetune), "
    "sd-scripts' arguments and datasets (TOML), the kohya_ss GUI's JSON, and SimpleTuner's config.json"
)


def import_file(
    path: Path, environment: Mapping[str, str], count_pictures: CountPictures, data: Path | None = None
) -> Imported:
    """Translate an old config.

    environment: for ${VARIABLES}.  count_pictures: pictures in a folder, or None if it is not here.  data: the file of
    the datasets, of programs that keep it apart; by default the one that the config names, if it is there.
    Raises InputError if the file is no config of a program that is known.
    """
    try:
        return _import_tree(path, read_old_file(path), environment, count_pictures, data)
    except RecursionError as error:
        raise InputError(
            f"{path}: its sections hold each other without an end, or are nested too deep. Look for a YAML alias "
            "(*name) inside of what it stands for."
        ) from error


def _import_tree(
    path: Path, tree: Any, environment: Mapping[str, str], count_pictures: CountPictures, data: Path | None
) -> Imported:
    if isinstance(tree, list) and all(isinstance(one, dict) and "id" in one for one in tree):
        raise InputError(
            f"{path}: these are SimpleTuner's datasets alone. Give its config.json, and this file as --data {path}."
        )
    if not isinstance(tree, dict):
        raise InputError(
            f"{path}: holds no keys with values. {_KNOWN}. Give the file that the old run was started with."
        )
    if "config" in tree or "job" in tree:
        return _import_job(path, fill_variables(tree, environment, path), count_pictures)
    plain = {str(key).lstrip("-") for key in tree} | {
        str(key) for section in tree.values() if isinstance(section, dict) for key in section
    }
    datasets = tree.get("datasets")
    subsets = isinstance(datasets, list) and any("subsets" in one for one in datasets if isinstance(one, dict))
    if len(plain & _ONETRAINER) > 1:
        raise InputError(
            f"{path}: is a config of OneTrainer, which is not read. Copy configs/fill_lora.yaml and put its values in: "
            "base_model_name is model.base; the folders of its concepts are data.datasets, resolution is "
            "data.resolution; lora_rank and lora_alpha are method.rank and method.alpha, and method.type is full where "
            "training_method is no LORA; learning_rate is train.lr; batch_size x gradient_accumulation_steps is "
            "train.global_batch_size, and epochs x pictures / that is train.steps."
        )
    if is_kohya_gui(plain):
        other = _read_beside(path, data, str(tree.get("dataset_config") or ""))
        return import_kohya_gui(tree, other if isinstance(other, dict) else None, count_pictures)
    is_simpletuner = plain & _SIMPLETUNER_ALONE and len(plain & _SIMPLETUNER) > 1
    if is_simpletuner and not {"network_module", "dataset_config"} & plain:
        named = str(tree.get("data_backend_config") or tree.get("--data_backend_config") or "")
        other = _read_beside(path, data, named)
        return import_simpletuner(tree, other if isinstance(other, list) else None, count_pictures)
    if subsets or len(plain & _SD_SCRIPTS) > 1:
        other = _read_beside(path, data, str(_find(tree, "dataset_config") or ""))
        return import_sd_scripts(tree, other if isinstance(other, dict) else None, count_pictures)
    if {"run", "model", "method", "data", "train"} & tree.keys():
        raise InputError(f"{path}: is a config of fluxfill already, by its sections. Try it: fluxfill check {path}")
    found = ", ".join(show(str(key)) for key in list(tree)[:8])
    raise InputError(f"{path}: is no config of a program that is known: its keys are {found}. {_KNOWN}.")


def _import_job(path: Path, tree: dict[str, Any], count_pictures: CountPictures) -> Imported:
    """A job of ai-toolkit's layout: config.process, a list of sections with a type."""
    config = tree.get("config")
    processes = config.get("process") if isinstance(config, dict) else None
    if isinstance(processes, dict):
        processes = tree["config"]["process"] = [processes]
    if not isinstance(processes, list) or not all(isinstance(process, dict) for process in processes) or not processes:
        raise InputError(f"{path}: config.process is no list of sections with a type. {_KNOWN}.")
    types = [str(process.get("type")) for process in processes]
    if any(kind in PROCESSES for kind in types):
        return import_sd_trainer(tree, count_pictures)
    if "finetune" in types:
        return import_finetune(tree, count_pictures)
    raise InputError(
        f"{path}: config.process has the type {show(types[0])} (job: {show(tree.get('job'))}), which trains no FLUX.1. "
        f"{_KNOWN}."
    )


def _read_beside(path: Path, data: Path | None, named: str) -> Any:
    """The second file of a config: what --data says, else what the config names, from here or from beside it."""
    if data is not None:
        return read_old_file(data)
    places = [Path(named), path.parent / named, path.parent / Path(named.replace("\\", "/")).name]
    found = next((place for place in places if named and place.is_file()), None)
    return None if found is None else read_old_file(found)


def _find(tree: dict[str, Any], key: str) -> Any:
    sections = [tree, *(section for section in tree.values() if isinstance(section, dict))]
    return next((section[key] for section in sections if key in section), None)
