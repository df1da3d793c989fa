"""The page of scripts/watch.py --web: only for this machine, made anew when somebody looks."""

from __future__ import annotations

import http.server
import threading
import time
import urllib.parse
from typing import TYPE_CHECKING

from family import FINE, Misuse
from pages.build import STATIC, environment
from pages.figures import MARKERS, MUTED, Axis, Figure, Series

if TYPE_CHECKING:
    from watch import Watch

TYPES = {".css": "text/css", ".js": "text/javascript"}


def losses(watch: Watch) -> Figure | None:
    """Running means of the training losses by bytes of text, the record's curve behind them."""
    series = []
    if watch.against:
        points = [(point.seen / 1e6, point.mean) for point in watch.against.band]
        series.append(Series(f"{watch.against.title}, for comparison", points, MUTED))
    for i, run in enumerate(watch.runs.values()):
        if points := [(seen / 1e6, loss) for seen, loss in run.smooth()]:
            series.append(Series(run.name, points, i % len(MARKERS)))
    if not series:
        return None
    return Figure("Loss by bytes", Axis("MB of text", log=True), Axis("BPB", log=True), series,
                  "Running means of the training losses of the runs against bytes of text.",
                  "Running mean over 10 % of the bytes to either side.")


class Page:
    """The page's changing part, kept until a run has written something."""

    def __init__(self, watch: Watch):
        self.watch, self.seen, self.figure, self.looked, self.part = watch, None, None, 0.0, ""
        self.templates, self.lock = environment(), threading.Lock()

    def runs(self) -> str:
        """HTML of the table and the figure; many viewers cost what one does."""
        with self.lock:
            return self.made()

    def made(self) -> str:
        if self.part and time.monotonic() - self.looked < self.watch.options.every / 2:
            return self.part
        rows = self.watch.rows()
        seen = [(run.folder, len(run.lines.steps)) for run in self.watch.runs.values()]
        if seen != self.seen:
            self.seen, self.figure = seen, losses(self.watch)
        template = self.templates.get_template("runs.html")
        self.part = template.render(lines=self.watch.lines(rows), figure=self.figure)
        self.looked = time.monotonic()
        return self.part

    def whole(self) -> str:
        return self.templates.get_template("watch.html").render(
            up="", here="", commit="", runs=self.runs(), every=self.watch.options.every,
            against=self.watch.against)


def handler(page: Page, port: int) -> type[http.server.BaseHTTPRequestHandler]:
    hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Another site's page that resolves its own name to this machine is not answered.
            if self.headers.get("Host") not in hosts:
                return self.answer(421, "text/plain", b"this page is for 127.0.0.1\n")
            path = urllib.parse.urlparse(self.path).path
            static = STATIC / path.lstrip("/")
            if path == "/":
                return self.answer(200, "text/html", page.whole().encode())
            if path == "/runs":
                return self.answer(200, "text/html", page.runs().encode())
            if static.parent == STATIC and static.suffix in TYPES and static.is_file():
                return self.answer(200, TYPES[static.suffix], static.read_bytes())
            return self.answer(404, "text/plain", b"not here\n")

        def answer(self, code: int, kind: str, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_) -> None:
            """Requests are not worth a line."""

    return Handler


def server(watch: Watch, port: int) -> http.server.ThreadingHTTPServer:
    """Bound to loopback; port 0 takes a free one. Raises Misuse where the port is taken.

    A thread a connection: browsers open some that they do not use, and one of these would hold up all others.
    """
    try:
        made = http.server.ThreadingHTTPServer(("127.0.0.1", port), http.server.BaseHTTPRequestHandler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Misuse(f"--web {port}: {reason}; another port, or 0 for a free one") from None
    made.RequestHandlerClass = handler(Page(watch), made.server_port)
    return made


def serve(watch: Watch, port: int) -> int:
    with server(watch, port) as running:
        print(f"http://127.0.0.1:{running.server_port}/  (Ctrl-C ends it)", flush=True)
        running.serve_forever()
    return FINE
