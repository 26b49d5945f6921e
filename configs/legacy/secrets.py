"""Which keys and values of an old config are secrets. None of them is ever shown, written or carried over."""

import re

from configs.redact import holds_bare_secret, is_secret_name

_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_SECRET_VARIABLE = re.compile(r"TOKEN|KEY|SECRET|PASSW", re.IGNORECASE)
# Shorter ones than `configs.redact` takes for secrets: a value dropped here is named, and costs a line to type.
_SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{8,}"  # Hugging Face
    r"|\b(sk|ghp|gho|glpat|xox[abp])[-_][A-Za-z0-9_-]{12,}"  # OpenAI, GitHub, GitLab, Slack
    r"|\bAKIA[0-9A-Z]{12,}"  # AWS
    r"|\b[a-z][a-z0-9+.-]*://[^/\s]*@"  # user:password@host, token@host
    r"|\b[a-z][a-z0-9+.-]*://[^/\s:@]*:(?!\d+/)[^\s@]+@"  # a password with a slash in it
    r"|\b[a-z][a-z0-9+.-]*://\S*[?&][\w.-]*(token|key|sig|signature|password|secret|credential|auth)[\w.-]*=",
    re.IGNORECASE,
)


def is_secret(key: str, value: object) -> bool:
    """Whether a dotted key, or a section that it is in, names a secret and has a value; or whether its value, or one
    inside it, looks like one."""
    names = (part.lstrip("-") for part in re.split(r"\.|\[\d+\]", key))
    if any(map(is_secret_name, names)) and value not in (None, "", False, True):
        return True
    if isinstance(value, dict):
        return any(looks_secret(str(name)) or is_secret(str(name), inner) for name, inner in value.items())
    if isinstance(value, list):
        return any(is_secret("", inner) for inner in value)
    return isinstance(value, str) and (looks_secret(value) or holds_secret_variable(value))


def looks_secret(text: str) -> bool:
    """Whether a text, or a part of it, tells by itself that it is a secret, as hf_... does."""
    return holds_bare_secret(text) or _SECRET_VALUE.search(text) is not None


def holds_secret_variable(text: str) -> bool:
    """Whether a text takes a part from a variable of the environment that is a secret by its name: ${HF_TOKEN}."""
    names = _VARIABLE.findall(text)
    return any(_SECRET_VARIABLE.search(name) or is_secret_name(name) for name in names)
