"""`kvbench plot` draws what is named or says what may be; `kvbench measures` says what the registry says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvbench.cli.main import run
from kvbench.measures import MEASURES
from kvbench.report.figures import FIGURES
from tests.report.synthetic import body, write_cell, write_sweep

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("results"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_list_describes_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plot", "--list"]) == 0
    printed = capsys.readouterr().out
    for kind in FIGURES.values():
        assert f"{kind.name} " in printed
        assert kind.summary in printed
        assert kind.needs in printed


@pytest.mark.cover("one")
@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<?xml"), ("pdf", b"%PDF"), ("png", b"\x89PNG")])
def test_a_figure_is_written_in_the_format_that_its_name_says(results: Path, suffix: str, start: bytes) -> None:
    assert run(["plot", "pareto", str(results), "--out", f"new/p.{suffix}", "--width", "single"]) == 0
    assert Path(f"new/p.{suffix}").read_bytes().startswith(start)


@pytest.mark.long
def test_without_an_out_the_file_is_named_after_the_figure(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plot", "quality", str(results)]) == 0
    assert capsys.readouterr().out == "quality.svg\n"
    assert Path("quality.svg").exists()


@pytest.mark.long
@pytest.mark.parametrize("names", [("quality", "capacity"), pytest.param(tuple(FIGURES), marks=pytest.mark.long)])
def test_all_figures_go_into_a_folder_and_what_is_not_drawn_is_said(
    results: Path, names: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbench.cli.plot.FIGURES", {name: FIGURES[name] for name in names})
    assert run(["plot", "all", str(results), "--out", "figures", "--format", "pdf"]) == 0
    assert {path.name for path in Path("figures").iterdir()} == {
        f"{name}.pdf" for name in ("quality", "pareto", "latency", "memory", "entries", "differences") if name in names
    }
    assert "capacity: not drawn for tiny-llava on scenes; it needs" in capsys.readouterr().out


def test_a_figure_without_data_is_not_drawn_and_says_so(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plot", "capacity", str(results)]) == 1
    assert "needs the capacity task" in capsys.readouterr().out
    assert run(["plot", "quality", str(results), "--measure", "needles_f1"]) == 1
    assert "with needles_f1" in capsys.readouterr().out
    assert not list(Path().iterdir())


def test_a_file_that_cannot_be_used_is_named_where_its_figure_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cell(tmp_path / "one", body())
    (tmp_path / "one/frontier").mkdir()
    (tmp_path / "one/frontier/ppl-0.05.json").write_text("{")
    assert run(["plot", "frontier", str(tmp_path / "one")]) == 1
    said, torn = capsys.readouterr().out.splitlines()
    assert "frontier: not drawn" in said
    assert "frontier/ppl-0.05.json" in torn


def test_groups_and_policies_are_chosen_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "two"
    for policy, budget in (("full", None), ("h2o", 0.2), ("elastic", 0.2), ("streaming_llm", 0.2)):
        write_cell(folder, body(policy=policy, budget=budget))
    write_cell(folder, body(model="other", policy="h2o"))
    assert run(["plot", "quality", str(folder), "--out", "x/", "--measure", "ppl"]) == 0
    assert {path.name for path in Path("x").iterdir()} == {
        "1-other-scenes-quality.svg",
        "2-tiny-llava-scenes-quality.svg",
    }
    assert run(["plot", "quality", str(folder), "--out", "one.svg"]) == 2
    assert "other on scenes; tiny-llava on scenes" in capsys.readouterr().err
    chosen = ["--model", "tiny-llava", "--dataset", "scenes", "--policies", "h2o,elastic", "--measure", "ppl"]
    assert run(["plot", "quality", str(folder), *chosen, "--out", "one.svg"]) == 0
    assert run(["plot", "quality", str(folder), *chosen[:4], "--measure", "Perplexity", "--out", "all.svg"]) == 0
    some, every = Path("one.svg").read_text(), Path("all.svg").read_text()
    assert "#eb8900" in every, "streaming_llm is orange"
    assert "#eb8900" not in some
    assert "#004a8c" in some
    chosen[5] = "full,h2o,elastic"
    assert run(["plot", "quality", str(folder), *chosen, "--out", "named.svg"]) == 0
    assert Path("named.svg").read_text() == some, "the full cache stays as the reference"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which figure? quality, pareto"),
        (["qualty"], "figure is 'qualty'; did you mean 'quality'?"),
        (["quality", "--width", "sngle"], "did you mean 'single'?"),
        (["quality", "--style", "drak"], "did you mean 'dark'?"),
        (["quality", "--measure", "ppl,rougeL_vs_flul"], "did you mean 'rougeL_vs_full'"),
        (["memory", "--measure", "ppl"], "it is for quality, pareto, differences"),
        (["quality", "--out", "a.gif"], "a file ends in .svg, .pdf, .png, a folder in /"),
        (["quality", "--out", "a.svg", "--format", "pdf"], "give one of them"),
        (["quality", "--format", "jpg"], "--format is 'jpg'"),
        (["quality", "--colour", "red"], "kvbench plot --help lists flags"),
        (["quality", "nowhere"], "folder nowhere does not exist; run a sweep first"),
        (["quality", "{results}", "--model", "tiny-lava"], "did you mean 'tiny-llava'?"),
        (["quality", "{results}", "--dataset", "scene"], "did you mean 'scenes'?"),
        (["quality", "{results}", "--policies", "h2o,elastik"], "--policies is 'elastik'; did you mean 'elastic'?"),
        (["all", "{results}", "--out", "one.svg"], "choose, or give a folder"),
        (["quality", "{results}", "--out", "/proc/no/x.svg"], "choose another --out"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_is_allowed(
    results: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plot", *(word.format(results=results) for word in words)]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_wrong_name_is_refused_before_matplotlib_is_imported() -> None:
    code = (
        "import sys; from kvbench.cli.main import run; run(['plot', 'qualty']); run(['plot', '--list']); "
        "sys.exit(bool({'matplotlib', 'numpy', 'torch', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True).returncode == 0


@pytest.mark.long
def test_the_dark_style_has_the_dark_palette(results: Path) -> None:
    assert run(["plot", "quality", str(results), "--style", "dark", "--width", "page"]) == 0
    svg = Path("quality.svg").read_text()
    assert "#1a1f26" in svg
    assert "#ffffff" not in svg


def test_an_empty_folder_has_nothing_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert run(["plot", "quality", str(tmp_path / "empty")]) == 2
    assert "nothing to draw" in capsys.readouterr().err


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run(["measures", *words]) == 0
    return capsys.readouterr().out


def test_every_measure_is_listed_with_unit_direction_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys)
    heads = {line.split()[0]: line for line in text.splitlines() if re.match(r"\w+ ", line)}
    for name, known in MEASURES.items():
        own = re.sub(r"turn\d_", "", name)
        assert known.definition in text
        if own == name:
            better = "neither" if known.better == "none" else known.better
            assert re.search(rf" {known.unit} +{better} is better +{re.escape(known.label)}$", heads[name])
        else:
            assert own in text.splitlines()[-1]


def test_words_choose_measures(capsys: pytest.CaptureFixture[str]) -> None:
    def names(*words: str) -> list[str]:
        return [known["name"] for known in json.loads(printed(capsys, *words, "--json"))]

    assert names() == [name for name in MEASURES if not name.startswith("turn")]
    assert names("KL", "ppl") == ["kl_to_full", "ppl", "ppl_released"]
    assert set(names("turn2_exact")) == {"turn2_exact_fraction"}
    assert names("entries") == ["entries_mean", "entries_peak"]


def test_a_word_that_no_measure_has_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["measures", "pppl"]) == 2
    assert capsys.readouterr().err == "kvbench: the measure is 'pppl'; did you mean 'ppl'?\n"
