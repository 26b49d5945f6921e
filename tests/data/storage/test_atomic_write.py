import os
import threading

import numpy as np
import pytest

from data.storage.atomic_write import apply_umask, write_atomically, write_text_atomically


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "table.json"
    write_text_atomically(path, "old")
    before = path.stat().st_ino
    write_text_atomically(path, "über")
    assert path.read_text(encoding="utf-8") == "über"
    assert path.stat().st_ino != before, "it was written over, not replaced: a reader could see half of it"
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "😀" * 63])
def test_a_name_may_have_all_the_bytes_that_the_filesystem_allows(tmp_path, name):
    write_text_atomically(tmp_path / name, "text")
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "table.json"
    write_text_atomically(path, "old")

    def fail_halfway(temporary):
        temporary.write_text("ne")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, fail_halfway)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.json"]


def test_the_name_comes_after_the_content(tmp_path):
    path = tmp_path / "table.json"

    def check_and_write(temporary):
        assert not path.exists()
        assert temporary.parent == path.parent, "a rename from another filesystem copies"
        temporary.write_text("content")

    write_atomically(path, check_and_write)
    assert path.read_text() == "content"


def test_several_writers_of_one_path_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "shard.index"
    texts = [str(number) * 200_000 for number in range(8)]
    errors = []

    def write(text):
        try:
            write_text_atomically(path, text)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert path.read_text() in texts
    assert os.listdir(tmp_path) == ["shard.index"]


def test_what_safetensors_writes_can_be_read_by_whom_the_umask_allows(tmp_path):
    from safetensors.numpy import save_file

    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a.index", lambda temporary: save_file({"a": np.zeros(3)}, temporary))
        save_file({"a": np.zeros(3)}, tmp_path / "adapter.safetensors")
        apply_umask(tmp_path)
    finally:
        os.umask(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.index", "adapter.safetensors"]
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o640
