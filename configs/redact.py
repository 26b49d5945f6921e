"""Text without secrets: for reports that people post where all can read them."""

import re

from configs.urls import shown

HIDDEN = "(hidden)"

_URL = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>`|]+")
# Values behind names that say what they are: "hf_token: abc", WANDB_API_KEY=abc, {"password": "a b"}, Bearer abc. Not
# behind a word that only begins so: "tokens: 4608" and "text_length" are figures.
# Repeats have an end where a line of a log may hold thousands of such characters: no search takes their square.
_NAME = r"""(?<![A-Za-z]) [\w.-]{0,64}
      (?: token | secret | passw(?:or)?d | passphrase | [_-]pass | pwd | credentials? | jwt | auth(?:orization)?
        | [_-]signature | cookie | (?:api|private|secret|access|account|wandb|license) [_-]? key (?:[_-]?id)?
        | webhook (?:_?url)? )
      ["']?"""
_NAMED = re.compile(
    rf"""(?ix)
    ( {_NAME} [ \t]{{0,8}} [:=] [ \t]{{0,8}} (?:(?:bearer|basic|token)[ \t]{{1,8}})? )
    ( \(hidden\) | "(?:\\.|[^"\\\n])*" | '[^'\n]*' | [^\s,;&}}\])"']+ )
    """
)
# Values of YAML on the lines below their name: lists, sections, and texts after | or >. They are further in, or begin
# with a hyphen.
_BELOW_NAME = re.compile(
    rf"""(?imx)
    ^ ( (?P<indent>[ \t]{{0,64}}) (?:-[ \t]{{1,8}}){{0,8}} ["']? {_NAME} [ \t]{{0,8}} : )
    [ \t]{{0,8}} (?:[|>][-+\d]{{0,2}})? [ \t]{{0,8}}
    (?: \n [ \t]{{0,64}} (?=\n) | \n (?P=indent) (?: [ \t]+ (?=\S) | -[ \t] ) [^\n]* )+
    """
)
# Secrets that tell by themselves what they are: Hugging Face, GitHub, GitLab, AWS, Google, Slack, OpenAI, JWT.
_BARE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|(?<![\w/])[0-9a-f]{40}(?![\w/])"  # Weights & Biases; a path's is a commit of the hub
    r"|A(?:KIA|SIA)[A-Z0-9]{16}|AIza[\w-]{30,}|xox[abprs]-[\w-]{10,}|sk-[\w-]{20,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)
# Words of command lines: --password X, aws configure set aws_access_key_id X, a line of .netrc, sshpass -p X.
_WORD = r"""("[^"\n]*"|'[^'\n]*'|[^\s"'-]\S*)"""
_OPTION = re.compile(
    r"(?i)(--[\w-]{0,64}(?:token|secret|passw(?:or)?d|passphrase|pass|cookie|key)\s+"
    r"|\baws_(?:access_key_id|secret_access_key|session_token)\s+|\blogin\s+\S{1,64}\s+password\s+"
    rf"|\b(?:sshpass|mysql\w*|mariadb\w*)\b[^\n;|&]{{0,200}}?\s-p\s?){_WORD}"
)
# curl -u NAME:PASSWORD and its like; not docker run --user 1000:1000.
_LOGIN = re.compile(rf"(?<!\S)(-[uU]\s*|--(?:proxy-)?(?:user|auth)(?:\s+|=)){_WORD}")
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/=._~-]{12,}")
_KEY_BLOCK = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)

# Of tokens and the like only a name's last word counts: keep_tokens, token_dropout_rate and tokenizer are no secrets.
_SECRET_NAME = re.compile(
    r"(?i)(^|[_.-])(token|jwt|auth|authorization|credentials?|passwd|pass|pwd|passphrase)$"
    r"|password|secret|(api|access|private|wandb|license)[_-]?key|webhook(_?url)?$"
)


def holds_bare_secret(text: str) -> bool:
    """Whether a text holds a secret that tells by itself what it is, as hf_... does."""
    return _BARE.search(text) is not None


def is_secret_name(name: str) -> bool:
    """Whether a variable, a key or an option of this name may hold a secret."""
    return _SECRET_NAME.search(name) is not None


def redact(text: str, *, home: str) -> str:
    """The text without URLs' queries, users and passwords, without tokens and keys, and with `home` as ~."""
    text = _KEY_BLOCK.sub(HIDDEN, text)
    text = _URL.sub(lambda url: shown(url[0]), text)
    text = _BARE.sub(HIDDEN, text)
    text = _BELOW_NAME.sub(lambda found: f"{found[1]} {HIDDEN}", text)
    text = _NAMED.sub(lambda found: f"{found[1]}{_hide(found[2])}", text)
    text = _OPTION.sub(lambda found: f"{found[1]}{_hide(found[2])}", text)
    text = _LOGIN.sub(lambda found: f"{found[1]}{_hide_password(found[2])}", text)
    text = _BEARER.sub(lambda found: f"{found[1]} {HIDDEN}", text)
    home = home.rstrip("/")
    return re.sub(rf"{re.escape(home)}(?=/|\b)", "~", text) if home else text


def _hide(value: str) -> str:
    """In its quotes, so that what stands around it keeps its form. What says that nothing is set stays."""
    bare = value.strip("\"'")
    if bare in ("", "null", "None", "~", HIDDEN):
        return value
    quote = value[0] if value[0] in "\"'" else ""
    return f"{quote}{HIDDEN}{quote}"


def _hide_password(login: str) -> str:
    """NAME:PASSWORD, in its quotes, without the latter. Two numbers are a user's and a group's."""
    name, colon, password = login.partition(":")
    quote = login[0] if login[0] in "\"'" else ""
    is_secret = colon and not (name.isdigit() and password.isdigit())
    return f"{name}:{HIDDEN}{quote}" if is_secret else login
