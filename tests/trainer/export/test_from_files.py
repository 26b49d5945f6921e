"""Files as BFL and ComfyUI publish them, made of the tiny model: what comes out is the tiny model again."""

import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import FluxFillPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import InputError
from data.encoders.load import load_clip, load_t5, load_vae
from data.storage.safetensors_file import TensorFiles
from launch.check.model import check_model
from trainer.export.bfl import bfl_tensors, read_as_bfl
from trainer.export.from_files import main, make_folder
from trainer.model.base_fingerprint import base_fingerprint
from trainer.model.flux import load_transformer

WEIGHTS = "diffusion_pytorch_model.safetensors"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The parts of the tiny model, each as another program's file."""
    folder = tmp_path_factory.mktemp("files")
    transformer = load_transformer(tiny_model, dtype=torch.float32)
    tensors = bfl_tensors(transformer)
    read = read_as_bfl({name: p.detach() for name, p in transformer.named_parameters()}.__getitem__, tensors)
    written = {
        "transformer": {name: read(name).contiguous() for name in tensors},
        "vae": {vae_name(n): tensor for n, tensor in load_file(tiny_model / "vae" / WEIGHTS).items()},
        # With what such files have besides.
        "clip": load_file(tiny_model / "text_encoder" / "model.safetensors") | {"logit_scale": torch.zeros(())},
        "t5": {
            n: tensor.half() for n, tensor in load_file(tiny_model / "text_encoder_2" / "model.safetensors").items()
        },
    }
    written["t5"]["encoder.embed_tokens.weight"] = written["t5"]["shared.weight"].clone()
    for name, part in written.items():
        save_file(part, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in written}


def vae_name(name: str) -> str:
    """BFL's name of a tensor of diffusers' VAE of four blocks, without attention."""
    name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{3 - int(found[1])}", name)
    name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = re.sub(r"(up|down)samplers\.0", r"\1sample", name).replace("resnets", "block")
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def configs_alone(model: Path, folder: Path, *parts: str) -> Path:
    """A copy of a model without the weights of some parts, as `fluxfill fetch` gets it for a file."""
    shutil.copytree(model, folder)
    for part in parts:
        for path in (folder / part).iterdir():
            if path.name != "config.json":
                path.unlink()
    return folder


def test_four_files_and_the_configs_are_the_whole_model(
    files: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    rest = configs_alone(tiny_model, tmp_path / "rest", "transformer", "vae", "text_encoder", "text_encoder_2")
    out = tmp_path / "out"
    assert main([str(files["transformer"]), f"--rest={rest}", f"--out={out}", *options(files)]) == 0
    assert [made.state for made in check_model(out)[1]] == ["ok"]
    assert base_fingerprint(out) == base_fingerprint(tiny_model), "a run on the one goes on with the other"
    FluxFillPipeline.from_pretrained(out, use_safetensors=True)
    loaders = (
        lambda model: load_transformer(model, dtype=torch.float32),
        lambda model: load_vae(model, device=CPU, dtype=torch.float32),
        lambda model: load_clip(model, device=CPU, dtype=torch.float32)[0],
    )
    for load in loaders:
        expected = load(tiny_model).state_dict()
        assert_equal(load(out).state_dict(), expected)
    assert_equal(t5_of(out), {name: tensor.half().float() for name, tensor in t5_of(tiny_model).items()})
    assert load_file(out / "text_encoder_2" / "model.safetensors")["shared.weight"].dtype == torch.float16


def options(files: dict[str, Path]) -> list[str]:
    return [f"--{name}={path}" for name, path in files.items() if name != "transformer"]


def t5_of(model: Path) -> dict[str, Tensor]:
    return load_t5(model, device=CPU, dtype=torch.float32)[0].state_dict()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def test_parts_without_a_file_are_those_of_the_rest_and_cost_no_room(
    files: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    rest = configs_alone(tiny_model, tmp_path / "rest", "transformer")
    make_folder(files["transformer"], rest, tmp_path / "out")
    for part in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        for path in (rest / part).iterdir():
            assert path.samefile(tmp_path / "out" / part / path.name)


@pytest.mark.parametrize("kind", ["diffusers names", "ComfyUI's prefix", "fp8"])
def test_other_ways_to_store_a_transformer_are_read(
    files: dict[str, Path], tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "diffusers names":
        tensors = load_file(tiny_model / "transformer" / WEIGHTS)
    elif kind == "ComfyUI's prefix":
        tensors = {f"model.diffusion_model.{name}": t for name, t in load_file(files["transformer"]).items()}
    else:
        tensors = {name: t.to(torch.float8_e4m3fn) for name, t in load_file(files["transformer"]).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    make_folder(tmp_path / "a.safetensors", tiny_model, tmp_path / "out", file_bytes=4_000_000)
    assert len(list((tmp_path / "out" / "transformer").glob("*.safetensors"))) > 1
    expected = load_transformer(tiny_model, dtype=torch.float32).state_dict()
    if kind == "fp8":
        expected = {name: tensor.to(torch.float8_e4m3fn).to(torch.bfloat16) for name, tensor in expected.items()}
    dtype = torch.bfloat16 if kind == "fp8" else torch.float32
    assert_equal(load_transformer(tmp_path / "out", dtype=dtype).state_dict(), expected)


def test_a_few_tensors_of_the_transformer_are_held_at_a_time(
    files: dict[str, Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    alive: list[weakref.ref] = []

    def read(opened: TensorFiles, name: str) -> Tensor:
        array = opened._opened[name].get_tensor(name).numpy().copy()  # lives as long as a tensor made of it is held
        alive[:] = [*(known for known in alive if known() is not None), weakref.ref(array)]
        held.append(sum(known().nbytes for known in alive))
        return torch.from_numpy(array)

    monkeypatch.setattr(TensorFiles, "read", read)
    make_folder(files["transformer"], tiny_model, tmp_path / "out")
    assert len(held) > 100 and max(held) < 0.4 * files["transformer"].stat().st_size


def changed(path: Path, to: Path, change: str) -> Path:
    tensors = load_file(path)
    name = sorted(tensors)[5]
    if change == "lacks":
        del tensors[name]
    elif change == "too many":
        tensors["scaled_fp8"] = torch.zeros(1)
    elif change == "shape":
        tensors[name] = torch.cat([tensors[name]] * 2)
    save_file(tensors, to)
    if change == "cut":
        to.write_bytes(to.read_bytes()[:-1])
    return to


@pytest.mark.parametrize("part", ["transformer", "vae", "clip", "t5"])
@pytest.mark.parametrize("change", ["lacks", "too many", "shape", "cut"])
def test_a_file_of_something_else_is_named_and_nothing_is_left(
    files: dict[str, Path], tiny_model: Path, tmp_path: Path, part: str, change: str, capfd: pytest.CaptureFixture
) -> None:
    wrong = changed(files[part], tmp_path / "wrong.safetensors", change)
    given = {**files, part: wrong}
    out = tmp_path / "out"
    assert main([str(given["transformer"]), f"--rest={tiny_model}", f"--out={out}", *options(given)]) == 2
    told = capfd.readouterr().err
    words = {
        "cut": "cannot be read",
        "lacks": "is not th",
        "too many": "is not th",
        "shape": "(is not th|cannot be read)",
    }
    assert re.search(rf"{wrong}: {words[change]}", told), told
    assert {path.name for path in tmp_path.iterdir()} == {"wrong.safetensors"}


def test_a_dev_is_no_fill(files: dict[str, Path], tiny_dev_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has other shapes for 1: img_in.weight.* a --rest that it belongs to"):
        make_folder(files["transformer"], tiny_dev_model, tmp_path / "out")


def test_a_dev_becomes_a_dev(tiny_dev_model: Path, tmp_path: Path) -> None:
    make_folder(tiny_dev_model / "transformer" / WEIGHTS, tiny_dev_model, tmp_path / "out")
    for path in (tiny_dev_model / "transformer", tiny_dev_model):
        for name in ("config.json", "model_index.json"):
            if (path / name).is_file():
                there = tmp_path / "out" / (path / name).relative_to(tiny_dev_model)
                assert there.read_bytes() == (path / name).read_bytes()
    assert [made.state for made in check_model(tmp_path / "out")[1]] == ["ok"]


def test_a_folder_that_is_there_stays_as_it_is(files: dict[str, Path], tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is there already"):
        make_folder(files["transformer"], tiny_model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(files: dict[str, Path], tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--out .*/vae.safetensors/out: cannot be made"):
        make_folder(files["transformer"], tiny_model, files["vae"] / "out")
