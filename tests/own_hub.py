"""A hub of our own: the few answers of huggingface.co that a download asks for, on this machine."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """Repositories by name: what each revision points to, and the files of each commit.

    `asked` are the paths that were asked for, in order.
    """

    url: str = ""
    revisions: dict[str, dict[str, str]] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def push(self, repository: str, files: dict[str, bytes], revision: str = "main") -> str:
        """A new commit of these files, to which the revision points from now on."""
        text = "".join(_digest(name, content) for name, content in sorted(files.items()))
        commit = _digest(repository, text.encode())
        self.commits[commit] = files
        self.revisions.setdefault(repository, {}).update({revision: commit, commit: commit})
        return commit

    @property
    def fetched(self) -> set[str]:
        """The names of the files whose bytes were sent."""
        return {
            unquote(path.split("/", 5)[5])
            for path in self.asked
            if path.startswith("GET /") and "/resolve/" in path
        }

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content."""
        words = [unquote(word) for word in path.strip("/").split("/")]
        kind = words[0:2] if words[0] == "api" else []
        repository = "/".join(words[2:4] if kind else words[0:2])
        if repository not in self.revisions:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        rest = words[4:] if kind else words[2:]
        asked = rest[1] if len(rest) > 1 else "main"
        commit = self.revisions[repository].get(asked)
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = self.commits[commit]
        if kind and rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": _digest(name, content)}
                for name, content in files.items()
            ]
            return 200, {}, json.dumps(entries).encode()
        if kind:
            named = {"id": repository, "sha": commit, "siblings": [{"rfilename": f} for f in files]}
            return 200, {}, json.dumps(named).encode()
        name = "/".join(rest[2:])
        content = files.get(name)
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"ETag": f'"{_digest(name, content)}"', "X-Repo-Commit": commit}, content


def _digest(name: str, content: bytes) -> str:
    """Another for each file, so that none is taken for one that is there already."""
    return hashlib.sha1(name.encode() + b"\0" + content).hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub that answers at its `url` until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            path = urlsplit(self.path).path
            hub.asked.append(f"{self.command} {path}")
            status, headers, content = hub.answer(path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_GET = do_HEAD = respond

        def log_message(self, *_: Any) -> None:
            """Nothing: what was asked is in `asked`."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
