from __future__ import annotations

import base64
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench.results import redaction
from kvbench.results.redaction import hide_known, is_secret_name, redact, redacted_body, secret_in
from tests.results.record_bodies import make_body

CANARY = "canary/7Qz+pW 3x=Kd"


@pytest.fixture(autouse=True)
def _one_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(redaction.os.environ):
        if is_secret_name(name):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("MY_SERVICE_PASSWORD", CANARY)


SPELLINGS = [CANARY, quote(CANARY, safe=""), base64.b64encode(CANARY.encode()).decode().rstrip("=")]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_known_secret_is_hidden_in_every_spelling(spelling: str) -> None:
    assert hide_known(f"before {spelling} after {spelling}") == "before *** after ***"
    assert secret_in(f"x{spelling}") == "MY_SERVICE_PASSWORD"
    assert secret_in("nothing") is None


@given(text=st.text(), tail=st.text())
def test_no_text_shows_a_known_secret(text: str, tail: str) -> None:
    assert CANARY not in redact(text + CANARY + tail)


@pytest.mark.parametrize(
    "name",
    ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "PGPASSWORD", "MYSQL_PWD", "APIKEY",
     "NPM_AUTH", "sink.wandb.api_key", "hydra.job.env_set.WANDB_API_KEY", "CLIENT_SECRET", "db-password"],
)  # fmt: skip
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["budget.tokens", "task.generation.max_new_tokens", "TOKENIZERS_PARALLELISM", "PWD", "KEYBOARD", "policy.num_sinks",
     "PATH", "task.fidelity.check_tokens", "dataset.path", "COMPASS", "AUTHOR"],
)  # fmt: skip
def test_names_of_other_things(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("fetch https://me:pa55word@example.org/x failed", "pa55word"),
        ("https:/me:pa55word@example.org, as a path spells it", "pa55word"),
        ("postgresql://:pa55word@db/x", "pa55word"),
        ("Authorization: Bearer abc.def.ghi", "abc.def.ghi"),
        ("{'Authorization': 'Basic bWU6c2VjcmV0'}", "bWU6c2VjcmV0"),
        ("api_key='0123abcd'", "0123abcd"),
        ("api-key: 0123abcd, next", "0123abcd"),
        ("password=hunter2;", "hunter2"),
        ("GET /x?token=abcdef&page=2", "abcdef"),
        ("hf_" + "a1B2" * 8, "a1B2a1B2"),
        ("ghp_" + "a1B2" * 9, "a1B2a1B2"),
        ("sk-proj-" + "a1B2" * 9, "a1B2a1B2"),
        ("wandb_v1_" + "a1B2" * 9, "a1B2a1B2"),
        ("AKIA" + "A1B2" * 4, "A1B2A1B2"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "MIIE"),
        ("-----BEGIN PRIVATE KEY-----\nMIIE cut off", "MIIE"),
    ],
)
def test_what_has_the_form_of_a_secret_is_hidden(text: str, secret: str) -> None:
    assert secret not in redact(text)
    assert "***" in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "policy.num_sinks is 'x'; it must be a whole number",
        "commit 19a7de0c0ffee19a7de0c0ffee19a7de0c0ffee1",
        "https://example.org/a?page=2",
        "the token at position 12: 7 tokens left",
        'File "/home/me/policy.py", line 3, in score',
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text


def test_passwords_of_proxies_netrc_and_the_hub_are_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    redaction._from_files.cache_clear()
    monkeypatch.setenv("https_proxy", "http://me:proxy-pa55@proxy:3128")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password netrc-pa55\n")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "token").write_text("hub-token-pa55\n")
    try:
        assert hide_known("proxy-pa55 netrc-pa55 hub-token-pa55") == "*** *** ***"
        assert secret_in("netrc-pa55") == "a netrc file"
    finally:
        redaction._from_files.cache_clear()


def test_short_values_and_paths_are_not_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOME_TOKEN", "full")
    monkeypatch.setenv("SSH_AUTH", str(tmp_path))
    assert hide_known(f"full {tmp_path}") == f"full {tmp_path}"


def test_a_body_keeps_its_identity_and_what_a_model_said() -> None:
    body = make_body(
        error={"type": "E", "message": f"{CANARY} and password=hunter22", "traceback": "https://me:pw@host"},
        samples=[{"id": "1", "text": f"my password: {'x' * 9} {CANARY}"}],
        sweep=CANARY,
    )
    clean = redacted_body(body)
    assert (clean["key"], clean["attempt"], clean["measurements"]) == (
        body["key"],
        body["attempt"],
        body["measurements"],
    )
    assert clean["error"] == {"type": "E", "message": "*** and password=***", "traceback": "https://***@host"}
    assert clean["samples"] == [{"id": "1", "text": f"my password: {'x' * 9} ***"}]
    assert clean["sweep"] == "***"
    assert redacted_body(make_body()).keys() == make_body().keys()
