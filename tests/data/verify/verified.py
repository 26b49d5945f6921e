"""A cache as `verify` judges it, for the tests of every part of that."""

from pathlib import Path

from data.verify.cache import CheckedCache, verify_cache

SHARDS = [("photos", "48x64", 5), ("photos", "48x64", 5), ("photos", "32x32", 4, "holdout"), ("removal", "48x64", 1)]
BAD = "shards/photos/48x64-000001.tar"  # the one that is damaged; its samples are photos-1-0 to photos-1-4
INDEX = "index/photos/48x64-000001.index"
MIDDLE = "photos-1-2"


def verify(folder: Path, threads: int = 2) -> CheckedCache:
    return verify_cache(folder, threads=threads, start=lambda _: None, advance=lambda _: None)


def found(folder: Path) -> list[tuple[str, str, str]]:
    return [(problem.path, problem.member, problem.what) for problem in verify(folder).problems]
