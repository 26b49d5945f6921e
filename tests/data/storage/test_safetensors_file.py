import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data.storage.safetensors_file import TensorFiles, TensorSpec, write_tensor_dict, write_tensors

TENSORS = {
    "weight": torch.arange(6.0).view(2, 3),
    "half": torch.tensor([1.5, -2.0]).bfloat16(),
    "eighth": torch.tensor([[0.5], [448.0]]).to(torch.float8_e4m3fn),
    "alpha": torch.tensor(3.0),
    "shape": torch.tensor([192, 384]),
    "turned": torch.arange(6.0).view(2, 3).t(),
    "none": torch.zeros(0, 4),
}


def test_safetensors_reads_what_is_written(tmp_path):
    write_tensor_dict(tmp_path / "a.safetensors", TENSORS, {"step": "3"})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].float(), tensor.float())
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "step": "3"}


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    """Whatever order the metadata came in: safetensors' own writer hashes it anew at every call."""
    said = {name: name for name in "abcdefgh"}
    write_tensor_dict(tmp_path / "a.safetensors", TENSORS, said)
    write_tensor_dict(tmp_path / "b.safetensors", TENSORS, dict(reversed(said.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_one_tensor_is_held_at_a_time(tmp_path):
    alive: list[weakref.ref] = []
    most = []

    def read(name):
        tensor = torch.zeros(1000)
        array = tensor.numpy()
        alive.append(weakref.ref(array))
        held = torch.from_numpy(array)
        most.append(sum(known() is not None for known in alive))
        return held

    write_tensors(tmp_path / "a.safetensors", {str(n): TensorSpec(torch.float32, (1000,)) for n in range(20)}, read)
    assert len(most) == 20 and max(most) <= 2


def test_dtypes_are_told_without_reading_and_strange_ones_are_named(tmp_path):
    write_tensor_dict(tmp_path / "a.safetensors", TENSORS)
    files = TensorFiles(tmp_path / "a.safetensors")
    assert {name: files.dtype(name) for name in files.names()} == {name: t.dtype for name, t in TENSORS.items()}
    save_file({"scale": torch.zeros(2, dtype=torch.int8)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="scale is stored as I8"):
        TensorFiles(tmp_path / "b.safetensors").dtype("scale")


@pytest.mark.parametrize("tensor", [torch.zeros(3), torch.zeros(2, 2).bfloat16()])
def test_another_tensor_than_was_said_is_an_error(tmp_path, tensor):
    with pytest.raises(RuntimeError, match=r"x is .* not TensorSpec"):
        write_tensors(tmp_path / "a.safetensors", {"x": TensorSpec(torch.float32, (2, 2))}, lambda _: tensor)


def test_tensors_of_several_files_are_read_by_name(tmp_path):
    write_tensor_dict(tmp_path / "a.safetensors", {"a": torch.ones(2)})
    write_tensor_dict(tmp_path / "b.safetensors", {"b": torch.zeros(3, 1)})
    files = TensorFiles(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert files.names() == ["a", "b"]
    assert torch.equal(files.read("a"), torch.ones(2)) and files.shape("b") == (3, 1)


def test_a_file_that_was_cut_is_told(tmp_path):
    write_tensor_dict(tmp_path / "a.safetensors", TENSORS)
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"a\.safetensors: no whole safetensors file"):
        TensorFiles(tmp_path / "a.safetensors")
