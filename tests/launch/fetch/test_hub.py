import errno
import os
import shutil
import time
from pathlib import Path

import pytest

from configs.errors import InputError, StorageFailed
from data.encoders.model_folder import find_model
from launch.check.model import check_model, find_local_model
from launch.fetch.hub import fetch_from_hub, full_name, refuse_full_disk, writing
from tests.launch.fetch.hub_server import COMMIT, NAME, TOKEN, Hub
from tests.patience import PATIENCE

LARGE = "transformer/diffusion_pytorch_model.safetensors"


def fetched_files(folder: Path) -> dict[str, bytes]:
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in files.items() if not name.startswith(".cache/")}


def needed_files(hub: Hub) -> dict[str, bytes]:
    strange = ("flux1-fill-dev.safetensors", "README.md", "vae/diffusion_pytorch_model.bin")
    return {name: data for name, data in hub.files().items() if name not in strange}


def test_the_files_that_a_run_needs_are_fetched_and_found_offline_by_the_models_name(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, commit = fetch_from_hub(NAME)
    assert commit == COMMIT and fetched_files(folder) == needed_files(hub)
    hub.close()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_model(NAME) == folder == find_local_model(NAME)[0]
    assert [made.state for made in check_model(folder)[1]] == ["ok"]


def test_a_folder_of_ones_own_is_filled_and_what_is_there_is_not_sent_again(hub: Hub, tmp_path: Path) -> None:
    folder, _ = fetch_from_hub(NAME, out=tmp_path / "out")
    assert folder == tmp_path / "out" and fetched_files(folder) == needed_files(hub)
    hub.sent.clear()
    (folder / "vae" / "config.json").unlink()
    fetch_from_hub(NAME, out=folder)
    assert set(hub.sent) == {"vae/config.json"}


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_a_revision_is_fetched_by_name_or_commit(hub: Hub, revision: str) -> None:
    folder, commit = fetch_from_hub(NAME, revision=revision)
    assert (folder.name, commit) == (COMMIT, COMMIT) and fetched_files(folder) == needed_files(hub)


def test_a_transfer_that_breaks_off_goes_on_where_it_was(hub: Hub) -> None:
    hub.faults[LARGE] = ["cut"]
    folder, _ = fetch_from_hub(NAME)
    assert fetched_files(folder) == needed_files(hub)
    assert hub.sent[LARGE] < 1.2 * len(hub.files()[LARGE])  # what was not yet on the disk is sent twice


def test_a_download_that_failed_keeps_the_files_that_are_whole(hub: Hub, tmp_path: Path) -> None:
    def fail_once_another_is_whole() -> int:
        deadline = time.monotonic() + PATIENCE
        while not any(path.is_file() for path in tmp_path.glob("cache/*/snapshots/**/*")):
            assert time.monotonic() < deadline, "no other file came"
            time.sleep(0.01)
        return 500

    hub.faults[LARGE] = [fail_once_another_is_whole]
    with pytest.raises(StorageFailed, match=rf"{NAME}: cannot be had from {hub.url} .*500.* the same command"):
        fetch_from_hub(NAME)
    before = dict(hub.sent)
    assert LARGE not in before
    folder, _ = fetch_from_hub(NAME)
    assert fetched_files(folder) == needed_files(hub)
    # threads that were at work when it failed may have been cut off
    assert [name for name, size in before.items() if hub.sent[name] == size]


@pytest.mark.parametrize("own", [False, True], ids=["cache", "folder"])
def test_damage_is_found_by_its_checksum_and_fetched_again(hub: Hub, tmp_path: Path, own: bool) -> None:
    hub.faults[LARGE] = ["flip"]
    folder, _ = fetch_from_hub(NAME, out=tmp_path / "out" if own else None)
    assert fetched_files(folder) == needed_files(hub) and hub.sent[LARGE] == 2 * len(hub.files()[LARGE])
    damaged = (folder / "vae" / "config.json").resolve()
    damaged.write_bytes(damaged.read_bytes().replace(b"1", b"2"))  # on this disk, later
    fetch_from_hub(NAME, out=tmp_path / "out" if own else None)
    assert fetched_files(folder) == needed_files(hub)


def test_a_hub_whose_files_are_not_what_it_lists_is_named(hub: Hub) -> None:
    hub.faults[LARGE] = ["flip", "flip"]
    with pytest.raises(StorageFailed, match=rf"{LARGE}: is not what {hub.url} says it is, .* HF_ENDPOINT"):
        fetch_from_hub(NAME)


def test_a_gated_model_says_where_to_accept_the_licence_and_how_to_log_in(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated = True
    with pytest.raises(InputError, match=rf"nobody is logged in. Accept its licence on {hub.url}/{NAME}, .*HF_TOKEN"):
        fetch_from_hub(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(InputError, match=rf"has no access. Accept its licence on {hub.url}/{NAME} by that") as refused:
        fetch_from_hub(NAME)
    assert "hf_of_another" not in str(refused.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetched_files(fetch_from_hub(NAME).folder) == needed_files(hub)
    assert TOKEN in hub.asked
    assert not [path for path in Path(hub.folder.parent).rglob("*") if path.is_file() and TOKEN in read_text(path)]


def read_text(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


def test_a_token_that_is_refused_and_a_model_that_is_not_there_are_told_apart(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"someone/unknown: .* knows no such model \(answer 401\).* `hf auth login`"):
        fetch_from_hub("someone/unknown")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(InputError, match=r"knows no such model \(answer 404\). Look at the spelling.$"):
        fetch_from_hub("someone/unknown")
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(InputError, match=r"refuses the token \(answer 401\)"):
        fetch_from_hub(NAME)


def test_a_revision_that_is_not_there_is_named(hub: Hub) -> None:
    with pytest.raises(InputError, match=rf"--revision v9: {NAME} has no such .* {hub.url}/{NAME}/commits/main"):
        fetch_from_hub(NAME, revision="v9")


@pytest.mark.parametrize("status", [403, 404])
def test_a_file_that_is_not_handed_out_is_named(hub: Hub, status: int) -> None:
    hub.faults[LARGE] = [status]
    with pytest.raises(InputError, match=rf"does not hand out .*{LARGE} \(answer {status}\).* HF_ENDPOINT"):
        fetch_from_hub(NAME)


def test_a_hub_that_is_not_there_is_no_mistake_of_the_user(hub: Hub) -> None:
    hub.close()
    with pytest.raises(StorageFailed, match=rf"{NAME}: cannot be had from {hub.url} .* HF_ENDPOINT to a mirror"):
        fetch_from_hub(NAME)


def test_offline_nothing_is_tried(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        fetch_from_hub(NAME)
    assert not hub.asked


def test_a_repository_without_diffusers_layout_is_named(hub: Hub) -> None:
    for path in sorted(hub.folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.name == "README.md" or path.unlink()
    with pytest.raises(InputError, match="holds no model in diffusers' layout"):
        fetch_from_hub(NAME)


def test_a_disk_without_room_is_told_before_anything_is_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("launch.fetch.hub.shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"GiB are to be written, and 0.00 GiB are free in .* HF_HOME"):
        fetch_from_hub(NAME)
    assert not hub.sent


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_refuses_is_named(tmp_path: Path, number: int) -> None:
    told = rf"{tmp_path}: cannot be written .*{os.strerror(number)}"
    with pytest.raises(InputError, match=told), writing(tmp_path, 1):
        raise OSError(number, os.strerror(number))


def test_room_is_looked_for_where_the_folder_will_be(tmp_path: Path) -> None:
    refuse_full_disk(tmp_path / "not" / "yet", 1, "")
    with pytest.raises(InputError, match=rf"free in {tmp_path}\. Free some"):
        refuse_full_disk(tmp_path / "not" / "yet", 2**62, "Free some.")


def test_of_parts_that_are_given_the_config_alone_is_fetched(hub: Hub) -> None:
    folder, _ = fetch_from_hub(NAME, without_weights=("transformer", "vae"))
    found = fetched_files(folder)
    assert found == {
        name: data
        for name, data in needed_files(hub).items()
        if not name.startswith(("transformer/", "vae/")) or name.endswith("/config.json")
    }
    assert find_local_model(NAME)[0] is None  # no whole model for a run


def test_blacks_forest_labs_own_models_need_no_owner() -> None:
    assert full_name("FLUX.1-Fill-dev") == NAME == full_name(NAME)
    assert full_name("someone/flux.1-tuned") == "someone/flux.1-tuned"
