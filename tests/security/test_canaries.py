"""No secret in any byte: a real sweep with a failing cell, then every file, stdout and stderr is searched."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pandas as pd
import pytest

from kvbench.cli.main import run
from kvbench.results.redaction import is_secret_name
from tests.security.canaries import CANARIES, LEAKY_POLICY, PUBLIC

REPO = Path(__file__).parents[2]
SWEEP = (
    *("--config-dir", "conf", "-m", "policy=leaky,full", "task=perplexity", "dataset.num_samples=1", "results=out"),
    *(f"sweep={PUBLIC}", "sink.wandb.mode=offline"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("canaries")
    (folder / "conf" / "policy").mkdir(parents=True)
    (folder / "conf" / "policy" / "leaky.yaml").write_text("_target_: leaky_policy.Leaky\n")
    (folder / "leaky_policy.py").write_text(LEAKY_POLICY)
    (folder / "home").mkdir()
    netrc = f"machine api.wandb.ai login user password {CANARIES['a netrc file']}\n"
    (folder / "home" / ".netrc").write_text(netrc)
    return folder


def kvbench(place: Path, *words: str) -> tuple[int, str]:
    """Run kvbench with every canary in its environment; return exit code, stdout and stderr together."""
    environment = {name: value for name, value in os.environ.items() if not is_secret_name(name)}
    environment |= {name: value for name, value in CANARIES.items() if name.isupper()}
    proxy = f"http://me:{CANARIES['a proxy']}@127.0.0.1:9"
    environment |= {"PYTHONPATH": str(REPO), "HOME": str(place / "home"), "https_proxy": proxy, "OMP_NUM_THREADS": "1"}
    environment |= {"KVBENCH_TEST_PROXY": proxy, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "kvbench", *words]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr


def spellings(value: str) -> set[bytes]:
    encoded = {base64.b64encode(value.encode()).decode().rstrip("="), quote(value, safe=""), value}
    return {text.encode() for text in encoded}


def found_in(content: bytes) -> list[str]:
    return [name for name, value in CANARIES.items() if any(spelling in content for spelling in spellings(value))]


def content_of(path: Path) -> bytes:
    """The bytes of a file; of a compressed table, its text as well."""
    text = pd.read_parquet(path).to_csv() if path.suffix == ".parquet" else ""
    return path.read_bytes() + text.encode()


@pytest.mark.long
def test_a_sweep_with_a_leaky_failing_cell_writes_and_prints_no_secret(place: Path) -> None:
    code, printed = kvbench(place, *SWEEP)
    assert code == 1, printed
    assert found_in(printed.encode()) == []
    for words in (
        ["report", "out"],
        ["results", "list", "out"],
        ["results", "csv", "out"],
        ["results", "verify", "out"],
    ):
        code, printed = kvbench(place, *words)
        assert code == 0, printed
        assert found_in(printed.encode()) == []
    files = [path for path in (place / "out").rglob("*") if path.is_file()]
    leaks = {str(path.relative_to(place)): found for path in files if (found := found_in(content_of(path)))}
    assert leaks == {}
    told = [path for path in files if PUBLIC.encode() in content_of(path)]
    kinds = {"/".join(path.relative_to(place / "out").parts[:1]) for path in told}
    assert {"cells", "wandb", "table.csv", "table.parquet"} <= kinds, "the search reads what is written there"
    record = next(path for path in files if path.name == "record.json" and b"Leaky" in path.read_bytes())
    assert b"***" in record.read_bytes(), "the error is there, its secrets are hidden"


@pytest.mark.parametrize(
    "words",
    [
        [f"+sink.wandb.api_key={CANARIES['WANDB_API_KEY']}"],
        [f"hydra.job.env_set.WANDB_API_KEY={CANARIES['WANDB_API_KEY']}", "--cfg", "job"],
        ["dataset=conversation", f"dataset.path=https://me:{CANARIES['a proxy']}@host/x.json"],
        ["sweep=${oc.env:HF_TOKEN}"],
        ["model=local", "model.checkpoint=${oc.env:HF_TOKEN}/x"],
        ["--config-dir", CANARIES["HF_TOKEN"]],
    ],
)
def test_a_refused_command_line_shows_no_secret_and_writes_nothing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert run(words) == 2
    printed = capfd.readouterr()
    assert printed.err.startswith("kvbench: ")
    assert found_in((printed.out + printed.err).encode()) == []
    assert list(tmp_path.iterdir()) == []


def test_the_search_finds_each_canary_in_each_spelling() -> None:
    for name, value in CANARIES.items():
        for spelling in spellings(value):
            assert name in found_in(b"before " + spelling + b" after")
