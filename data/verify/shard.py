"""Verification of one shard: its tar, its index, and its row of the cache's table."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError
from data.cache.members import Tensors
from data.cache.shard_index import ShardIndex, count_hole_fractions, read_index
from data.cache_layout import index_path
from data.verify.tar import Problem, TarWalk

_READ_AHEAD = 1 << 20


@dataclass(frozen=True)
class ExpectedShard:
    """A shard as the cache's manifest and table describe it.

    path: below the cache folder.  format_version: of the cache.  sha256, size: of the tar, or None without a manifest:
    the shard's index tells them.  samples, variants, plan: None without a manifest.  tensors: kind of member (LATENTS,
    MASKED, TEXT) -> what it holds; empty without a manifest.
    """

    path: str
    format_version: int
    sha256: str | None = None
    size: int | None = None
    samples: int | None = None
    variants: int | None = None
    plan: str | None = None
    tensors: Mapping[str, Tensors] | None = None


@dataclass(frozen=True)
class IntactTar:
    """A tar whose bytes are those that were written.  plan: hash of its samples."""

    path: str
    sha256: str
    plan: str


@dataclass(frozen=True)
class CheckedShard:
    """Outcome of `check_shard`.

    problems: none if all is well.  intact: the tar, if its bytes are those that were written.  hole_fractions: counts
    per tenth of the area, None if the index is of no use.
    """

    problems: list[Problem]
    intact: IntactTar | None
    hole_fractions: list[int] | None


def check_shard(cache: Path, expected: ExpectedShard, advance: Callable[[int], None]) -> CheckedShard:
    """Read all of a shard and list its problems.  advance: called with the number of bytes that were read."""
    tar = cache / expected.path
    index, index_problems = _check_index(cache, expected)
    sha256 = expected.sha256 or (index.tar_sha256 if index else None)
    if sha256 is None:
        what = "neither the cache's manifest nor an index tells its sha256: preprocessing was interrupted here"
        return CheckedShard([Problem(expected.path, "", what), *index_problems], None, None)
    holes = None if index is None else count_hole_fractions([index])
    size = expected.size if expected.size is not None else index.tar_bytes if index else None
    try:
        with io.BufferedReader(io.FileIO(tar), _READ_AHEAD) as file:
            walk = TarWalk(file, expected.path, expected.tensors or {}, index, advance)
            problems = walk.check()
    except FileNotFoundError:
        return CheckedShard([Problem(expected.path, "", "missing"), *index_problems], None, holes)
    except OSError as error:
        unreadable = Problem(expected.path, "", f"cannot be read ({error.strerror})")
        return CheckedShard([unreadable, *index_problems], None, holes)
    is_intact = walk.sha256.hexdigest() == sha256 and walk.position == size
    if not is_intact and walk.position != size:
        problems.insert(0, Problem(expected.path, "", f"{walk.position} bytes, {size} were written"))
    elif not is_intact and not problems:
        where = "outside of its members' data" if index else "and without its index nothing tells where"
        problems.append(Problem(expected.path, "", f"its sha256 differs, {where}"))
    if is_intact:  # so it is the index that is wrong
        name = index_path(Path(expected.path), expected.format_version).as_posix()
        problems = [Problem(name, problem.member, f"does not fit its shard: {problem.what}") for problem in problems]
    plan = expected.plan or (index.plan if index else "")
    intact = IntactTar(expected.path, sha256, plan) if is_intact and not walk.misfits else None
    return CheckedShard(index_problems + problems + walk.misfits, intact, holes)


def _check_index(cache: Path, expected: ExpectedShard) -> tuple[ShardIndex | None, list[Problem]]:
    """A shard's index if the shard may be read by it, and its problems."""
    name = index_path(Path(expected.path), expected.format_version).as_posix()
    path = cache / name
    try:
        index = read_index(path)
    except FileNotFoundError:
        return None, [Problem(name, "", "missing")]
    except (InputError, OSError) as error:
        reason = str(error).removeprefix(f"{path}: ").partition(". ")[0]
        return None, [Problem(name, "", reason)]
    if expected.sha256 is not None and index.tar_sha256 != expected.sha256:
        return None, [Problem(name, "", "belongs to another shard")]
    variants = index.masked.shape[1]
    said = (
        ("samples", expected.samples, index.num_samples),
        ("mask variants", expected.variants, variants),
        ("plan", expected.plan, index.plan),
        ("bytes", expected.size, index.tar_bytes),
    )
    wrong = [
        f"{what} {found}, the manifest says {should}" for what, should, found in said if should not in (None, found)
    ]
    return index, [Problem(name, "", what) for what in wrong]
