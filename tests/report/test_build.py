from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvbench.report import build
from kvbench.report.build import build_report, is_current, refresh_report, write_report
from kvbench.report.figures.draw import Plot
from kvbench.report.load import Results, load_results
from kvbench.results import files as durable
from tests.report.synthetic import body, write_cell


@pytest.fixture(autouse=True)
def models_drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Draw names in place of figures, which take seconds; return the models of each drawing."""
    drawn: list[list[str]] = []

    def draw(results: Results) -> list[Plot]:
        drawn.append([group.model for group in results.groups])
        return [
            Plot(name=m, kind="quality", group_title="", title="", caption="", svg=f"<svg>{m}</svg>") for m in drawn[-1]
        ]

    monkeypatch.setattr(build, "draw_plots", draw)
    monkeypatch.setattr(
        build, "render_page", lambda results, plots, choices, tables: " ".join(plot.svg for plot in plots)
    )
    monkeypatch.setattr(build, "markdown_tables", lambda results, choices: str(len(results.records)))
    monkeypatch.setattr(build, "csv_and_parquet", tables)
    return drawn


def tables(results: Results) -> dict[str, bytes]:
    rows = "".join(f"{cell.model}\n" for cell in results.records).encode()
    return {f"{name}.{kind}": rows for name in ("table", "table_long", "samples") for kind in ("csv", "parquet")}


def folder_of(folder: Path, *models: str) -> Path:
    for model in models:
        for policy, budget in (("full", None), ("h2o", 0.2)):
            write_cell(folder, body(policy=policy, budget=budget, model=model, num_samples=1))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class Meeting:
    """Stops the first writer in the middle of its files, until the second one waits for it or has ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writing, self.go_on = threading.Event(), threading.Event()
        self._replace, self._flock = build.replace_file, fcntl.flock
        monkeypatch.setattr(build, "replace_file", self.replace_file)
        monkeypatch.setattr(durable.fcntl, "flock", self.flock)

    def replace_file(self, path: Path, data: bytes) -> None:
        self._replace(path, data)
        if not self.writing.is_set():
            self.writing.set()
            assert self.go_on.wait(60)

    def flock(self, descriptor: int, operation: int) -> None:
        try:
            self._flock(descriptor, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            self.go_on.set()
            self._flock(descriptor, operation)

    def run(self, first: Callable[[], object], second: Callable[[], object]) -> None:
        problems: list[BaseException] = []

        def told(work: Callable[[], object]) -> None:
            try:
                work()
            except BaseException as error:
                problems.append(error)

        writers = [threading.Thread(target=told, args=(work,)) for work in (first, second)]
        writers[0].start()
        assert self.writing.wait(60)
        writers[1].start()
        while writers[1].is_alive() and not self.go_on.wait(0.01):
            pass
        self.go_on.set()
        for writer in writers:
            writer.join()
        assert problems == []


def test_of_two_reports_written_at_once_the_later_one_stands_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = load_results(folder_of(tmp_path / "1", "a")), load_results(folder_of(tmp_path / "2", "b", "c"))
    alone = {name: tmp_path / f"alone-{name}" for name in ("small", "large")}
    for name, results in (("small", small), ("large", large)):
        write_report(results, alone[name], alone[name])
    out = tmp_path / "shared"
    for first, second, last in ((small, large, "large"), (large, small, "small")):
        with monkeypatch.context() as patch:
            Meeting(patch).run(
                lambda one=first: write_report(one, out, out), lambda one=second: write_report(one, out, out)
            )
        assert contents(out) == contents(alone[last])


def test_jobs_that_end_at_once_leave_one_report_with_the_cells_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models_drawn: list[list[str]]
) -> None:
    folder = folder_of(tmp_path / "results", "a")

    def later() -> None:
        folder_of(folder, "b")  # its cells came after the first job had read the folder
        refresh_report(folder)

    with monkeypatch.context() as patch:
        Meeting(patch).run(lambda: refresh_report(folder), later)
    assert models_drawn == [["a"], ["a", "b"]]
    assert is_current(folder)
    assert (folder / "report" / "index.html").read_text() == "<svg>a</svg> <svg>b</svg>"
    assert sorted(path.name for path in (folder / "report" / "plots").iterdir()) == ["a.svg", "b.svg"]
    assert (folder / "table.csv").read_text().split() == ["a", "a", "b", "b"]


def test_a_second_job_does_not_build_what_the_first_one_builds_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models_drawn: list[list[str]]
) -> None:
    folder = folder_of(tmp_path / "results", "a")
    with monkeypatch.context() as patch:
        Meeting(patch).run(lambda: refresh_report(folder), lambda: refresh_report(folder))
    assert models_drawn == [["a"]]


def test_a_report_of_some_cells_or_one_that_was_killed_counts_as_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "results", "a")
    refresh_report(folder)
    build_report(folder, sweep=load_results(folder).records[0].sweep)
    assert not is_current(folder), "it may hold less than all"
    refresh_report(folder)
    assert is_current(folder)

    def killed(path: Path, data: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "replace_file", killed)
    with pytest.raises(KeyboardInterrupt):
        build_report(folder)
    assert not is_current(folder)
