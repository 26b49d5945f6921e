"""A disk that a test can fill: a tmpfs of its own, or, where none can be mounted, a limit on the size of files."""

import resource
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SIZE = 16 << 20
_PAGE = resource.getpagesize()


class SmallDisk:
    """folder: on it.  is_real: it is a disk of 16 MiB, and not a limit that each file has for itself."""

    def __init__(self, folder: Path, *, is_real: bool) -> None:
        self.folder, self.is_real = folder, is_real
        self._ballast = folder.parent / "ballast"

    @contextmanager
    def with_room_for(self, num_bytes: int) -> Iterator[None]:
        """No more than so many bytes can be written in the block, in whole pages (by this process, into one file, where
        the disk is none)."""
        if self.is_real:
            with self._ballast.open("wb", buffering=0) as file:
                try:
                    while file.write(b"\0" * _PAGE) == _PAGE:
                        pass
                except OSError:  # full
                    pass
                file.truncate(file.tell() // _PAGE * _PAGE - num_bytes // _PAGE * _PAGE)
            try:
                yield
            finally:
                self._ballast.unlink()
        else:
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes // _PAGE * _PAGE, before[1]))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def open_small_disk(below: Path) -> Iterator[SmallDisk]:
    """An empty folder on a disk of its own, gone at the end of the block."""
    place = Path(tempfile.mkdtemp(dir=below))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", str(place)]
    try:
        is_real = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        is_real = False
    try:
        folder = place / "disk"
        folder.mkdir()
        yield SmallDisk(folder, is_real=is_real)
    finally:
        if is_real:
            subprocess.run(["umount", "--lazy", str(place)], check=True)
