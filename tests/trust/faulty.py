"""Let the n-th call to the file system fail, for every n, and see that nothing wrong is ever stored.

python -m tests.trust.faulty FOLDER NUM_CELLS FAULT...      prints one JSON line: {"runs": ..., "wrong": [...]}
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvbench.errors import KvbenchError
from kvbench.results.store import RecordStore
from tests.trust.fake_sweep import cells, write

CALLS = ("open", "write", "fsync", "link", "mkdir", "unlink", "close")
FAULTS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EDQUOT": errno.EDQUOT, "short write": 0}
FINISHED, TOLD, WRONG = 0, 3, 4


class Fault:
    """Counts the calls of one name that concern the results, and spoils the n-th."""

    def __init__(self, name: str, number: int, code: int) -> None:
        self.name, self.left, self.code = name, number, code
        self.hit = False
        self._real: Callable[..., Any] = getattr(os, name)
        setattr(os, name, self)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if _is_of_results(self.name, arguments):
            self.left -= 1
            if self.left == 0:
                self.hit = True
                if self.code == 0:
                    return self._real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                raise OSError(self.code, os.strerror(self.code))
        return self._real(*arguments, **options)


def _is_of_results(name: str, arguments: tuple[Any, ...]) -> bool:
    if name in ("write", "fsync", "close"):
        return arguments[0] > 2 and str(Path(f"/proc/self/fd/{arguments[0]}").readlink()).startswith(sys.argv[1])
    return str(arguments[0]).startswith(sys.argv[1])


def attempt(folder: Path, num_cells: int, name: str, number: int, code: int) -> int:
    """Run the sweep in a child with one fault; return how it ended, as an exit code."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    fault = Fault(name, number, code)
    try:
        write(folder, lambda *words: None, num_cells=num_cells)
        os._exit(FINISHED if not fault.hit else FINISHED + 1)
    except KvbenchError as error:
        told = str(error)
        os._exit(TOLD if "\n" not in told and str(folder) in told and len(told) < 400 else WRONG)
    except BaseException as error:
        print(f"{name} {number}: {type(error).__name__}: {error}", file=sys.stderr)
        os._exit(WRONG)


def resumed(folder: Path, num_cells: int) -> list[Any]:
    """Run the sweep again without faults; return the quality of its cells."""
    pid = os.fork()
    if pid == 0:
        write(folder, lambda *words: None, num_cells=num_cells)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    store = RecordStore(folder)
    bodies = [store.accepted(key) for key in list(cells())[:num_cells]]
    return [None if body is None else [body["measurements"]["ppl"], body["samples"]] for body in bodies]


def main(root: Path, num_cells: int, faults: list[str]) -> None:
    """Go through every call and every fault."""
    truth, runs, wrong = resumed(root / "undisturbed", num_cells), 0, []
    for name in CALLS:
        for fault in faults:
            code = FAULTS[fault]
            if code == 0 and name != "write":
                continue
            number, ended = 0, TOLD
            while ended != FINISHED:
                number, runs = number + 1, runs + 1
                folder = root / "disturbed"
                ended = attempt(folder, num_cells, name, number, code)
                if ended == WRONG or resumed(folder, num_cells) != truth:
                    wrong.append(f"{fault} at {name} number {number}")
                shutil.rmtree(folder)
            assert number > 3 or name in ("mkdir",), f"{name} was hardly ever called"
    print(json.dumps({"runs": runs, "wrong": wrong}))


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # counted, but not waited for
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
