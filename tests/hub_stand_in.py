"""A stand-in for the Hub's plain HTTP path, for the real client: repositories, preupload, LFS, commits, tags, refs.

It keeps everything in memory. `fail` names a request that goes wrong: `(method, part of the path)` -> a status with a
message, or `None` for a connection that is cut, and how often.
"""

import base64
import hashlib
import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = "hf_goodTokenOfTheStandIn0123456789"
# What the real Hub sends for a model: small texts are plain commits, weights go through LFS.
LFS_SUFFIXES = (".safetensors", ".mp4", ".png")


class Hub:
    """The state of the stand-in.

    Attributes:
        repos: Repository -> {"files": {name: bytes}, "commits": [oid], "tags": {tag: oid}, "private": bool,
            "pulls": [{name: bytes}]}.
        blobs: Contents that came through LFS, by SHA-256.
        requests: (method, path) of every request.
        fail: See the module.
    """

    def __init__(self):
        self.repos, self.blobs, self.requests, self.fail = {}, {}, [], {}
        self.url = None

    def add(self, name, files=()):
        """A repository that exists already."""
        self.repos[name] = {"files": dict(files), "commits": ["0" * 40], "tags": {}, "private": False, "pulls": []}

    def count(self, method, part):
        """How many requests of this kind came."""
        return sum(how == method and part in path for how, path in self.requests)


@contextmanager
def stand_in():
    """Runs a `Hub` on a local port."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """Nothing: the test tells what it must."""

    def do_GET(self):
        self.handle_request("GET")

    def do_POST(self):
        self.handle_request("POST")

    def do_PUT(self):
        self.handle_request("PUT")

    def handle_request(self, method):
        hub, path = self.hub, self.path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append((method, path))
        for (how, part), plan in hub.fail.items():
            if how == method and part in path and plan["times"] > 0:
                plan["times"] -= 1
                if plan["status"] is None:
                    # Closing alone would leave it open for the files that wrap it.
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return None
                return self.reply(plan["status"], {"error": plan["message"]})
        # Uploads carry their permission in the address, and metadata is validated for everybody.
        open_to_all = path.startswith(("/lfs/", "/api/validate-yaml"))
        if not open_to_all and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "Invalid username or password."})
        path = path.split("?")[0]
        if method == "PUT" and path.startswith("/lfs/"):
            hub.blobs[hashlib.sha256(body).hexdigest()] = body
            return self.reply(200, {})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        name = "/".join(path.removeprefix("/api/models/").lstrip("/").split("/")[:2]).removesuffix(".git")
        if name not in hub.repos:
            return self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        repo, rest = hub.repos[name], path.split(name, 1)[1]
        if rest.startswith("/preupload/"):
            answer = []
            for file in json.loads(body)["files"]:
                mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
                known = repo["files"].get(file["path"])
                oid = None if known is None else _object_id(known, mode)
                answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            return self.reply(200, {"files": answer})
        if rest == ".git/info/lfs/objects/batch":
            objects = []
            for item in json.loads(body)["objects"]:
                upload = {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}
                objects.append(item | ({} if item["oid"] in hub.blobs else {"actions": upload}))
            return self.reply(200, {"transfer": "basic", "objects": objects})
        if rest.startswith("/commit/"):
            return self.commit(name, repo, body)
        if rest.startswith("/tree/"):
            return self.reply(200, [{"type": "file", "path": path, "size": len(content), "oid": _object_id(content)}
                                    for path, content in repo["files"].items()])  # fmt: skip
        if rest.startswith("/tag/"):
            tag = json.loads(body)["tag"]
            if tag in repo["tags"]:
                return self.reply(409, {"error": f"Tag {tag} exists"})
            repo["tags"][tag] = rest.removeprefix("/tag/")
            return self.reply(200, {})
        if rest.startswith("/refs"):
            tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid} for tag, oid in repo["tags"].items()]
            return self.reply(200, {"branches": [], "converts": [], "tags": tags})
        siblings = [{"rfilename": path} for path in repo["files"]]
        return self.reply(200, {"id": name, "sha": repo["commits"][-1], "private": repo["private"],
                                "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def create(self, wanted):
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repos:
            return self.reply(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        self.hub.add(name)
        self.hub.repos[name]["private"] = wanted.get("private") or wanted.get("visibility") == "private"
        return self.reply(200, {"url": f"{self.hub.url}/{name}"})

    def validate(self, content):
        errors = []
        try:
            data = yaml.safe_load(content.split("---\n")[1])
            if data.get("license") == "other" and "license_name" not in data:
                errors.append({"message": '"license_name" is required'})
            if data.get("license") not in ("apache-2.0", "mit", "other"):
                errors.append({"message": '"license" must be one of [apache-2.0, mit, ...]'})
            results = data.get("model-index", [{}])[0].get("results", [])
            if not all({"task", "dataset", "metrics"} <= set(result) for result in results):
                errors.append({"message": '"model-index[0].results" is incomplete'})
        except (yaml.YAMLError, IndexError) as error:
            errors.append({"message": str(error)})
        return self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def commit(self, name, repo, body):
        files = dict(repo["files"])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(body + str(len(repo["commits"])).encode()).hexdigest()
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None}
        if "create_pr=1" in self.path:
            repo["pulls"].append(files)
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{len(repo['pulls'])}"
        else:
            repo["files"], repo["commits"] = files, [*repo["commits"], oid]
        return self.reply(200, answer)

    def reply(self, status, content, headers=None):
        body = json.dumps(content).encode()
        self.send_response(status)
        message = content.get("error") if isinstance(content, dict) else None
        shown = {"X-Error-Message": message} if message else {}
        for key, value in {"Content-Type": "application/json", **shown, **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _object_id(content, mode="lfs"):
    if mode == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
