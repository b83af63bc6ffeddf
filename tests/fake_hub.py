"""A Hugging Face Hub on localhost: repositories, commits and files, as huggingface_hub asks."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse


class Repositories:
    """What the server holds; a commit is a dict from path to bytes, and none is ever lost."""

    def __init__(self) -> None:
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.tokens: set[str] = set()

    def at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.commits.get(name, [])
        names = [hashlib.sha1(f"{name} {i}".encode()).hexdigest() for i in range(len(commits))]
        if revision in ("main", "HEAD"):
            return names[-1], commits[-1]
        return (revision, commits[names.index(revision)]) if revision in names else None


@contextmanager
def serving() -> Iterator[tuple[str, Repositories]]:
    """Its address, and its content."""
    held = Repositories()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            held.tokens.add(self.headers.get("Authorization", ""))
            path = urlparse(self.path).path
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
                if name in held.commits:
                    return self.send({"error": "exists", "url": self.url(name)}, 409)
                held.commits[name] = [{}]
                held.private[name] = asked.get("visibility", "") == "private" or bool(
                    asked.get("private")
                )
                return self.send({"url": self.url(name), "id": name})
            if path == "/api/validate-yaml":  # of a model card
                return self.send({"errors": [], "warnings": []})
            name, action = self.parts(path)
            if action.startswith("preupload/"):
                files = [
                    {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for each in json.loads(body)["files"]
                ]
                return self.send({"files": files})
            if action.startswith("commit/"):
                files = dict(held.commits[name][-1])
                for line in body.splitlines():
                    change = json.loads(line)
                    value = change["value"]
                    if change["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif change["key"] == "deletedFile":
                        del files[value["path"]]
                held.commits[name].append(files)
                found = held.at(name, "main")
                assert found is not None
                url = f"{self.url(name)}/commit/{found[0]}"
                return self.send({"success": True, "commitUrl": url, "commitOid": found[0]})
            return self.send({"error": "unknown"}, 404)

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            if path.startswith("/api/"):
                name, action = self.parts(path)
                what, _, revision = action.partition("/")
                found = held.at(name, revision or "main")
                if found is None:
                    return self.missing("RepoNotFound")
                if what == "tree":
                    entries = found[1].items()
                    return self.send(
                        [
                            {"type": "file", "path": each, "size": len(content), "oid": "0" * 40}
                            for each, content in entries
                        ]
                    )
                siblings = [{"rfilename": each} for each in found[1]]
                about = {"id": name, "modelId": name, "sha": found[0], "siblings": siblings}
                return self.send(about | {"private": held.private[name], "tags": []})
            name, _, rest = path.strip("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            found = held.at(name, revision)
            if found is None or file not in found[1]:
                return self.missing("EntryNotFound")
            content = found[1][file]
            tag = hashlib.sha1(content).hexdigest()
            self.respond(content, 200, {"ETag": f'"{tag}"', "X-Repo-Commit": found[0]})

        do_HEAD = do_GET

        def parts(self, path: str) -> tuple[str, str]:
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            return f"{owner}/{name}", "/".join(rest)

        def url(self, name: str) -> str:
            return f"http://{self.headers['Host']}/{name}"

        def missing(self, code: str) -> None:
            self.send({"error": code}, 404, {"X-Error-Code": code})

        def send(
            self, value: Any, status: int = 200, headers: dict[str, str] | None = None
        ) -> None:
            self.respond(json.dumps(value).encode(), status, headers or {})

        def respond(self, content: bytes, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", held
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
