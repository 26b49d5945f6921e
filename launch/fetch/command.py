"""The command `fluxfill fetch`."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from configs.errors import InputError, list_problems
from configs.flux_shape import DEV_CHANNELS, FILL_CHANNELS
from data.encoders.model_folder import PARTS, find_model, is_hub_id
from data.storage.new_folder import new_folder, refuse_existing
from launch.check.model import check_model, read_shapes
from launch.command import render_conversion
from launch.fetch.hub import fetch_from_hub, full_name, refuse_full_disk, writing

# Where a single file has its inputs, by BFL's names and by diffusers'.
_INPUTS = ("img_in.weight", "x_embedder.weight")
_WEIGHTS = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")  # endings; only the first is read
_PARTS_OF_FILES = {"vae": "vae", "clip": "text_encoder", "t5": "text_encoder_2"}


def fetch(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A hub id, a folder in diffusers' layout, or a transformer's .safetensors file."
        ),
    ],
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="COMMIT", help="The hub's commit, tag or branch. By default the newest.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="The folder to write. By default the hub cache; a file needs one.", show_default=False
        ),
    ] = None,
    vae: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The VAE beside a file: ae.safetensors.", show_default=False)
    ] = None,
    clip: Annotated[
        Path | None, typer.Option(metavar="FILE", help="CLIP beside a file: clip_l.safetensors.", show_default=False)
    ] = None,
    t5: Annotated[
        Path | None, typer.Option(metavar="FILE", help="T5 beside a file: t5xxl_fp16.safetensors.", show_default=False)
    ] = None,
    rest: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Where a file's configs, tokenizers and what else was not given come from: a hub id or a folder. By "
            "default FLUX.1-Fill-dev, or FLUX.1-dev for its file.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Get a model, so that jobs need no network. Run it where there is one, such as a login node.

    From the hub it takes one commit's files that training reads, without BFL's single file beside them, and compares
    them with the hub's checksums. Interrupted, the same command does what is left. The token is that of
    `hf auth login`, or HF_TOKEN in the environment; HF_ENDPOINT names a mirror, HF_HOME the cache. Jobs then run with
    HF_HUB_OFFLINE=1.

    A file for ComfyUI, in BFL's names or diffusers', becomes a folder, with the memory of a few tensors.

    Example: fluxfill fetch FLUX.1-Fill-dev

    Example: fluxfill fetch flux1-fill-dev.safetensors --vae ae.safetensors --out models/fill
    """
    files = {name: path for name, path in (("vae", vae), ("clip", clip), ("t5", t5)) if path is not None}
    given = Path(model).expanduser()
    if given.is_file() or given.suffix in _WEIGHTS:
        base = str(_convert(given, files, rest, revision, out))
    elif stray := [*files, *(["rest"] if rest else [])]:
        options = ", ".join(f"--{name}" for name in stray)
        raise InputError(f"{options}: belongs to a transformer's .safetensors file, and {model} is none.")
    elif given.is_dir():
        base = _from_folder(given, revision, out)
    else:
        base = _from_hub(model, revision, out)
    typer.echo(f"model.base: {base}")


def _from_hub(model: str, revision: str | None, out: Path | None) -> str:
    """What model.base is to say."""
    name = full_name(model)
    if not is_hub_id(name):
        raise InputError(f"{model}: no such file or folder, nor a hub id such as FLUX.1-Fill-dev or owner/model.")
    found = fetch_from_hub(name, revision=revision, out=out)
    _refuse_wrong(found.folder)
    typer.echo(f"{found.folder}: commit {found.commit}, every file as the hub's checksums say")
    return str(out.absolute() if out else name if revision is None else found.folder)


def _from_folder(folder: Path, revision: str | None, out: Path | None) -> str:
    if revision is not None:
        raise InputError(f"--revision {revision}: belongs to a hub id, and {folder} is a folder.")
    found = find_model(str(folder))
    _refuse_wrong(found)
    if out is None:
        return str(found)
    refuse_existing(out)
    needed = sum(_size_of(found / part) for part in PARTS)
    refuse_full_disk(out, needed, "Give --out on another disk.")
    with writing(out, needed), new_folder(out) as unfinished:
        shutil.copy2(found / "model_index.json", unfinished)
        # One by one: shutil.copytree goes on after an error, and hides that the disk is full.
        for folder_in, _, files in (place for part in PARTS for place in os.walk(found / part, followlinks=True)):
            copy = unfinished / Path(folder_in).relative_to(found)
            copy.mkdir(parents=True)
            for file in files:
                shutil.copy2(Path(folder_in, file), copy)
    return str(out.absolute())


def _convert(file: Path, files: dict[str, Path], rest: str | None, revision: str | None, out: Path | None) -> Path:
    """The folder made of a transformer's file, the other files given and the rest of a model."""
    if out is None:
        raise InputError(f"{file}: a folder is made of it. Say where: --out DIR.")
    refuse_existing(out)
    for path in (file, *files.values()):
        _refuse_unreadable(path)
    rest = rest or _model_of(file)
    parts = [_PARTS_OF_FILES[name] for name in files]
    if Path(rest).expanduser().is_dir():
        if revision is not None:
            raise InputError(f"--revision {revision}: belongs to a hub id, and --rest {rest} is a folder.")
        folder = find_model(rest)
    elif is_hub_id(full_name(rest)):
        folder = fetch_from_hub(full_name(rest), revision=revision, without_weights=("transformer", *parts)).folder
    else:
        raise InputError(f"--rest {rest}: no such folder, nor a hub id such as FLUX.1-Fill-dev or owner/model.")
    copied = [part for part in PARTS if part not in ("transformer", *parts)]
    needed = sum(path.stat().st_size for path in (file, *files.values())) + sum(_size_of(folder / p) for p in copied)
    refuse_full_disk(out, needed, "Give --out on another disk.")
    if code := subprocess.run(render_conversion(file, folder, out, files), check=False).returncode:
        raise typer.Exit(code)
    _refuse_wrong(out)
    return out.absolute()


def _refuse_unreadable(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: only .safetensors files are read; others can hold programs, or rounded weights.")
    if not path.is_file():
        raise InputError(f"{path}: there is no such file.")


def _model_of(file: Path) -> str:
    """The published model that a transformer's file is like, by its inputs."""
    try:
        shapes = read_shapes(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: no whole safetensors file ({error}). Download it again.") from error
    inputs = {shape[-1] for name, shape in shapes.items() if name.endswith(_INPUTS)}
    if inputs not in ({FILL_CHANNELS}, {DEV_CHANNELS}):
        raise InputError(
            f"{file}: no transformer of FLUX.1-Fill-dev ({FILL_CHANNELS} inputs) or FLUX.1-dev ({DEV_CHANNELS}): "
            f"{' or '.join(_INPUTS)} {'has ' + str(sorted(inputs)) if inputs else 'is not in it'}. Give another file."
        )
    return "FLUX.1-Fill-dev" if FILL_CHANNELS in inputs else "FLUX.1-dev"


def _refuse_wrong(folder: Path) -> None:
    """What `fluxfill check` would find wrong with the model."""
    _, checks = check_model(find_model(str(folder)))
    if wrong := [f"{made.what}. {made.cure}" for made in checks if made.state == "error"]:
        raise InputError(list_problems(wrong))


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
