"""A server in the place of W&B's that does one wrong thing; with the fault "none" runs arrive whole."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections import Counter, defaultdict
from typing import Any

# What a working server answers, all questions at once: a client reads the part that it asked for.
_PROJECT = {"id": "p", "name": "p", "entity": {"name": "e"}}
_DATA: dict[str, Any] = {
    "viewer": {"id": "v", "entity": "e", "username": "me", "flags": "{}", "teams": {"edges": []}},
    "serverInfo": {"cliVersionInfo": {"max_cli_version": "9.9.9"}, "latestLocalVersionInfo": None, "features": []},
    "model": {"bucket": None},
    "project": None,
    "entity": {"name": "e"},
}
_ARTIFACT = {
    **{"id": "a", "digest": "d", "state": "COMMITTED"},
    "artifactSequence": {"id": "s", "latestArtifact": {"id": "a", "versionIndex": 0}},
}


def _answer_to(query: dict[str, Any], *, crashing: bool) -> dict[str, Any]:
    """Answer a question of W&B's API; one field that is missing crashes its client process."""
    name = str(query.get("variables", {}).get("name") or "r")
    bucket = {"id": "b", "name": name, "displayName": name, "project": _PROJECT, "historyLineCount": 0}
    files = {"runID": "b", "uploadHeaders": [], "files": []}
    data = {
        **_DATA,
        "createRunFiles": files,
        "upsertBucket": {"bucket": bucket, "inserted": True},
        **_about_reports(query),
    }
    return {"data": data if crashing else {**data, "createArtifact": {"artifact": _ARTIFACT}}}


def _about_reports(query: dict[str, Any]) -> dict[str, Any]:
    """Answer what saving a report asks: there is the project `kvbench`, and a report gets the id `view`."""
    text, told = query.get("query", ""), query.get("variables", {})
    if "ProjectInternalId" in text:
        return {"project": {"id": "p", "internalId": "UHJvamVjdDox"} if told["projectName"] == "kvbench" else None}
    if "upsertView" in text:
        return {"upsertView": {"inserted": True, "view": {"id": "view", "name": "n", "spec": told["spec"]}}}
    if "models(" in text:
        page = {"endCursor": None, "hasNextPage": False}
        node = {
            "id": "p",
            "name": "kvbench",
            "entityName": "e",
            "createdAt": "2026-11-23T00:00:00",
            "isBenchmark": False,
            "user": None,
        }
        return {"models": {"edges": [{"node": node, "cursor": ""}], "pageInfo": page}}
    return {}


def _begins_run(query: dict[str, Any]) -> bool:
    # Later questions of this kind only add to the run.
    return "upsertBucket" in query.get("query", "") and bool(query["variables"].get("jobType"))


class FaultServer:
    """Serves on a free port; `fault` says what is wrong, `requests` and `received` tell what came.

    `runs` counts how often each run id was begun, `files` holds what was sent as "run/name", `artifacts` the
    digests sent under each name, and `reports` the spec of each report that was saved, with the id it was saved over.
    """

    def __init__(self, fault: str) -> None:
        self.fault, self.requests, self.received = fault, 0, b""
        self.refuse_after: int | None = None  # this many runs are taken, and no more
        self.runs: Counter[str] = Counter()
        self.files: defaultdict[str, list[bytes]] = defaultdict(list)
        self.artifacts: dict[str, list[str]] = {}
        self.reports: list[tuple[str | None, str]] = []
        self._stop = threading.Event()
        if fault == "silent":
            self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
            self.port = self._socket.getsockname()[1]
            return
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.requests += 1
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                server.received += content
                server.answer(self, content)

            do_GET = do_PUT = do_POST  # noqa: N815  # http.server asks for these names

            def log_message(self, *arguments: Any) -> None:
                """Say nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, handler: http.server.BaseHTTPRequestHandler, question: bytes) -> None:
        """Answer one request in the way of the fault."""
        if self.fault.isdecimal():
            handler.send_error(int(self.fault))
            return
        streaming = "file_stream" in handler.path
        if self.fault == "dies" and streaming:
            handler.connection.close()
            return
        if self.fault == "never ends" and streaming:
            self._stop.wait(120)
            return
        query = json.loads(question) if handler.path.endswith("graphql") else {}
        if self.refuse_after is not None and _begins_run(query) and self.runs.total() >= self.refuse_after:
            handler.send_error(403)
            return
        self._note(query)
        if handler.command == "PUT":
            self.files[handler.path.removeprefix("/upload/")].append(question)
        told = _answer_to(query, crashing=self.fault == "crashes")
        told["data"]["createRunFiles"]["files"] = self._places_of(query.get("variables", {}))
        answer = json.dumps(told).encode()
        content = b"not json" if self.fault == "nonsense" else answer
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        for number in range(len(content)):
            handler.wfile.write(content[number : number + 1])
            if self.fault == "slow" and not self._stop.is_set():
                time.sleep(0.2)

    def _places_of(self, told: dict[str, Any]) -> list[dict[str, Any]]:
        """Return where the files of a run may be sent."""
        start = f"http://127.0.0.1:{self.port}/upload/{told.get('run')}"
        names = told.get("files") or []
        return [{"name": name, "uploadUrl": f"{start}/{name}"} for name in names] if told.get("run") else []

    def _note(self, query: dict[str, Any]) -> None:
        text, told = query.get("query", ""), query.get("variables", {})
        if _begins_run(query):
            self.runs[told["name"]] += 1
        if "createArtifact(" in text:
            made = told["input"]
            self.artifacts.setdefault(made["artifactCollectionName"], []).append(made["digest"])
        if "upsertView" in text:
            self.reports.append((told["id"], told["spec"]))

    def close(self) -> None:
        """Stop serving."""
        self._stop.set()
        if self.fault == "silent":
            self._socket.close()
        else:
            self._server.shutdown()
            self._server.server_close()
