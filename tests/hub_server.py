"""A local server that speaks as much of the Hugging Face hub's protocol as litezoo uses.

Files are served with ETag, length and ranges, as are those of a plain web server; repositories can
be made, and committed to with large files (LFS). Faults can be switched on.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """`files` is {path: bytes}; `cut` gives after how many bytes the next answers break off."""

    daemon_threads = True

    def __init__(self, files=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(files or {})
        self.requests = []  # (method, path, Range)
        self.cut = []
        self.status = None  # answer everything with this error
        self.lie = False  # say the true length, send other bytes
        self.truncated = False  # send half as if it were all
        self.uploads = {}
        self.repositories = set()
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def gets(self):
        return [(p, r) for method, p, r in self.requests if method == "GET" and "/api/" not in p]

    def stop(self):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply_json(self, value):
        self.reply(200, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self):
        codes = {401: "GatedRepo", 404: "EntryNotFound"}
        status = self.server.status or 404
        self.reply(status, X_Error_Code=codes.get(status, ""), X_Repo_Commit=COMMIT)

    def do_HEAD(self):
        self.download()

    def do_GET(self):
        self.download()

    def download(self):
        ranges = self.headers.get("Range")
        self.server.requests.append((self.command, self.path, ranges))
        content = self.server.files.get(self.path)
        if content is None or self.server.status:
            return self.refuse()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if self.command == "GET" and self.server.lie:
            content = bytes(len(content))
        if self.command == "GET" and self.server.truncated:
            content = content[: len(content) // 2]
        status, total = 200, len(content)
        if ranges:
            start = int(re.match(r"bytes=(\d+)-", ranges)[1])
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
            content, status = content[start:], 206
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self.server.cut:
            self.wfile.write(content[: self.server.cut.pop(0)])
            self.close_connection = True
            return None
        return self.wfile.write(content)

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.uploads[self.path.rpartition("/")[2]] = body
        self.reply(200)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(("POST", self.path, None))
        if self.server.status:
            return self.refuse()
        if self.path == "/api/validate-yaml":
            return self.reply_json({})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.repositories.add(name)
            return self.reply_json({"url": f"{self.server.endpoint}/{name}", "id": name})
        if self.path.endswith("/info/lfs/objects/batch"):
            action = self.server.endpoint + "/lfs/"
            return self.reply_json(
                {
                    "transfer": "basic",
                    "objects": [
                        {**o, "actions": {"upload": {"href": action + o["oid"]}}}
                        for o in json.loads(body)["objects"]
                    ],
                }
            )
        if "/preupload/" in self.path:
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for f in json.loads(body)["files"]
            ]
            return self.reply_json({"files": modes})
        if "/commit/" in self.path:
            repository = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            for entry in map(json.loads, body.decode().splitlines()):
                value = entry["value"]
                place = f"/{repository}/resolve/main/{value.get('path')}"
                if entry["key"] == "file":
                    self.server.files[place] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    self.server.files[place] = self.server.uploads[value["oid"]]
            url = f"{self.server.endpoint}/{repository}/commit/{COMMIT}"
            return self.reply_json({"commitUrl": url, "commitOid": COMMIT})
        return self.refuse()
