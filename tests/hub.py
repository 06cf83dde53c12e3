"""A stand-in for the Hugging Face Hub, for tests without a network."""

import base64
import http.server
import json
from typing import Any


class StandIn(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as one file to write and read needs.

    Attributes:
        files: all that it holds, by (repository, path).
        whole: what was downloaded whole, not in ranges of bytes.
    """

    files: dict[tuple[str, str], bytes]
    whole: list[tuple[str, str]]

    def log_message(self, *_: Any) -> None:
        """Say nothing: a test prints only what it is about."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
            self.files.setdefault((name, ".gitattributes"), b"")
            self.answer({"url": f"http://{self.headers['Host']}/{name}", "id": name})
        elif parts[4:5] == ["preupload"]:
            paths = [entry["path"] for entry in json.loads(body)["files"]]
            self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
        elif parts[4:5] == ["commit"]:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.files["/".join(parts[2:4]), entry["value"]["path"]] = content
            self.answer({"commitUrl": f"http://{self.headers['Host']}/c/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self.fail("EntryNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[2:3] != ["resolve"]:
            self.fail("EntryNotFound")
            return
        name, revision, path = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        if name not in {repository for repository, _ in self.files}:
            self.fail("RepoNotFound", 401)
        elif revision not in ("main", "0" * 40):
            self.fail("RevisionNotFound")
        elif (name, path) not in self.files:
            self.fail("EntryNotFound", headers={"X-Repo-Commit": "0" * 40})
        else:
            content, status = self.files[name, path], 200
            if asked := self.headers.get("Range"):
                first, last = map(int, asked.removeprefix("bytes=").split("-"))
                content, status = content[first : last + 1], 206
            elif self.command == "GET":
                self.whole.append((name, path))
            self.answer(content, {"ETag": f'"{hash(name)}"', "X-Repo-Commit": "0" * 40}, status)

    def answer(self, body: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fail(self, code: str, status: int = 404, headers: dict[str, str] | None = None) -> None:
        self.answer({"error": code}, {"X-Error-Code": code, **(headers or {})}, status)
