"""A model from a hub: what is missing of one commit is downloaded, and every file compared with the hub's checksum."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from configs.errors import InputError, StorageFailed, is_of_storage
from data.encoders.model_folder import hub_patterns
from data.storage.disk_full import FINISHED_IS_KEPT, raise_disk_full
from launch.check.paths import existing

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

OWNER = "black-forest-labs"  # of the FLUX.1 models, which may be called without it


class Fetched(NamedTuple):
    """A model that is here, and the commit that it is."""

    folder: Path
    commit: str


def full_name(name: str) -> str:
    """The hub id of a model: FLUX.1-Fill-dev is black-forest-labs/FLUX.1-Fill-dev."""
    return f"{OWNER}/{name}" if name.lower().startswith("flux.1-") else name


def fetch_from_hub(
    name: str, *, revision: str | None = None, out: Path | None = None, without_weights: Collection[str] = ()
) -> Fetched:
    """Download what is missing of a model, and compare all of it with the hub's checksums.

    name: "owner/model".  revision: a branch, tag or commit; None: the newest.  out: a folder to write; None: the hub
    cache, where runs find the newest by its name.  without_weights: parts of which the config alone is wanted.
    Of what was interrupted, whole files are kept. A file that is damaged is downloaded once more.
    Raises InputError if the hub refuses it or there is no room, StorageFailed if the hub or the network fails.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.utils import tqdm

    class NoBar(tqdm):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings | {"disable": True})

    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{name}: HF_HUB_OFFLINE is set, and this needs a network. Unset it for `fluxfill fetch`.")
    patterns = hub_patterns(without_weights)
    with _told(name, revision):
        # Asked first and by itself: snapshot_download takes a refusal for a network that is down.
        commit = HfApi().model_info(name, revision=revision).sha
        assert commit is not None
        planned = snapshot_download(
            name, revision=commit, local_dir=out, allow_patterns=patterns, dry_run=True, tqdm_class=NoBar
        )
    if not planned:
        raise InputError(f"{name}: holds no model in diffusers' layout ({', '.join(patterns[:2])}, ...). Give another.")
    needed = sum(file.file_size or 0 for file in planned if file.will_download)
    place = Path(out or constants.HF_HUB_CACHE)
    refuse_full_disk(place, needed, "Give --out on another disk, or set HF_HOME.")
    total = sum(file.file_size or 0 for file in planned)
    typer.echo(f"{name}: commit {commit}, {len(planned)} files, {_gib(total)}, of which {_gib(needed)} are not here")
    for is_last in (False, True):
        with _told(name, revision), writing(place, needed):
            # By the branch's name where it stays in the cache: without one, only a commit is found offline.
            wanted = commit if out else revision
            folder = Path(snapshot_download(name, revision=wanted, local_dir=out, allow_patterns=patterns))
            commit = commit if out else folder.name  # a branch may have moved on meanwhile
            typer.echo(f"{folder}: comparing {_gib(total)} with the hub's checksums", err=True)
            damaged = _damaged(name, commit, out)
        if not damaged:
            return Fetched(folder, commit)
        if is_last:
            raise StorageFailed(
                f"{folder / damaged[0]}: is not what {constants.ENDPOINT} says it is, by its checksum, nor was it when "
                "downloaded again. Look at the disk and at HF_ENDPOINT, then run the same command again."
            )
        for path in damaged:
            typer.echo(f"{path}: is damaged, and is downloaded again", err=True)
            (folder / path).resolve().unlink()  # in the cache the file that a link leads to
            (folder / path).unlink(missing_ok=True)
    raise AssertionError("unreachable")


def refuse_full_disk(place: Path, needed: int, cure: str) -> None:
    """Raises InputError if there is no room for `needed` bytes where `place` is or will be."""
    there = existing(place.expanduser().absolute())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise InputError(f"{place}: {_gib(needed)} are to be written, and {_gib(free)} are free in {there}. {cure}")


@contextmanager
def writing(place: Path, needed: int) -> Iterator[None]:
    """Turns what a disk refuses into a message. Raises DiskFull or InputError, naming `place`."""
    try:
        with raise_disk_full(place, needed=needed, kept=FINISHED_IS_KEPT):
            yield
    except OSError as error:
        if isinstance(error, InputError) or is_of_storage(error):  # or of the hub
            raise
        raise InputError(f"{place}: cannot be written ({error}). Give --out elsewhere.") from error


def _damaged(name: str, commit: str, out: Path | None) -> list[str]:
    """Files whose sha256, or git hash where the hub knows no other, is not the hub's."""
    from huggingface_hub import HfApi

    verified = HfApi().verify_repo_checksums(name, revision=commit, local_dir=out)
    return [file["path"] for file in verified.mismatches]


@contextmanager
def _told(name: str, revision: str | None) -> Iterator[None]:
    """Turns what huggingface_hub raises into what to do."""
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        yield
    except HFValidationError as error:
        raise InputError(f"{name}: no hub id ({error}). Give owner/model, a folder or a .safetensors file.") from error
    except InputError:
        raise
    except (HTTPError, OSError, RuntimeError) as error:  # hf_xet's are RuntimeErrors
        if (refused := _refusal(error)) is not None and (message := _of_refusal(refused, name, revision)):
            raise InputError(message) from error
        raise StorageFailed(_of_failure(refused or error, name)) from error


def _refusal(error: BaseException) -> HfHubHTTPError | None:
    """What the hub answered, which huggingface_hub may have wrapped in advice."""
    from huggingface_hub.errors import HfHubHTTPError

    cause: BaseException | None = error
    while cause is not None and (not isinstance(cause, HfHubHTTPError) or cause.response is None):
        cause = cause.__cause__
    return cause


def _of_refusal(error: HfHubHTTPError, name: str, revision: str | None) -> str | None:
    """What to do about an answer that the next attempt will get too; None: about one that it need not get."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    page, status = f"{constants.ENDPOINT}/{name}", error.response.status_code
    login = "log in with `hf auth login`, or set HF_TOKEN in the environment"
    is_known = get_token() is not None
    if isinstance(error, GatedRepoError):
        if not is_known:
            return f"{name}: is gated, and nobody is logged in. Accept its licence on {page}, {login}, and try again."
        return (
            f"{name}: is gated, and the account that is logged in has no access. Accept its licence on {page} by that "
            "account; a token of limited rights needs the one to read gated repositories."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"--revision {revision}: {name} has no such branch, tag or commit. {page}/commits/main lists them."
    # A hub hides what there is from who is not logged in.
    if isinstance(error, RepositoryNotFoundError) or (status == 401 and not is_known):
        private = "" if is_known else f"; a private or gated one is shown to its users alone: {login}"
        return f"{name}: {constants.ENDPOINT} knows no such model (answer {status}). Look at the spelling{private}."
    if status == 401:
        return f"{name}: {constants.ENDPOINT} refuses the token (answer 401). Once more {login}."
    if status in (400, 403, 404, 410, 451):
        return (
            f"{name}: {constants.ENDPOINT} does not hand out {error.response.url.path} (answer {status}). Look at "
            f"{page} in a browser, and at HF_ENDPOINT if it names a mirror."
        )
    return None


def _of_failure(error: BaseException, name: str) -> str:
    from huggingface_hub import constants

    what = (str(error).strip().splitlines() or [""])[0]
    return (
        f"{name}: cannot be had from {constants.ENDPOINT} ({type(error).__name__}: {what}). Run the same command "
        "again: files that are whole are kept. Behind a firewall set HTTPS_PROXY, or HF_ENDPOINT to a mirror; else "
        "fetch on a machine with a network and the same HF_HOME."
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
