"""A small Hub on loopback, for the real `huggingface_hub` client: repositories with commits, branches and pull
requests, preupload, LFS batch and upload, resolve with ETag, redirect and range.

It keeps all in memory, checks what it gets (tokens, digests, parents, LFS objects that a commit names) and can be told
to fail: to refuse with a status, to drop the connection before it works, to work and lose the answer, or to send half
of a file. It offers no xet storage, which the client uses wherever `hf_xet` is installed: `HF_HUB_DISABLE_XET` keeps it
to LFS.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITING, READING = "hf_writesTheModels", "hf_readsTheModels"
TOKENS = {WRITING: ("me", "write"), READING: ("me", "read")}
LFS_SUFFIXES = (".safetensors", ".png", ".bin")
MODEL = r"(?P<repo>[^/]+/[^/]+)"
# the connection before the request is worked on; the answer to it; the second half of a file
DROP, LOSE, HALVE = "drop", "lose", "halve"


@dataclass
class Repository:
    """Commits are snapshots: path → (content, whether it is in LFS)."""

    private: bool = False
    commits: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, tuple[bytes, bool]], message: str) -> str:
        names = sorted((path, hashlib.sha256(content).hexdigest()) for path, (content, _) in files.items())
        sha = hashlib.sha1(repr((self.refs.get(ref), len(self.commits), names, message)).encode()).hexdigest()
        self.commits[sha], self.refs[ref], self.messages[sha] = files, sha, message
        return sha

    def files(self, ref: str = "main") -> dict[str, bytes]:
        return {path: content for path, (content, _) in self.commits[self.refs[ref]].items()}


@dataclass
class Failure:
    method: str
    path: str
    how: int | str
    times: int


class RefusalError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


class HubServer(ThreadingHTTPServer):
    """The server and what it holds; `requests` is what it was asked, in order,
    with the range."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.failures: list[Failure] = []
        self.waits: list[float] = []  # that the client made between its tries, if a test records them
        self.lock = Lock()

    def fail(self, method: str, path: str, how: int | str, times: int = 1) -> None:
        """Fail the next requests whose path matches: with a status, or by `DROP`, `LOSE` or `HALVE`."""
        self.failures.append(Failure(method, path, how, times))

    def count(self, method: str, path: str) -> int:
        return sum(method == asked and bool(re.search(path, url)) for asked, url in self.requests)

    def handle_error(self, request, client_address) -> None:
        """A client that is gone is no error of the tests."""


@contextmanager
def running() -> Iterator[HubServer]:
    server = HubServer()
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_) -> None:
        pass

    def work(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        asked = f"{self.path} {self.headers['Range']}" if "Range" in self.headers else self.path
        with self.server.lock:
            self.server.requests.append((self.command, asked))
            how = self._failure(path)
        self.halve = how == HALVE
        if how == DROP:
            self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0))))
            self._hang_up()
            return
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            if isinstance(how, int):
                raise RefusalError(how, "the server was told to refuse")
            for method, pattern, action in ROUTES:
                if method == self.command.replace("HEAD", "GET") and (found := re.fullmatch(pattern, path)):
                    with self.server.lock:
                        answer = action(self, **found.groupdict())
                    break
            else:
                raise RefusalError(404, f"nothing at {path}", "EntryNotFound" if "/resolve/" in path else "")
        except RefusalError as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            self.answer({"error": refusal.message}, refusal.status, {**headers, "X-Error-Message": refusal.message})
            return
        if how == LOSE:
            self._hang_up()
        elif answer is not None:
            self.answer(answer)

    do_GET = do_HEAD = do_POST = do_PUT = work  # noqa: N815, names that http.server gives

    def _failure(self, path: str) -> int | str | None:
        for failure in self.server.failures:
            if failure.times and failure.method == self.command and re.search(failure.path, path):
                failure.times -= 1
                return failure.how
        return None

    def _hang_up(self) -> None:
        """Reset the connection, as one that breaks."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.halve:
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(data)

    # Who asks, and for what

    def user(self) -> tuple[str, str] | None:
        """Name and role of the token; None without one."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in TOKENS:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return TOKENS.get(given)

    def repository(self, repo: str, write: bool = False) -> Repository:
        user, found = self.user(), self.server.repositories.get(repo)
        if found is None or (found.private and user is None):
            raise RefusalError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self.check_may_write(repo)
        return found

    def check_may_write(self, repo: str) -> None:
        user = self.user()
        if user is None:
            raise RefusalError(401, "Unauthorized")
        if user != (repo.partition("/")[0], "write"):
            raise RefusalError(403, f"You don't have the rights to write to {repo}")

    def revision(self, repository: Repository, revision: str) -> str:
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # What it does

    def who(self):
        user = self.user()
        if user is None:
            raise RefusalError(401, "Unauthorized")
        return {"type": "user", "name": user[0], "orgs": [], "auth": {"accessToken": {"role": user[1]}}}

    def create(self):
        asked = json.loads(self.body)
        user = self.user()
        if user is None:
            raise RefusalError(401, "Unauthorized")
        repo = f"{asked.get('organization') or user[0]}/{asked['name']}"
        self.check_may_write(repo)
        answer = {"url": f"{self.server.url}/{repo}", "name": repo}
        if repo in self.server.repositories:
            self.answer({"error": "You already created this model repo", **answer}, 409)
            return None
        made = Repository(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        made.commit("main", {".gitattributes": (b"*.safetensors filter=lfs\n", False)}, "initial commit")
        self.server.repositories[repo] = made
        return answer

    def validate(self):
        return {"errors": [], "warnings": []}

    def branch(self, repo: str, branch: str):
        found = self.repository(repo, write=True)
        if branch in found.refs:
            raise RefusalError(409, "Reference already exists")
        found.refs[branch] = found.refs["main"]
        return {}

    def information(self, repo: str, revision: str = "main"):
        found = self.repository(repo)
        sha = self.revision(found, revision)
        siblings = [{"rfilename": path} for path in found.commits[sha]]
        about = {"id": repo, "modelId": repo, "sha": sha, "private": found.private, "siblings": siblings, "tags": []}
        card, _ = found.commits[sha].get("README.md", (b"", False))
        head = re.match(r"---\n(.*?)\n---\n", card.decode(), re.DOTALL)
        return about if head is None else {**about, "cardData": yaml.safe_load(head[1])}

    def tree(self, repo: str, revision: str, folder: str | None = None):
        found = self.repository(repo)
        rows = []
        for path, (content, lfs) in found.commits[self.revision(found, revision)].items():
            row = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            if lfs:
                sha256 = hashlib.sha256(content).hexdigest()
                row["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
            if not folder or path.startswith(folder + "/"):
                rows.append(row)
        if folder and not rows:
            raise RefusalError(404, f"{folder} does not exist", "EntryNotFound")
        return rows

    def preupload(self, repo: str, revision: str):
        # a pull request may be opened by who may only read
        found = self.repository(repo, write="create_pr" not in self.query)
        files = found.commits[self.revision(found, revision)]
        rows = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            lfs = path.endswith(LFS_SUFFIXES)
            row = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if path in files:
                row["oid"] = hashlib.sha256(files[path][0]).hexdigest() if lfs else git_hash(files[path][0])
            rows.append(row)
        return {"files": rows}

    def lfs_batch(self, repo: str):
        found = self.repository(repo)
        asked = json.loads(self.body)
        assert asked["operation"] == "upload"
        rows = []
        for entry in asked["objects"]:
            if entry["oid"] not in found.objects:
                entry["actions"] = {
                    "upload": {"href": f"{self.server.url}/storage/{repo}/{entry['oid']}"},
                    "verify": {"href": f"{self.server.url}/{repo}.git/info/lfs/verify"},
                }
            rows.append(entry)
        return {"transfer": "basic", "objects": rows}

    def lfs_upload(self, repo: str, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusalError(400, "the content is not what was announced")
        self.server.repositories[repo].objects[oid] = self.body
        return {}

    def lfs_verify(self, repo: str):
        asked = json.loads(self.body)
        if len(self.repository(repo).objects.get(asked["oid"], b"")) != asked["size"]:
            raise RefusalError(404, "no such object")
        return {}

    def commit(self, repo: str, revision: str):
        wants_pull_request = "create_pr" in self.query
        found = self.repository(repo, write=not wants_pull_request)
        parent = self.revision(found, revision)
        files, message = dict(found.commits[parent]), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit", parent) != parent:
                    raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in found.objects:
                    raise RefusalError(400, f"{value['path']}: the LFS object was not uploaded")
                files[value["path"]] = (found.objects[value["oid"]], True)
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise RefusalError(400, f"unknown operation {key}")
        number = sum(ref.startswith("refs/pr/") for ref in found.refs) + 1
        ref = f"refs/pr/{number}" if wants_pull_request else revision
        if wants_pull_request:
            found.refs[ref] = parent
        sha = found.commit(ref, files, message)
        request_url = f"{self.server.url}/{repo}/discussions/{number}" if wants_pull_request else None
        return {
            "success": True,
            "commitOid": sha,
            "commitUrl": f"{self.server.url}/{repo}/commit/{sha}",
            "pullRequestUrl": request_url,
        }

    def resolve(self, repo: str, revision: str, file: str) -> None:
        found = self.repository(repo)
        sha = self.revision(found, revision)
        if file not in found.commits[sha]:
            self.answer(
                {"error": "Entry not found"},
                404,
                {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": sha},
            )
            return
        content, lfs = found.commits[sha][file]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{git_hash(content)}"'}
        if lfs:  # lies elsewhere
            sha256 = hashlib.sha256(content).hexdigest()
            elsewhere = {"Location": f"{self.server.url.replace('127.0.0.1', 'localhost')}/cdn/{repo}/{sha256}"}
            linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
            self.answer(b"", 302, {**headers, **elsewhere, **linked})
        else:
            self._content(content, headers)

    def deliver(self, repo: str, oid: str) -> None:
        if "Authorization" in self.headers:
            raise RefusalError(400, "a token for the Hub was sent to another host")
        self._content(self.server.repositories[repo].objects[oid], {"ETag": f'"{oid}"'})

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self.answer(content, 200, {**headers, "Accept-Ranges": "bytes"})
            return
        start, end = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        place = {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
        self.answer(content[start : end + 1], 206, {**headers, **place})


ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", "/api/whoami-v2", Handler.who),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", f"/api/models/{MODEL}", Handler.information),
    ("GET", f"/api/models/{MODEL}/revision/(?P<revision>.+)", Handler.information),
    ("GET", f"/api/models/{MODEL}/tree/(?P<revision>refs/pr/[^/]+|[^/]+)(/(?P<folder>.+))?", Handler.tree),
    ("POST", f"/api/models/{MODEL}/branch/(?P<branch>.+)", Handler.branch),
    ("POST", f"/api/models/{MODEL}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", f"/api/models/{MODEL}/commit/(?P<revision>.+)", Handler.commit),
    ("POST", rf"/{MODEL}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", rf"/{MODEL}\.git/info/lfs/verify", Handler.lfs_verify),
    ("PUT", f"/storage/{MODEL}/(?P<oid>[0-9a-f]+)", Handler.lfs_upload),
    ("GET", f"/cdn/{MODEL}/(?P<oid>[0-9a-f]+)", Handler.deliver),
    ("GET", f"(/datasets)?/{MODEL}/resolve/(?P<revision>refs/pr/[^/]+|[^/]+)/(?P<file>.+)", Handler.resolve),
]
