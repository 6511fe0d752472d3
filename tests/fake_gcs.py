"""A bucket of Google Cloud Storage in memory, over HTTP: what its three clients here ask for.

gcsfs (files), TensorStore (Orbax's arrays) and array_record's C++ reader each have an environment
variable that sends them to another address. Objects appear whole when their upload is complete, and
`ifGenerationMatch=0` refuses to replace one, as the store itself does.
"""

import contextlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator


class Bucket:
    """Objects by name, each with the number of its generation."""

    def __init__(self):
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.requests: list[tuple[str, str]] = []  # (method, path) as they came
        self.generation = 0
        self.lock = threading.Lock()

    def put(self, name: str, data: bytes, generation: str | None) -> bool:
        """Whether the object was written: not if it is of another generation than asked for."""
        with self.lock:
            there = self.objects.get(name, (b"", 0))[1]
            if generation is not None and int(generation) != there:
                return False
            self.generation += 1
            self.objects[name] = data, self.generation
            return True

    def about(self, name: str) -> dict:
        data, generation = self.objects[name]
        return {
            "kind": "storage#object", "bucket": "bucket", "name": name, "size": str(len(data)),
            "generation": str(generation), "metageneration": "1",
            "updated": "2026-01-01T00:00:00Z", "timeCreated": "2026-01-01T00:00:00Z",
        }  # fmt: skip

    def listing(self, prefix: str, delimiter: str, start: str, end: str) -> dict:
        names = sorted(n for n in self.objects if n.startswith(prefix) and n >= start)
        names = [n for n in names if not end or n < end]
        cut = {n: n.find(delimiter, len(prefix)) if delimiter else -1 for n in names}
        folders = {n[: at + 1] for n, at in cut.items() if at >= 0}
        items = [self.about(n) for n, at in cut.items() if at < 0]
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}


class Handler(http.server.BaseHTTPRequestHandler):
    """The JSON API's objects: get, list, insert (of one piece, multipart, resumable), delete."""

    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def handle_one_request(self):
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def do_GET(self):
        path, query = self.asked()
        if re.fullmatch(r"(/storage/v1)?/b/bucket", path):
            return self.answer(200, {"kind": "storage#bucket", "name": "bucket"})
        if re.fullmatch(r"(/storage/v1)?/b/bucket/o/?", path):
            found = [query.get(k, "") for k in ("prefix", "delimiter", "startOffset", "endOffset")]
            return self.answer(200, self.bucket.listing(*found))
        name = urllib.parse.unquote(re.sub(r"^(/download)?(/storage/v1)?/b/bucket/o/", "", path))
        if name not in self.bucket.objects:
            return self.answer(404, {"error": {"code": 404, "message": f"No such object: {name}"}})
        if query.get("alt") != "media":
            return self.answer(200, self.bucket.about(name))
        return self.send_part(*self.bucket.objects[name])

    def send_part(self, data: bytes, generation: int):
        start, stop, status = 0, len(data), 200
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = wanted.groups()
            start = int(first) if first else max(0, len(data) - int(last))
            stop = min(len(data), int(last) + 1) if first and last else len(data)
            status = 206
        headers = {"x-goog-generation": str(generation)}
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self.answer(status, data[start:stop], headers)

    def do_POST(self):
        path, query = self.asked()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name = query.get("name") or query.get("upload")
        if query.get("uploadType") == "resumable":
            name = name or json.loads(body)["name"]
            kept = {"upload": name, "ifGenerationMatch": query.get("ifGenerationMatch", "")}
            where = f"http://{self.headers['Host']}{path}?{urllib.parse.urlencode(kept)}"
            return self.answer(200, {}, {"Location": where})
        if query.get("uploadType") == "multipart":
            mark = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            about, data = body.split(b"--" + mark)[1:3]
            name = json.loads(re.split(rb"\r?\n\r?\n", about, maxsplit=1)[1])["name"]
            body = re.sub(rb"\r?\n\Z", b"", re.split(rb"\r?\n\r?\n", data, maxsplit=1)[1])
        return self.inserted(name, body, query.get("ifGenerationMatch") or None)

    do_PUT = do_POST  # noqa: N815

    def inserted(self, name: str, data: bytes, generation: str | None):
        if not self.bucket.put(name, data, generation):
            return self.answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
        return self.answer(200, self.bucket.about(name))

    def do_DELETE(self):
        path, _ = self.asked()
        name = urllib.parse.unquote(path.partition("/o/")[2])
        gone = self.bucket.objects.pop(name, None) is None
        return self.answer(404 if gone else 204, {"error": {"code": 404}} if gone else b"")

    def asked(self) -> tuple[str, dict[str, str]]:
        path, _, query = self.path.partition("?")
        self.bucket.requests.append((self.command, path))
        return path, dict(urllib.parse.parse_qsl(query, keep_blank_values=True))

    def answer(self, status: int, body, headers: dict[str, str] | None = None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving() -> Iterator[tuple[Bucket, dict[str, str]]]:
    """(the bucket gs://bucket, the environment that leads a process's clients to it)."""
    bucket = Bucket()
    handler = type("OfBucket", (Handler,), {"bucket": bucket})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        yield (
            bucket,
            {
                "STORAGE_EMULATOR_HOST": url,
                "TENSORSTORE_GCS_HTTP_URL": url,
                "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks another service, by gRPC
                "GOOGLE_CLOUD_PROJECT": "test",
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # TensorStore asks nobody for one
            },
        )
        server.shutdown()
