from data.remote_copies import Copies


def test_a_copy_that_another_thread_deletes_meanwhile_counts_nothing(tmp_path):
    (tmp_path / "here.copy").write_bytes(b"x" * 100)
    (tmp_path / "gone.copy").symlink_to(tmp_path / "deleted")  # listed, and not there when it is looked at
    assert Copies(tmp_path, 100).are_too_many()
    assert not Copies(tmp_path, 101).are_too_many()
