"""A small server on loopback that speaks the Hub's endpoints: commits, resolve, etags, ranges and errors."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_a_test"


class Hub:
    """What the server holds: for each repository its commits, oldest first, each the files by path."""

    def __init__(self) -> None:
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        """Every request: method, path and range."""
        self.cut_at: int | None = None
        """Break the connection after so many bytes of every file."""
        self.serves: dict[str, bytes] = {}
        """Contents to send instead of a file's own, under its own etag."""
        self.url = ""

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        commits = self.repos[repo]
        commits.append({**(commits[-1] if commits else {}), **files})
        return self.name(repo, len(commits) - 1)

    def name(self, repo: str, number: int) -> str:
        return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()

    def find(self, repo: str, revision: str) -> int | None:
        """Return the number of a commit, None where there is no such revision."""
        commits = self.repos[repo]
        if revision == "main":
            return len(commits) - 1 if commits else None
        names = [self.name(repo, number) for number in range(len(commits))]
        return names.index(revision) if revision in names else None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, status: int, content: bytes | object = b"", **headers: str) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if self.hub.cut_at is None else content[: self.hub.cut_at])
            if self.hub.cut_at is not None and len(content) > self.hub.cut_at:
                self.close_connection = True

    def refuse(self, status: int, code: str) -> None:
        self.reply(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def may_not(self, repo: str, *, write: bool = False) -> bool:
        """Refuse who brings no token: to write, and to see that a private repository is there."""
        signed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if write and not signed:
            self.reply(401, {"error": "no"}, X_Error_Message="Invalid credentials in Authorization header")
            return True
        if repo not in self.hub.repos or (repo in self.hub.private and not signed):
            self.refuse(404 if signed else 401, "RepoNotFound")
            return True
        return False

    def note(self) -> None:
        self.hub.asked.append((self.command, self.path, self.headers.get("Range")))

    def do_POST(self) -> None:
        self.note()
        raw = self.body()
        if self.path == "/api/repos/create":
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.reply(401, {"error": "no"}, X_Error_Message="Invalid credentials in Authorization header")
            wanted = json.loads(raw)
            repo = "/".join(filter(None, [wanted.get("organization"), wanted["name"]]))
            if repo in self.hub.repos:
                return self.reply(409, {"url": f"{self.hub.url}/{repo}"})
            self.hub.repos[repo] = []
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.hub.private.add(repo)
            return self.reply(200, {"url": f"{self.hub.url}/{repo}"})
        if self.path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        repo = re.match(r"/(?:api/models/)?([^/]+/[^/.]+)", self.path)[1]
        if self.may_not(repo, write=True):
            return None
        if "/preupload/" in self.path:
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(raw)["files"]
            ]
            return self.reply(200, {"files": [mode | {"shouldIgnore": False} for mode in modes]})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
                for one in json.loads(raw)["objects"]
            ]
            return self.reply(200, {"transfer": "basic", "objects": objects})
        assert "/commit/" in self.path
        files = {}
        for line in map(json.loads, raw.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        name = self.hub.commit(repo, files)
        return self.reply(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{name}", "commitOid": name})

    def do_PUT(self) -> None:
        self.note()
        content, oid = self.body(), self.path.rsplit("/", 1)[-1]
        if hashlib.sha256(content).hexdigest() != oid:
            return self.reply(400)
        self.hub.large[oid] = content
        return self.reply(200)

    def do_GET(self) -> None:
        self.note()
        listed = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^?]+)(?:\?.*)?", self.path)
        asked = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)", self.path):
            return self.may_not(found[1]) or self.reply(200, {"id": found[1], "siblings": []})
        if not listed and not asked:  # the client asks for other things besides
            return self.reply(404)
        repo, revision = (listed or asked).groups()[:2]
        if self.may_not(repo):
            return None
        number = self.hub.find(repo, revision)
        if number is None:
            return self.refuse(404, "RevisionNotFound")
        files = self.hub.repos[repo][number]
        if listed:
            return self.reply(200, [self.entry(path, content) for path, content in files.items()])
        path, commit = asked[3], self.hub.name(repo, number)
        if path not in files:
            return self.refuse(404, "EntryNotFound")
        entry = self.entry(path, files[path])
        headers = {"X_Repo_Commit": commit, "ETag": f'"{entry["oid"]}"', "Accept_Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X_Linked_ETag": f'"{entry["lfs"]["oid"]}"', "X_Linked_Size": str(entry["size"])}
        content = self.hub.serves.get(path, files[path])
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if begin:
            first = int(begin[1])
            headers["Content_Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            return self.reply(206, content[first:], **headers)
        return self.reply(200, content, **headers)

    do_HEAD = do_GET

    def entry(self, path: str, content: bytes) -> dict:
        found = {"type": "file", "path": path, "size": len(content)}
        found["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if path.endswith(".safetensors"):
            large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
            found["lfs"] = large
        return found


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
