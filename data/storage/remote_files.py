"""Files on other machines, opened as streams of bytes: https by the standard library, s3 and gs by fsspec."""

import string
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPMessage, HTTPResponse, InvalidURL
from typing import IO, BinaryIO
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit, urlunsplit

import fsspec

from configs.errors import InputError
from configs.urls import problem_with_url, shown

_TIMEOUT_SECONDS = 60  # without a byte
_PASSING = (408, 425, 429)  # of the answers that blame the request: too late, too early, too many
_EXTRAS = {"s3": "s3", "gs": "gcs"}  # scheme -> extra of this package that brings its fsspec driver


def check_url(url: str, where: str) -> None:
    """Raise InputError, naming `where` it stands, unless the URL is of an allowed scheme and plain."""
    if problem := problem_with_url(url):
        raise InputError(f"{where} is {shown(url)}, but {problem}.")


@contextmanager
def open_url(url: str) -> Iterator[BinaryIO | IO[bytes]]:
    """A file's bytes from its beginning, to be read once.

    Raises InputError for a URL that is not allowed, whose driver is not installed, or that the storage does not have or
    does not give; whatever else the network does comes as OSError or as the driver's own exceptions, and is worth a
    retry (`retry.py`). A server may end early without an error: see `refuse_short`, or compare with the checksum that
    you know.
    """
    check_url(url, "a URL")
    if url.partition("://")[0] not in _EXTRAS:
        with _open_https(url) as file:
            yield file
        return
    with _driver_of(url):
        opened = fsspec.open(url, "rb").open()
    with opened as file:
        yield file


def _open_https(url: str, **headers: str) -> HTTPResponse:
    try:
        return _opener.open(urllib.request.Request(_encoded(url), headers=headers), timeout=_TIMEOUT_SECONDS)
    except (ValueError, InvalidURL) as error:
        raise InputError(f"{shown(url)}: no URL ({error}). Correct it.") from error
    except HTTPError as error:
        if 400 <= error.code < 500 and error.code not in _PASSING:
            raise InputError(
                f"{shown(url)}: the server answers {error.code} {error.reason}. Correct the URL."
            ) from error
        raise


def _encoded(url: str) -> str:
    """A URL as it may be sent: spaces and what is not ASCII as %XX; what is encoded already stays."""
    parts = urlsplit(url)
    path, query = (quote(part, safe=string.punctuation) for part in (parts.path, parts.query))
    return urlunsplit(parts._replace(path=path, query=query, fragment=""))


@contextmanager
def _driver_of(url: str) -> Iterator[None]:
    """Turns the lack of a URL's driver, of its file and of the right to read it into messages."""
    scheme = url.partition("://")[0]
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{shown(url)}: {scheme}:// needs a driver that is not installed ({error}). "
            f"Run `pip install 'fluxfill[{_EXTRAS[scheme]}]'`."
        ) from error
    except (FileNotFoundError, PermissionError) as error:
        raise InputError(
            f"{shown(url)}: not there, or closed to you ({error}). Correct the URL, or log in as its driver wants it."
        ) from error


def read_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` on, fewer where it ends before. Raises as `open_url` does."""
    check_url(url, "a URL")
    if url.partition("://")[0] in _EXTRAS:
        with _driver_of(url):
            filesystem, path = fsspec.core.url_to_fs(url)
            return bytes(filesystem.cat_file(path, start=offset, end=offset + size))
    with _open_https(url, Range=f"bytes={offset}-{offset + size - 1}") as file:
        if file.status != 206 and offset:  # a server that knows no ranges begins at the beginning
            for begin in range(0, offset, 1 << 20):
                file.read(min(1 << 20, offset - begin))
        data = file.read(size)
        if len(data) < size:
            refuse_short(file)
        return data


def refuse_short(file: BinaryIO | IO[bytes]) -> None:
    """Raise OSError if a file over https, read to its end, had fewer bytes than its server announced."""
    if isinstance(file, HTTPResponse) and file.length:
        raise OSError(f"the connection ended {file.length} bytes early")


def url_stamp(url: str) -> str | None:
    """What changes when a file changes, as its storage tells it (ETag or time, and size); None if it tells nothing.

    Raises as `open_url` does.
    """
    check_url(url, "a URL")
    if url.partition("://")[0] in _EXTRAS:
        with _driver_of(url):
            filesystem, path = fsspec.core.url_to_fs(url)
            found = {key.lower(): value for key, value in filesystem.info(path).items()}
    else:
        # One byte of it, not its HEAD: a signed URL is often good for GET alone.
        with _open_https(url, Range="bytes=0-0") as answer:
            found = {key.lower(): value for key, value in answer.headers.items()}
        found["size"] = found.get("content-range") or found.get("content-length")
    version = found.get("etag") or found.get("last-modified") or found.get("lastmodified") or found.get("updated")
    return None if version is None else f"{version} {found.get('size')}"


class _StayWithinSchemes(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to where one may go directly: not from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        check_url(newurl, f"{shown(req.full_url)} redirects; its target")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_opener = urllib.request.build_opener(_StayWithinSchemes)  # with the proxies of the environment
