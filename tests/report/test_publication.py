"""Published files and the tables inside pages are made from records, and nothing else of a page is touched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvbench.report.compare import compare, difference_text
from kvbench.report.laws import law_rows, load_laws
from kvbench.report.load import load_results
from kvbench.report.publication import filled_page, main
from tests.report.synthetic import body, write_cell, write_sweep

REPO = Path(__file__).parents[2]
PAGE = "# Page\n\nBefore.\n\n<!-- table: {} -->\nold\n<!-- end of table -->\n\nAfter.\n"
OF = "records=results/published/one sweep=first dataset=scenes budget=0.2"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_sweep(tmp_path / "results" / "published" / "one")
    (tmp_path / "docs").mkdir()
    return tmp_path


def page_of(root: Path, words: str, *more: str) -> str:
    (root / "docs" / "page.md").write_text(PAGE.format(words))
    assert main([str(root), *more]) == 0
    return (root / "docs" / "page.md").read_text()


def test_a_table_in_a_page_says_what_the_records_say(root: Path) -> None:
    page = page_of(root, f"kind=positions measure=rougeL_vs_full,length_ratio {OF}")
    assert page.startswith("# Page\n\nBefore.\n\n<!-- table: kind=positions ")
    assert page.endswith("<!-- end of table -->\n\nAfter.\n")
    assert "old" not in page
    cells = load_results(root / "results" / "published" / "one").records
    (h2o,) = (cell for cell in cells if cell.policy == "h2o" and cell.budget_fraction == 0.2)
    found = h2o.estimate("rougeL_vs_full")
    assert found is not None
    (line,) = (line for line in page.splitlines() if line.startswith("| h2o |"))
    assert line.startswith(f"| h2o | {found.value:.3f} [{found.low:.3f}, {found.high:.3f}]; ")
    assert line.endswith("| -; - | -; - |")
    assert page == page_of(root, f"kind=positions measure=rougeL_vs_full,length_ratio {OF}")


def test_differences_are_paired_and_what_was_not_measured_is_a_dash(root: Path) -> None:
    page = page_of(root, f"kind=differences measure=ppl pairs=elastic-h2o,h2o-snapkv {OF}")
    (line,) = (line for line in page.splitlines() if line.startswith("| elastic minus h2o |"))
    assert "nats/token" in line
    assert "| h2o minus snapkv | - | - | - |" in page


def test_the_parts_of_a_policy_stand_beside_others(root: Path) -> None:
    words = f"kind=parts measure=ppl settings=name,seed against=h2o,full beside=first {OF}"
    page = page_of(root, words)
    assert "| name | seed | PPL | minus the first | minus h2o | minus full |" in page
    (line,) = (line for line in page.splitlines() if line.startswith("| random | 0 |"))
    assert line.count("nats/token") == 3


def test_effects_of_settings_are_alone_on_average_and_last(root: Path) -> None:
    folder = root / "results" / "published" / "one"
    words = f"kind=effects measure=ppl settings=name:elastic:h2o,seed:0:1 {OF}"
    assert "Not measured yet: 2 of 4 combinations." in page_of(root, words)
    for policy in ("elastic", "h2o"):
        write_cell(folder, body(policy=policy, budget=0.2, seed=1))
    page = page_of(root, words)
    cells = {
        (cell.policy, cell.settings["policy"]["seed"]): cell
        for cell in load_results(folder).records
        if cell.budget_fraction == 0.2
    }
    found = [compare(cells["h2o", seed], cells["elastic", seed], "ppl") for seed in (0, 1)]
    alone, last = (one for one in found if one is not None)
    (line,) = (line for line in page.splitlines() if line.startswith("| name | elastic | h2o | "))
    shown = line.split(" | ")[3:]
    assert shown[0] == difference_text(alone)
    assert shown[2] == f"{difference_text(last)} |"
    assert float(shown[1].split()[0]) == pytest.approx((alone.value + last.value) / 2, abs=0.0006)


def test_position_modes_are_taken_from_the_same_policys_original_one(root: Path) -> None:
    folder = root / "results" / "published" / "one"
    moved = write_cell(folder, body(policy="h2o", budget=0.2, positions="released", seed=1))
    page = page_of(root, f"kind=shifts measure=ppl {OF}")
    assert moved.exists()
    (line,) = (line for line in page.splitlines() if line.startswith("| h2o |"))
    assert line.startswith("| h2o | - | ")
    assert line.endswith(" nats/token |")
    assert "| full |" not in page


def test_records_that_are_not_there_yet_are_said_to_be_missing(root: Path) -> None:
    page = page_of(root, "records=results/published/two kind=laws")
    assert "\nNot measured yet: `results/published/two` holds no records.\n" in page


def test_a_wrong_table_and_a_wrong_folder_are_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "docs" / "page.md").write_text(PAGE.format("records=x kind=postions"))
    assert main([str(root)]) == 2
    assert capsys.readouterr().err == "kvbench: the kind of a table is 'postions'; did you mean 'positions'?\n"
    assert main([str(root / "docs")]) == 2
    assert "holds no results/published; give the folder of the repository\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (f"kind=positions measure=ppl policies=full,h20 {OF}", "a policy of a table is 'h20'; did you mean 'h2o'?"),
        (f"kind=positions measure=ppl modes=orginal {OF}", "a position mode of a table is 'orginal'; did you mean"),
        (f"kind=differences measure=ppl pairs=elastic-h20 {OF}", "a policy of a table is 'h20'; did you mean 'h2o'?"),
        (f"kind=overview policies=elastik {OF}", "a policy of a table is 'elastik'; did you mean 'elastic'?"),
        (f"kind=overview parts=recal {OF}", "a part of a table is 'recal'; did you mean 'recall'?"),
    ],
)
def test_a_mistyped_name_in_a_tables_block_is_one_line_with_what_is_close(
    root: Path, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    (root / "docs" / "page.md").write_text(PAGE.format(words))
    assert main([str(root)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"kvbench: {said}")
    assert told.count("\n") == 1


def test_a_policy_that_is_known_and_not_measured_is_a_dash(root: Path) -> None:
    assert "| snapkv | - | - | - |" in page_of(root, f"kind=positions measure=ppl policies=snapkv {OF}")


@pytest.mark.long
def test_only_files_that_lie_in_a_published_folder_are_made_again(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = root / "results" / "published" / "one"
    (folder / "table.md").write_text("old")
    (folder / "note.txt").write_text("mine")
    assert main([str(root), "--check"]) == 1
    assert (folder / "table.md").read_text() == "old"
    assert capsys.readouterr().out == "out of date: results/published/one/table.md\n"
    assert main([str(root)]) == 0
    assert (folder / "table.md").read_text().startswith("## tiny-llava on scenes")
    assert {path.name for path in folder.iterdir()} == {"cells", "table.md", "note.txt"}
    assert main([str(root), "--check"]) == 0


def test_the_page_of_laws_says_what_the_published_records_say() -> None:
    """Table and prose: which laws hold, which do not, and which nobody has run."""
    page = REPO / "docs" / "laws.md"
    text = page.read_text(encoding="utf-8")
    assert filled_page(REPO, page) == text
    shown = text.partition("## What SmolLM2-135M shows")[2]
    rows = law_rows(load_results(REPO / "results" / "published" / "laws-smollm2"))
    told = {law.number: {row.verdict for row in rows if row.law.number == law.number} for law in load_laws()}
    of = {" ".join(sorted(verdicts)): [one for one in told if told[one] == verdicts] for verdicts in told.values()}
    assert of == {
        "holds": [1, 2, 8, 9, 10, 15],
        "does not holds": [3, 5, 6],
        "does not": [4],
        "cannot be told does not": [13],
    }
    assert told[3] == {"holds", "does not"}
    assert "Laws 1, 2, 6 (`heavy_hitters`), 8, 9, 10 and 15 hold" in shown
    told_of = {(row.law.name, row.expectation.says) for row in rows}
    assert set(re.findall(r"\| \d+\. (\w+) \| ([^|]*) \|[^|]*\|[^|]*\| not run yet \|", shown)) == {
        (law.name, one.says) for law in load_laws() for one in law.expects if (law.name, one.says) not in told_of
    }


@pytest.mark.long
def test_what_is_published_here_is_what_its_records_give() -> None:
    assert main([str(REPO), "--check"]) == 0


@pytest.mark.long
def test_a_figure_of_the_one_group_is_made_again_under_its_own_name(root: Path) -> None:
    folder = root / "results" / "published" / "one"
    (folder / "quality.svg").write_text("")
    assert main([str(root)]) == 0
    assert (folder / "quality.svg").read_text().startswith("<?xml")
    assert main([str(root), "--check"]) == 0


@pytest.mark.long
def test_a_figure_beside_a_page_is_made_from_the_records(root: Path) -> None:
    asked = (
        "<!-- figure: file=modes.svg records={} kind=positions measure=ppl sweep=first dataset=scenes budget=0.2 -->"
    )
    page = root / "docs" / "page.md"
    page.write_text(asked.format("results/published/none"))
    assert main([str(root)]) == 0
    assert not (root / "docs" / "modes.svg").exists()
    page.write_text(asked.format("results/published/one"))
    assert main([str(root), "--check"]) == 1
    assert main([str(root)]) == 0
    drawn = (root / "docs" / "modes.svg").read_bytes()
    assert drawn.startswith(b"<?xml")
    assert main([str(root), "--check"]) == 0
    write_cell(root / "results" / "published" / "one", body(policy="h2o", budget=0.2, positions="released", seed=1))
    assert main([str(root)]) == 0
    assert (root / "docs" / "modes.svg").read_bytes() != drawn
