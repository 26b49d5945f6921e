import io
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from configs.data_schema import DataConfig
from configs.errors import InputError
from data.sources.download_cache import DownloadCache
from data.sources.problems import Findings
from data.sources.scan import scan_dataset


def test_a_copy_that_another_thread_deletes_meanwhile_counts_nothing(tmp_path):
    (tmp_path / "here.copy").write_bytes(b"x" * 100)
    (tmp_path / "gone.copy").symlink_to(tmp_path / "deleted")  # listed, and not there when it is looked at
    assert DownloadCache(tmp_path, 100).are_too_many()
    assert not DownloadCache(tmp_path, 101).are_too_many()


@pytest.fixture
def served(serve_folder, tmp_path):
    """(URL, requests) of a folder with a file of 1000 bytes."""
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "a.tar").write_bytes(b"x" * 1000)
    url, requests = serve_folder(tmp_path / "server")
    return f"{url}/a.tar", requests


@pytest.mark.parametrize("limit, kept", [(1001, True), (1000, False)])
def test_a_copy_stays_where_there_is_room(served, tmp_path, limit, kept):
    url, requests = served
    copies = DownloadCache(tmp_path / "copies", limit)
    for _ in range(2):
        with copies.local(url, "1") as file:
            assert file.read_bytes() == b"x" * 1000
        assert copies.path(url, "1", ".copy").exists() == kept
    assert len(requests) == (1 if kept else 2)
    assert len(list(copies.folder.iterdir())) == kept


def test_what_was_read_with_a_fault_is_fetched_again(served, tmp_path):
    url, requests = served
    copies = DownloadCache(tmp_path / "copies", 2000)
    with pytest.raises(InputError), copies.local(url, "1"):
        raise InputError("damaged")
    with copies.local(url, "1"):
        pass
    with pytest.raises(InputError), copies.local(url, "1"):
        raise InputError("damaged since")
    with copies.local(url, "1") as file:
        assert file.read_bytes() == b"x" * 1000
    assert len(requests) == 3


@pytest.mark.parametrize("first_to_leave", [0, 1])
@pytest.mark.parametrize("limit", [0, 1500, 9999])
def test_nobody_takes_the_copy_of_another(served, tmp_path, limit, first_to_leave):
    url, _ = served
    copies = DownloadCache(tmp_path / "copies", limit)
    blocks = [copies.local(url, "1"), copies.local(url, "1")]
    files = [block.__enter__() for block in blocks]
    for number in (first_to_leave, 1 - first_to_leave):
        assert files[number].read_bytes() == b"x" * 1000
        blocks[number].__exit__(None, None, None)


@pytest.mark.parametrize("copies_gib", [0, 1e-4, 1])
def test_scanners_of_one_tar_do_not_disturb_each_other(serve_folder, tmp_path, copies_gib):
    """Several at once, each a little later than the one before; with room for no copy, for some, and for all."""
    pictures = {}
    for number in range(100):
        noise = np.random.default_rng(number).integers(0, 256, (16, 24, 3), dtype=np.uint8)
        for role, pixels in (("", noise), (".mask", np.where(noise[..., 0] > 127, 255, 0).astype(np.uint8))):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            pictures[f"{number}{role}.png"] = file.getvalue()
        pictures[f"{number}.txt"] = b"a caption, which is read from the copy alone"
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in pictures.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    url, _ = serve_folder(tmp_path)
    dataset = {"name": "photos", "tars": f"{url}/a.tar"}
    for trial in range(4):
        config = {"cache": tmp_path / f"cache-{trial}", "datasets": [dataset], "copies_gib": copies_gib}
        data = DataConfig.model_validate(config)

        def run(number, data=data, trial=trial):
            time.sleep(0.02 * number * trial)
            return scan_dataset(data.datasets[0], data, lambda count: None, Findings())

        with ThreadPoolExecutor(3) as pool:
            for scanned in pool.map(run, range(3)):
                assert len(scanned) == 100
                for entry in scanned[:5]:
                    assert entry.item.target.read(1 << 20).content == entry.target.content
        left = [file.suffix for file in (tmp_path / f"cache-{trial}" / "copies").iterdir()]
        assert left == ([".copy"] if copies_gib == 1 else [])
