"""A worker without torch, that does what each cell's configuration says: a script of words."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from kvbench.results.record import MEASURED
from kvbench.sweep.worker import PipeWatcher


def main(job: dict[str, Any], watcher: PipeWatcher) -> None:
    if Path(job["results"], "dies-at-start").exists():
        os._exit(3)
    watcher.hello({"torch": "none", "gpu": os.environ.get("CUDA_VISIBLE_DEVICES", "")})
    for key, spec in zip(job["keys"], job["cells"], strict=True):
        for number, word in enumerate(spec["config"]["script"]):
            watcher.active(key, f"phase {number}")
            watcher.advance(key, 0.5)
            if word.startswith("raw "):
                os.write(job["messages"], word.removeprefix("raw ").encode("latin-1"))
            elif word.startswith("timed "):
                watcher.active(key, "timed", timed=True)
                Path(job["results"], word.removeprefix("timed ")).touch()
            else:
                _do(word, watcher, Path(job["results"]) / f"{key[:16]}.{number}", spec["config"]["body"])
    watcher.bye()
    os._exit(0)


def _do(word: str, watcher: PipeWatcher, mark: Path, body: dict[str, Any]) -> None:
    name, _, value = word.partition(" ")
    if name == "once":
        if mark.exists():
            return
        mark.touch()
        name, _, value = value.partition(" ")
    if name == "done":
        watcher.done({**body, "status": value or "ok", "error": None if value in ("", *MEASURED) else error(value)})
    elif name == "badly":
        watcher.done({"key": body["key"], "error": None, "status": "splendid"})
    elif name == "unwritable":
        deep: list[Any] = []
        for _ in range(500):
            deep = [deep]
        odd = {"text": "half a pair \ud83d", "list": deep, "number": 10**400}[value]
        watcher.done({**body, "status": "ok", "error": None, "samples": [{"id": "a", "text": odd}]})
    elif name == "bye":
        watcher.bye()
        os._exit(0)
    elif name == "signal":
        os.kill(os.getpid(), int(value))
    elif name == "exit":
        os._exit(int(value))
    elif name == "sleep":
        time.sleep(float(value))
    elif name == "beat":
        for _ in range(int(float(value) / 0.1)):
            time.sleep(0.1)
            watcher.beat()
    elif name == "say":
        sys.stderr.write(value + "\n")
        sys.stderr.flush()
    elif name == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def error(status: str) -> dict[str, str]:
    return {"type": status, "message": status, "traceback": ""}
