"""Which URLs data may come from: an allow-list, checked before anything is opened.

fsspec and WebDataset know schemes that run commands (pipe:), read local files (file:) or chain others (simplecache::);
a config or a list of pictures from somebody else must not reach them.
"""

import re
from urllib.parse import urlsplit

SCHEMES = ("https", "s3", "gs")


def is_url(place: object) -> bool:
    """Whether a place is written as a URL of any scheme, allowed or not; else it is a path, as C:/pictures is."""
    return isinstance(place, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", place) is not None


def shown(place: str) -> str:
    """A path or URL as messages show it: without a URL's query, which may hold a token, and its user and password."""
    if not is_url(place):
        return place
    scheme, separator, rest = place.partition("://")
    if not separator:
        return place.partition("?")[0]
    host = re.split("[/?#]", rest, maxsplit=1)[0]
    if "@" in host:
        rest = rest[host.rindex("@") + 1 :]
    elif not _is_port(host):  # a password with a / or ? in it, as S3's keys have
        rest = rest.rpartition("@")[2]
    return f"{scheme}://{rest.partition('?')[0]}"


def _is_port(host: str) -> bool:
    """Whether what stands behind a host's colon may be a port. True if there is none."""
    return re.fullmatch(r"(\[.*\]|[^:]*)(:\d*)?", host) is not None


def problem_with_url(url: str) -> str | None:
    """What keeps a URL from being opened, as the end of a sentence "<place> is <url>, but ..."; None: nothing."""
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in SCHEMES:
        return f"only {', '.join(f'{name}://' for name in SCHEMES)} are read: use one of them, or a folder"
    if re.search(r"[\x00-\x1f\x7f]", url):
        return "it holds a line break, tab or other control character: correct it"
    try:
        parts = urlsplit(url)
    except ValueError as error:
        return f"it is no URL ({error}): correct it"
    if not _is_port(parts.netloc.rpartition("@")[2]):
        return "what stands behind its host's colon is no port: correct it"
    if not parts.hostname:
        return f"it names no {'host' if scheme == 'https' else 'bucket'}: write {scheme}://NAME/folder"
    if scheme != "https" and "::" in url:
        return "it chains several with ::, which could lead to any scheme: write one"
    if "@" in parts.netloc:
        return "it holds a user or password, which would end up in logs: use the usual credential files"
    return None
