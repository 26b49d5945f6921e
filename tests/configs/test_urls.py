import pytest

from configs.urls import is_url, problem_with_url, shown


@pytest.mark.parametrize(
    "url",
    [
        "https://host/a/b",
        "https://host:8443/a",
        "https://[::1]:8443/a",
        "https://host:/a",
        "s3://bucket/a",
        "gs://bucket",
        "s3://bucket",
    ],
)
def test_plain_urls_of_the_list_are_allowed(url):
    assert is_url(url)
    assert problem_with_url(url) is None


@pytest.mark.fault(27, "URLs of other schemes, and chains of them")
@pytest.mark.parametrize(
    "url",
    [
        "pipe:cat /etc/passwd",
        "pipe://cat",
        "file:///etc/passwd",
        "http://host/a",
        "ftp://host/a",
        "memory://a",
        "HTTPS://host/a",
        "simplecache::https://host/a",
        "zip://a::https://host/b",
        "github://user:repo@/a",
        "data:text/plain,a",
    ],
)
def test_other_schemes_and_chains_are_refused(url):
    assert is_url(url)
    assert "only https://, s3://, gs:// are read: use one of them, or a folder" in problem_with_url(url)


@pytest.mark.parametrize(
    "url, problem",
    [
        ("https:///a", "it names no host"),
        ("s3://bucket/a::file:///etc/passwd", "it chains several with ::"),
        ("s3://", "it names no bucket: write s3://NAME/folder"),
        ("https://user:secret@host/a", "it holds a user or password"),
        ("https://[host/a", "it is no URL"),
        ("https://host:port/a", "what stands behind its host's colon is no port"),
        ("s3://key:sec/ret@bucket/a.tar", "what stands behind its host's colon is no port"),
    ],
)
def test_what_is_wrong_with_a_url_is_said(url, problem):
    assert problem in problem_with_url(url)


@pytest.mark.parametrize(
    "path", ["data/cache", "/data/cache", "C:/data/cache", "d:\\data", "./a:b", "a b", "", None, 3]
)
def test_paths_are_no_urls(path):
    assert not is_url(path)


@pytest.mark.parametrize(
    "place, expected",
    [
        ("https://host/a.tar?token=secret", "https://host/a.tar"),
        ("https://host:8443/a.tar", "https://host:8443/a.tar"),
        ("https://[::1]:8443/@me/a.tar", "https://[::1]:8443/@me/a.tar"),
        ("https://host/@me/a.tar", "https://host/@me/a.tar"),
        ("https://user:secret@host/a.tar", "https://host/a.tar"),
        ("https://secret@host:80/a@b.tar", "https://host:80/a@b.tar"),
        ("https://user:sec@ret@host/a", "https://host/a"),
        ("s3://key:sec/ret@bucket/a.tar", "s3://bucket/a.tar"),
        ("https://user:sec?ret@host/a", "https://host/a"),
        ("https://user:secret@host?token=secret", "https://host"),
        ("s3://bucket/a@b.tar", "s3://bucket/a@b.tar"),
        ("pipe:cat a?token=secret", "pipe:cat a"),
        ("a?b.tar", "a?b.tar"),
        ("a@b.tar", "a@b.tar"),
    ],
)
def test_a_url_is_shown_without_secrets(place, expected):
    assert shown(place) == expected
