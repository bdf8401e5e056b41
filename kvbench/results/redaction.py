"""Keep secrets out of everything that is written, printed or sent.

Two ways to know a secret: its value (environment variables, netrc, the hub's token file), found in any
text also when URL-quoted or in base64; and its form (a URL with a password, an Authorization header,
tokens of well-known services), looked for in error texts, which may quote what the process never had.

    redact("GET https://me:hunter22@host failed")      # "GET https://***@host failed"
"""

from __future__ import annotations

import base64
import netrc
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

HIDDEN = "***"
_SHORTEST = 8  # a shorter value would be found inside ordinary words
_SECRET_NAME = re.compile(
    r"(^|[._-])(api[_-]?key|key|token|secret|password|passwd|pass|pwd|auth|credentials?)([_-](id|value))?$"
    r"|(apikey|token|secret|password|passwd)$",
    re.IGNORECASE,
)
_NOT_SECRET = {"PWD", "OLDPWD"}
_FORMS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(\b[\w+.-]+:/{1,2})[^/\s@'\"]*:[^/\s@'\"]*@"), rf"\1{HIDDEN}@"),
    (re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic|token)?\s*)[^\s'\",]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)(\b(?:bearer|basic)\s+)[\w.~+/=-]{16,}"), rf"\1{HIDDEN}"),
    (
        re.compile(
            r"(?i)((?:api[_-]?key|access[_-]?key|(?:access|auth|hub|hf)[_-]?token|client[_-]?secret|secret|"
            r"passw(?:or)?d)['\"]?\s*[=:]\s*['\"]?)[^\s'\",;&)]{4,}"
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"(?i)([?&](?:token|key|sig|signature|x-amz-[\w-]+)=)[^&\s'\"]+"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abpr]-|wandb_v1_)[\w-]{16,}"), HIDDEN),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), HIDDEN),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), HIDDEN),
)


def is_secret_name(name: str) -> bool:
    """Whether a variable or setting called `name` holds a secret."""
    return name not in _NOT_SECRET and _SECRET_NAME.search(name) is not None


def secret_in(text: str) -> str | None:
    """Return where the secret in `text` comes from ("WANDB_API_KEY", "a netrc file"), None if there is none."""
    return next((source for source, value in _secrets() if value in text), None)


def hide_known(text: str) -> str:
    """Return `text` without the values of secrets that this process could know."""
    return _without(text, _secrets())


def redact(text: str) -> str:
    """Return `text` without known secrets and without what has the form of one."""
    return _without_forms(hide_known(text))


def printable(text: str) -> str:
    """Return `text` for a terminal: no secrets, and "?" for control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in redact(text))


def redacted_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record's body that can be stored and sent.

    Known secrets go everywhere, forms of secrets only in the error: the words of a model are data.
    """
    secrets = _secrets()  # once: a record holds many thousands of texts
    hidden = dict(body)
    for name in hidden.keys() - {"key", "attempt"} if secrets else ():
        hidden[name] = _mapped(body[name], lambda text: _without(text, secrets))
    return hidden | ({"error": _mapped(hidden["error"], _without_forms)} if "error" in body else {})


def _without(text: str, secrets: list[tuple[str, str]]) -> str:
    for _, value in secrets:
        text = text.replace(value, HIDDEN)
    return text


def _without_forms(text: str) -> str:
    for form, replacement in _FORMS:
        text = form.sub(replacement, text)
    return text


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_mapped(name, change): _mapped(item, change) for name, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list | tuple) else value


def _secrets() -> list[tuple[str, str]]:
    """Return source and value of every known secret in every spelling, longest first."""
    found: dict[str, str] = {}
    for source, value in [*_from_environment(), *_from_files(os.environ.get("NETRC"), os.environ.get("HF_HOME"))]:
        if len(value) >= _SHORTEST:
            found.update(dict.fromkeys(_spellings(value), source))
    return sorted(((source, value) for value, source in found.items()), key=lambda pair: (-len(pair[1]), pair[1]))


def _from_environment() -> Iterator[tuple[str, str]]:
    for name, value in os.environ.items():
        # A path is no secret: SSH_AUTH_SOCK, GOOGLE_APPLICATION_CREDENTIALS.
        if is_secret_name(name) and not Path(value[:4096]).exists():
            yield name, value.strip()
        # http_proxy=http://me:secret@proxy
        for password in re.findall(r"://[^/\s@:]*:([^/\s@]+)@", value):
            yield name, password


@cache
def _from_files(netrc_file: str | None, hub_folder: str | None) -> tuple[tuple[str, str], ...]:
    found: list[tuple[str, str]] = []
    for path in [netrc_file] if netrc_file else ["~/.netrc", "~/_netrc"]:
        try:
            hosts = netrc.netrc(str(Path(path).expanduser())).hosts.values()
        except (OSError, netrc.NetrcParseError, RuntimeError):
            continue
        found += [("a netrc file", password) for _, _, password in hosts if password]
    try:
        token = Path(hub_folder or "~/.cache/huggingface").expanduser() / "token"
        found.append(("the hub's token file", token.read_text(encoding="utf-8").strip()))
    except (OSError, ValueError, RuntimeError):
        pass
    return tuple(found)


@cache
def _spellings(value: str) -> tuple[str, ...]:
    raw = value.encode(errors="replace")
    encoded = (base64.b64encode(raw).decode().rstrip("="), base64.urlsafe_b64encode(raw).decode().rstrip("="))
    return value, quote(value, safe=""), quote_plus(value), repr(value)[1:-1], *encoded
