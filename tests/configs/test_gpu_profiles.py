import re
import shutil
from pathlib import Path

import pytest

from configs.errors import InputError
from configs.gpu_profiles import FOLDER, GpuProfile, gpu_names, load_gpu_profile, own_folder, profile_of_card


def test_the_promised_cards_are_there() -> None:
    assert set(gpu_names()) >= {
        *("rtx3090-24gb", "rtx4090-24gb", "rtx5090-32gb", "a100-40gb", "l40s-48gb", "a100-80gb", "h100-80gb"),
        *("h200-141gb", "b200-180gb", "mi300x-192gb", "24gb", "40gb", "80gb"),
    }


@pytest.mark.parametrize("name", gpu_names())
def test_a_profile_has_the_memory_of_its_name_and_a_source_for_every_figure(name: str) -> None:
    """A page that is named at the top, another profile that has the same figure, or a plain word that there is none."""
    profile = load_gpu_profile(str(FOLDER / f"{name}.yaml"))
    assert f"{profile.memory_gib:g}gb" == name.rpartition("-")[2]
    assert profile.untested
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    pages = set(re.findall(r"^# (\[\d\]) https://\S+", text, re.MULTILINE))
    sources = dict(re.findall(r"^(\w+): \S+ # (\S.*)$", text, re.MULTILINE))
    assert sources.keys() == GpuProfile.model_fields.keys() - {"name", "untested"}
    cited = set()
    for key, source in sources.items():
        named = set(re.findall(r"\[\d\]", source))
        cited |= named
        if other := re.fullmatch(r"as (\S+)", source):
            assert getattr(profile, key) == getattr(load_gpu_profile(other[1]), key)
        elif getattr(profile, key) is not None:
            assert named or "not looked up" in source
    assert cited == pages


def test_a_card_without_cuda_is_amds_and_one_whose_capability_nobody_told_is_not() -> None:
    assert [name for name in gpu_names() if load_gpu_profile(name).is_amd] == ["mi300x-192gb"]
    assert not GpuProfile(name="NVIDIA L4", untested=True, memory_gib=24).is_amd


@pytest.mark.parametrize("name", gpu_names())
def test_fp8_is_twice_as_fast_as_bf16_where_there_is_any(name: str) -> None:
    """A figure with sparsity beside one without would be four times as high, or the same."""
    profile = load_gpu_profile(name)
    if profile.fp8_tflops is not None:
        assert profile.bf16_tflops is not None
        assert profile.fp8_tflops / profile.bf16_tflops == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize(
    "given, name",
    [
        *[("80GB", "80gb"), ("80", "80gb"), ("80 GiB", "80gb"), ("80G", "80gb"), ("80.0 GB", "80gb")],
        *[("H100-80GB", "h100-80gb"), ("h100", "h100-80gb"), ("RTX 4090", "rtx4090-24gb")],
    ],
)
def test_a_name_is_found_in_any_spelling_and_by_its_beginning(given: str, name: str) -> None:
    assert load_gpu_profile(given) == load_gpu_profile(name)


@pytest.mark.parametrize(
    "given, message",
    [
        ("a100", "several GPUs have that name. Take one of: a100-40gb, a100-80gb"),
        ("h100-81gb", "there is no such GPU. Nearest: h100-80gb"),
        ("foo", f"there is no such GPU. Known: {', '.join(gpu_names())}. For"),
        ("./none.yaml", "none.yaml: there is no such file. Give the path of a GPU's profile"),
        ("16GB", "there is no such GPU. Nearest: 24gb, 40gb, 80gb. For"),
        ("70 GiB", "there is no such GPU. Nearest: 80gb, 40gb, 24gb. For"),
        ("28", "there is no such GPU. Nearest: 24gb, 40gb, 80gb. For"),
        ("48GB", "there is no such GPU. Nearest: l40s-48gb. For"),
        ("32 GiB", "there is no such GPU. Nearest: rtx5090-32gb. For"),
        ("8GB", "there is no such GPU. Nearest: 24gb, 40gb, 80gb. For"),
        ("8", "there is no such GPU. Nearest: 24gb, 40gb, 80gb. For"),
        ("8.0GB", "there is no such GPU. Nearest: 24gb, 40gb, 80gb. For"),
        ("41GB", "there is no such GPU. Nearest: 40gb, 24gb, 80gb. For"),
        ("2GB", "there is no such GPU. Nearest: 24gb, 40gb, 80gb. For"),
        ("4090", "there is no such GPU. Nearest: rtx4090-24gb. For"),
        ("100", "there is no such GPU. Nearest: a100-40gb, a100-80gb, h100-80gb. For"),
        ("", "there is no such GPU"),
        ("nowhere/card.yaml", "nowhere/card.yaml: there is no such file"),
    ],
)
def test_another_name_is_refused_with_the_nearest(given: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_gpu_profile(given)


def test_a_file_of_ones_own_is_read_or_refused_with_every_problem(tmp_path: Path) -> None:
    path = tmp_path / "card.yaml"
    path.write_text("name: My card\nuntested: false\nmemory_gib: 16\n")
    assert load_gpu_profile(str(path)) == GpuProfile(name="My card", untested=False, memory_gib=16)
    path.write_text("name: My card\nmemory_gib: 0\nbf16_tflop: 3\n")
    with pytest.raises(InputError) as caught:
        load_gpu_profile(str(path))
    text = str(caught.value)
    assert f"{path}:2: memory_gib is 0, but must be a number above 0" in text
    assert f"{path}:3: bf16_tflop" in text and "Did you mean bf16_tflops?" in text
    assert "untested" in text


def test_a_file_dropped_among_ones_own_is_found_by_name_and_goes_before_a_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    own = tmp_path / "fluxfill" / "gpus"
    own.mkdir(parents=True)
    shutil.copy(FOLDER / "a100-40gb.yaml", own / "lab.yaml")
    assert load_gpu_profile("LAB") == load_gpu_profile("a100-40gb") and "lab" not in gpu_names()
    shutil.copy(FOLDER / "a100-40gb.yaml", own / "h100-80gb.yaml")
    assert load_gpu_profile("h100").memory_gib == 40
    monkeypatch.setenv("XDG_CONFIG_HOME", "")  # as if it were not set
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert own_folder() == tmp_path / "home" / ".config" / "fluxfill" / "gpus"


@pytest.mark.parametrize(
    "name, gib, profile",
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "h100-80gb"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", 79.2, "a100-80gb"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090-24gb"),
        ("NVIDIA L40S", 44.4, "l40s-48gb"),
        ("NVIDIA RTX A6000", 47.5, "40gb"),  # has none
        ("NVIDIA H1000", 200.0, "80gb"),
    ],
)
def test_a_card_is_known_by_its_drivers_name_or_by_its_memory(name: str, gib: float, profile: str) -> None:
    expected = load_gpu_profile(profile)
    assert profile_of_card(name, gib) == expected.model_copy(update={"memory_gib": gib})
