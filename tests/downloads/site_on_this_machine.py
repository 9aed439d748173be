"""A web server on this machine that misbehaves as told."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    """Serves files by path. ``plan`` names what to do with one request after the other.

    whole: as it should be. cut: close after half of what was announced. stall: the same, and then
    say nothing. short, long: announce half, or twice, of what there is. endless: announce nothing
    and go on. unannounced: announce nothing. A number: answer with that status. range ignored,
    range shifted, range unsaid: answer the wrong part, or do not say which. version ignored: send a
    part of what is no longer the same. elsewhere: redirect to ``target``. packed: claim gzip.
    """

    def __init__(self):
        self.files = {}
        self.tags = {}
        self.plan = []
        self.asked = []
        self.target = None
        self.released = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site._answer(self)

            def log_message(self, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self):
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def url(self, path):
        return f"http://127.0.0.1:{self._server.server_port}/{path}"

    def put(self, path, content, tag=None):
        self.files[path] = content
        self.tags[path] = tag
        return self.url(path)

    def _answer(self, request):
        path = request.path.lstrip("/")
        asked = request.headers.get("Range")
        self.asked.append((path, asked))
        act = self.plan.pop(0) if self.plan else "whole"
        if isinstance(act, int):
            return request.send_error(act)
        if act == "elsewhere":
            request.send_response(302)
            request.send_header("Location", self.target)
            return request.end_headers()
        content, tag = self.files[path], self.tags[path]
        start = 0
        same = act == "version ignored" or request.headers.get("If-Range") == tag
        if asked and same and act != "range ignored":
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(content):
                return request.send_error(416)
            request.send_response(206)
            if act != "range unsaid":
                first = start + 1 if act == "range shifted" else start
                request.send_header(
                    "Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}"
                )
        else:
            request.send_response(200)
        body = content[start:]
        announced = {"short": len(body) // 2, "long": 2 * len(body)}.get(act, len(body))
        if act not in ("endless", "unannounced"):
            request.send_header("Content-Length", str(announced))
        if tag:
            request.send_header("ETag", tag)
        if act == "packed":
            request.send_header("Content-Encoding", "gzip")
        request.end_headers()
        try:
            request.wfile.write(body[: len(body) // 2] if act in ("cut", "stall") else body)
            while act == "endless":
                request.wfile.write(bytes(2**16))
            if act == "stall":
                request.wfile.flush()
                self.released.wait(20)
        except OSError:  # the client has enough
            pass
        return None
