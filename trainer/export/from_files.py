"""A model folder in diffusers' layout, of the single files that ComfyUI and BFL's code read, without a GPU.

python -m trainer.export.from_files TRANSFORMER --rest MODEL_FOLDER --out DIR [--vae FILE] [--clip FILE] [--t5 FILE]

Weights are read and written one tensor at a time, but for the VAE's, which are few.
"""

import argparse
import logging
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, reduce
from pathlib import Path

from configs.library_warnings import quiet_libraries
from configs.lighter_imports import lighten_imports

if __name__ == "__main__":
    quiet_libraries()
    lighten_imports()

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from configs.errors import InputError
from configs.supervision import exit_code
from data.encoders.model_folder import PARTS, read_part_config
from data.storage.new_folder import new_folder
from data.storage.safetensors_file import TensorFiles, TensorSpec, write_tensor_dict, write_tensors
from trainer.export.bfl import bfl_tensors, read_from_bfl
from trainer.export.verify import verify_tensors
from trainer.export.write import FILE_BYTES, MODEL_WEIGHTS, link_part, plan_files, write_index

_PREFIX = "model.diffusion_model."  # of a transformer in a file that ComfyUI has saved
_CLIP_PREFIX = "text_model."  # as the published file has it
# In files of CLIP and T5 for other programs, and of no use to FLUX.1: other heads, and what can be computed.
_NEEDLESS = ("text_projection.weight", "logit_scale", "position_ids", "encoder.embed_tokens.weight")

log = logging.getLogger("fluxfill")


def make_folder(
    transformer: Path,
    rest: Path,
    out: Path,
    *,
    vae: Path | None = None,
    clip: Path | None = None,
    t5: Path | None = None,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write the folder `out`: the transformer of one file and, where given, VAE, CLIP and T5 of others; what else there
    is from `rest`, by hard links where the disk allows it. It appears whole or not at all.

    Weights keep their dtype, but for fp8, which becomes bf16.  rest: a model's folder; of the parts that are given its
    config.json is enough.  Raises InputError if a file is not that part of the model.
    """
    given = {"transformer": transformer, "vae": vae, "text_encoder": clip, "text_encoder_2": t5}
    with new_folder(out) as temporary:
        _write_parts(temporary, rest, given, file_bytes)


def _write_parts(folder: Path, rest: Path, given: Mapping[str, Path | None], file_bytes: int) -> None:
    for part in PARTS:
        if (file := given.get(part)) is None:
            link_part(rest / part, folder / part)
            continue
        (folder / part).mkdir()
        shutil.copyfile(rest / part / "config.json", folder / part / "config.json")
        config = read_part_config(rest, part)
        if part == "transformer":
            _write_transformer(file, folder / part, config, file_bytes)
        elif part == "vae":
            _write_vae(file, rest, folder / part)
        else:
            _write_text_encoder(file, part, folder / part, config)
    shutil.copyfile(rest / "model_index.json", folder / "model_index.json")


def _write_transformer(file: Path, part: Path, config: dict, file_bytes: int) -> None:
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    with _reading(file):
        files = TensorFiles(file)
        stored = _without_prefix(files.names())
        fused = bfl_tensors(model)
        if "x_embedder.weight" in stored:
            expected = {name: tuple(shape) for name, shape in shapes.items()}
        else:
            expected = {name: _joined(parts, shapes) for name, parts in fused.items()}
        _refuse_others(file, {name: files.shape(where) for name, where in stored.items()}, expected)
        dtype = _common_dtype(files)

    @lru_cache(maxsize=4)  # the rows of one tensor are asked for one after the other
    def read_stored(name: str) -> Tensor:
        return files.read(stored[name])

    read = read_stored if "x_embedder.weight" in stored else read_from_bfl(read_stored, fused, shapes)
    places = plan_files(shapes, dtype, file_bytes)
    for name in dict.fromkeys(places.values()):
        specs = {n: TensorSpec(dtype, tuple(shapes[n])) for n, place in places.items() if place == name}
        write_tensors(part / name, specs, lambda n: read(n).to(dtype))
    write_index(part, places, shapes, dtype)
    verify_tensors(part, TensorFiles(*part.glob("*.safetensors")), ((n, read(n).to(dtype)) for n in shapes))


def _write_text_encoder(file: Path, part: str, folder: Path, config: dict) -> None:
    """CLIP or T5: such files have the names of transformers, which the published ones have too."""
    expected = _text_shapes(part, config)
    prefix = _CLIP_PREFIX if part == "text_encoder" else ""
    with _reading(file):
        files = TensorFiles(file)
        found = {name.removeprefix(prefix): name for name in files.names()}
        needless = [name for name in found if name.endswith(_NEEDLESS) and name not in expected]
        stored = {name: where for name, where in found.items() if name not in needless}
        _refuse_others(file, {name: files.shape(where) for name, where in stored.items()}, expected)
        specs = {f"{prefix}{n}": TensorSpec(_kept(files.dtype(where)), expected[n]) for n, where in stored.items()}
    if needless:
        log.info("%s: without %s, for which FLUX.1 has no use", file, ", ".join(sorted(needless)))

    def read(name: str) -> Tensor:
        return files.read(stored[name.removeprefix(prefix)]).to(specs[name].dtype)

    write_tensors(folder / "model.safetensors", specs, read)
    verify_tensors(folder, TensorFiles(folder / "model.safetensors"), ((name, read(name)) for name in specs))


def _text_shapes(part: str, config: dict) -> dict[str, tuple[int, ...]]:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    with torch.device("meta"):
        model = (
            CLIPTextModel(CLIPTextConfig.from_dict(config))
            if part == "text_encoder"
            else T5EncoderModel(T5Config.from_dict(config))
        )
    # Without the second name of a tensor: T5's embeddings have two.
    return {n.removeprefix(_CLIP_PREFIX): tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=True)}


def _write_vae(file: Path, rest: Path, folder: Path) -> None:
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file

    with torch.device("meta"):
        expected = sum(p.numel() for p in AutoencoderKL.from_config(read_part_config(rest, "vae")).parameters())
    with _reading(file):
        tensors = load_file(file)
        # Else what is left over would be dropped, with a warning.
        if (count := sum(tensor.numel() for tensor in tensors.values())) != expected:
            raise InputError(
                f"{file}: is not the VAE of the model that --rest names: it holds {count:,} numbers, and that has "
                f"{expected:,}. Give the VAE of FLUX.1, ae.safetensors."
            )
        vae = AutoencoderKL.from_single_file(dict(tensors), config=str(rest), subfolder="vae", local_files_only=True)
        found = vae.state_dict()
    write_tensor_dict(folder / MODEL_WEIGHTS, {name: tensor.contiguous() for name, tensor in found.items()})


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns whatever a library raises over a file into a message that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # safetensors, diffusers and torch each have their own
        raise InputError(f"{file}: cannot be read ({error}). Download it again.") from error


def _without_prefix(names: list[str]) -> dict[str, str]:
    """Tensor -> its name in the file."""
    return {name.removeprefix(_PREFIX): name for name in names}


def _joined(parts: list[str], shapes: Mapping[str, torch.Size]) -> tuple[int, ...]:
    return (sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:])


def _refuse_others(file: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError unless a file has these tensors, no other, of these shapes."""
    lacking, left = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    other = sorted(name for name in found.keys() & expected.keys() if tuple(found[name]) != tuple(expected[name]))
    told = [
        f"{what} {len(names)}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in (("it lacks", lacking), ("has too many", left), ("has other shapes for", other))
        if names
    ]
    if told:
        raise InputError(
            f"{file}: is not that part of the model that --rest names ({'; '.join(told)}). Give the file of a FLUX.1 "
            "without scales, adapters or other models in it, and a --rest that it belongs to."
        )


def _kept(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype  # exactly: bf16 has all numbers of fp8


def _common_dtype(files: TensorFiles) -> torch.dtype:
    """One that holds all tensors of a file as they are."""
    return reduce(torch.promote_types, {_kept(files.dtype(name)) for name in files.names()})


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m trainer.export.from_files", description=make_folder.__doc__)
    parser.add_argument("transformer", type=Path)
    for name in ("rest", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="DIR")
    for name in ("vae", "clip", "t5"):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    try:
        make_folder(**vars(options))
    except InputError as error:
        print(error, file=sys.stderr)
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
