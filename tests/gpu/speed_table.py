"""The tables of docs/speed.md, one for each GPU, made from the published records.

    python -m tests.gpu.speed_table                    print them
    python -m tests.gpu.speed_table --write            put them into docs/speed.md, between its two marks
    python -m tests.gpu.speed_table FOLDER ...         of these results folders instead of results/published/speed_*

Nothing in them is typed by hand: a new GPU is a new folder of records.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from kvbench.measures import MAX_DEVICES
from kvbench.report.compare import timing_noise
from kvbench.report.load import BANDWIDTH, CellResult, Estimate, load_results
from kvbench.report.tables import markdown_table

REPO = Path(__file__).parents[2]
PAGE = REPO / "docs" / "speed.md"
BEGIN, END = "<!-- made by python -m tests.gpu.speed_table --write -->", "<!-- end of what is made -->"
HEADER = ("workload", "policy", "TTFT", "TTFT / full", "TPOT", "TPOT / full", "share of its roof", "stored KV", "peak")


def published_folders() -> list[Path]:
    """Return every published folder of speeds."""
    return sorted((REPO / "results" / "published").glob("speed_*"))


def speed_tables(folders: Sequence[Path]) -> str:
    """Return a heading and a table for each GPU of the records in `folders`."""
    cells = [cell for folder in folders for cell in load_results(folder).records if not cell.failed]
    timed = sorted((cell for cell in cells if "tpot_ms" in cell.measurements), key=_order)
    parts = []
    for gpu, group in groupby(timed, key=_machine):
        of_gpu = list(group)
        fastest = max(_copy(cell) for cell in of_gpu)
        rows = [_row(cell, fastest) for cell in of_gpu]
        versions = sorted({_versions(cell) for cell in of_gpu})
        days = sorted({cell.started_utc[:10] for cell in of_gpu})
        parts.append(f"#### {gpu}\n\n{'; '.join(versions)}; {' to '.join(dict.fromkeys((days[0], days[-1])))}\n")
        parts.append("\n".join(markdown_table(HEADER, rows)) + "\n")
        if any(timing_noise(cell) for cell in of_gpu):
            parts.append("Noisy: launches of one setting spread, or the machine was not quiet.\n")
    return "\n".join(parts)


def with_tables(page: str, tables: str) -> str:
    """Return `page` with `tables` between its marks. Raises: ValueError if it has not both, once."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page must hold {BEGIN!r} and {END!r} once each; put them where the tables belong")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables.strip()}\n\n{END}{rest.split(END)[1]}"


def _machine(cell: CellResult) -> str:
    gpus = cell.environment.get("gpus") or ()
    several = f"{len(gpus)} x " if gpus else ""
    return several + str(cell.environment.get("gpu") or cell.environment["cpu_model"])


def _order(cell: CellResult) -> tuple[object, ...]:
    return (_machine(cell), *_sizes(cell), cell.policy != "full", cell.policy, cell.positions)


def _sizes(cell: CellResult) -> tuple[int, int, int, int]:
    """Return parameters in billions (0 if the name does not tell), batch, prompt and new tokens."""
    speed, named = cell.settings["task"]["speed"], re.search(r"-([0-9]+)b\b", cell.model)
    size = int(named[1]) if named else 0
    return size, int(speed["batch_size"]), int(cell.settings["dataset"].get("prompt_tokens", 0)), speed["new_tokens"]


def _versions(cell: CellResult) -> str:
    told = (f"{name} {cell.environment.get(name) or 'not recorded'}" for name in ("torch", "triton", "transformers"))
    return ", ".join(told)


def _copy(cell: CellResult) -> float:
    """Return the bandwidth of the copy that the cell itself saw, in bytes a second."""
    return cell.own_bandwidth or cell.measurements[BANDWIDTH].value


def _row(cell: CellResult, fastest: float) -> list[str]:
    """Return the row of a cell; its roof is that of the `fastest` copy that any cell of its GPU saw."""
    size, batch, prompt_tokens, new_tokens = _sizes(cell)
    found = cell.measurements
    noise = ", noisy" if timing_noise(cell) else ""
    share = found["roof_share_fraction"].value * found[BANDWIDTH].value / fastest
    policy = cell.policy if cell.positions == "original" else f"{cell.policy} ({cell.positions})"
    return [
        f"{size}B B{batch} {prompt_tokens:,}+{new_tokens}",
        policy + noise,
        f"{found['ttft_ms'].value:,.0f} ms",
        _ratio(found["ttft_ratio_to_full"]),
        f"{found['tpot_ms'].value:.2f} ms",
        _ratio(found["tpot_ratio_to_full"]),
        f"{share:.0%}".replace("%", " %"),
        *(_of_all_devices(cell, name) for name in ("kv_stored_bytes", "peak_memory_bytes")),
    ]


def _of_all_devices(cell: CellResult, name: str) -> str:
    """Return the bytes in all, and of each device where there are several."""
    each = [cell.measurements.get(f"device{number}_{name}") for number in range(MAX_DEVICES)]
    shares = " + ".join(f"{one.value / 2**30:.2f}" for one in each if one is not None)
    return _gibibytes(cell.measurements.get(name)) + (f" ({shares})" if shares else "")


def _ratio(estimate: Estimate) -> str:
    low, high = estimate.bounds
    return f"{estimate.value:.3f} [{low:.3f}, {high:.3f}]"


def _gibibytes(estimate: Estimate | None) -> str:
    return "-" if estimate is None else f"{estimate.value / 2**30:.2f} GiB"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables or write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="results folders; results/published/speed_* if none")
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(REPO)}")
    asked = parser.parse_args(arguments)
    tables = speed_tables(asked.folders or published_folders())
    if asked.write:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), tables), encoding="utf-8")
    else:
        print(tables)


if __name__ == "__main__":
    main()
