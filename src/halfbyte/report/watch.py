"""Serves the page about runs while they are made, on this machine alone.

The page is that of `report.page`. The server looks at the runs when it is asked, at most twice a
second, and reads only what is new in their journals; the page asks every second for what has
changed. Nothing else is served: there are two routes and no files.

A page of another site must not read it. So a request must name this machine in its ``Host`` header,
which a name that an attacker lets resolve to 127.0.0.1 does not (DNS rebinding), and nothing allows
other origins. The page's content security policy permits no request but to this server.
"""

import errno
import hashlib
import ipaddress
import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from halfbyte.errors import ConfigError
from halfbyte.report.following import FollowedRuns
from halfbyte.report.page import content_policy, contents, resource
from halfbyte.report.runs import Run, number

DEFAULT_PORT = 8765
_FURTHER_PORTS = 20
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_OF_A_REQUEST = 30
_SECONDS_BETWEEN_QUESTIONS = {"live": 1.0, "over": 5.0, "hidden": 15.0}  # of the page
_OVER = ("finished", "stopped", "died")
_ICON = "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'/%3E"


@dataclass(frozen=True)
class View:
    """The page about the runs at some moment.

    Attributes:
        version: Differs whenever anything else does.
        title: Of the page, plain text.
        html: What is in its ``main``.
        spoken: The state in a sentence for screen readers, which changes rarely.
        over: Whether no run is running.
    """

    version: str
    title: str
    html: str
    spoken: str
    over: bool


class Watch:
    """The runs and their page; may be used by several threads."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Watch the runs in ``paths``, and read what there is of them.

        Raises:
            ConfigError: One of them is a file, and not a journal.
        """
        self._runs = FollowedRuns(paths)
        self._lock = threading.Lock()
        self._looked = -_SECONDS_BETWEEN_LOOKS
        self._view: View | None = None

    def view(self) -> View:
        """The page as it is now."""
        with self._lock:
            if time.monotonic() - self._looked >= _SECONDS_BETWEEN_LOOKS:
                changed = self._runs.look()
                self._looked = time.monotonic()
                if changed or self._view is None:
                    self._view = _view(self._runs.runs)
            assert self._view is not None
            return self._view


def _view(runs: Sequence[Run]) -> View:
    title, html = contents(runs)
    if len(runs) == 1 and runs[0].phase == "running":
        title = f"{_share(runs[0]):.0%} · {title}"
    # A journal may hold half a surrogate pair, which JSON can say and UTF-8 cannot.
    html = html.encode(errors="replace").decode()
    spoken = ". ".join(_spoken(run) for run in runs).encode(errors="replace").decode()
    over = all(run.phase in _OVER for run in runs)
    version = hashlib.sha256("\0".join((title, html, spoken)).encode()).hexdigest()[:16]
    return View(f'"{version}"', title, html, spoken, over)


def _share(run: Run) -> float:
    total = number(run.begin.get("total_steps"))
    return min(1.0, run.steps / total) if total else 0.0


def _spoken(run: Run) -> str:
    """What is worth saying: the state, every tenth of a run, evaluations, warnings."""
    said = run.state
    if run.phase == "running":
        said = f"running, {int(10 * _share(run) + 1e-9) * 10} % of the steps made"
    if (loss := run.last("held_out")) is not None:
        said += f", held-out loss {loss:.4f}"
    if count := len(run.warnings):
        said += f", {count} warning{'s' if count > 1 else ''}"
    return f"{run.name}: {said}"


def watch_page(view: View) -> tuple[str, str]:
    """The page as a browser first gets it, and its content security policy."""
    scripts = [resource("page.js"), resource("watch.js")]
    policy = (
        content_policy(*scripts) + "; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<noscript><meta http-equiv="refresh" content="10"></noscript>\n'
        f'<title>{escape(view.title)}</title>\n<link rel="icon" href="{_ICON}">\n'
        f"<style>\n{resource('page.css')}</style>\n</head>\n"
        f'<body data-version="{escape(view.version)}" data-over="{str(view.over).lower()}" '
        f'data-seconds="{escape(json.dumps(_SECONDS_BETWEEN_QUESTIONS))}">\n'
        '<header class="watch"><p>Read from the journal as it is written.</p>'
        '<button type="button" id="pause" hidden>Pause updates</button>'
        '<p id="link" class="warning" role="status"></p>'
        f'<p id="spoken" class="unseen" role="status">{escape(view.spoken)}</p></header>\n'
        f"<main>\n{view.html}\n</main>\n"
        + "".join(f"<script>{one}</script>\n" for one in scripts)
        + "</body>\n</html>\n"
    )
    return text, policy


class _Handler(BaseHTTPRequestHandler):
    server: "WatchServer"
    server_version = "halfbyte"
    sys_version = ""
    timeout = _SECONDS_OF_A_REQUEST

    def do_GET(self) -> None:
        if not self.server.is_named(self.headers.get("Host", "")):
            text = "The Host header names another machine; open the address that was printed.\n"
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", text)
            return
        path = urlsplit(self.path).path
        if path not in ("/", "/changes"):
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", "There is nothing here.\n")
            return
        view = self.server.watch.view()
        if path == "/":
            text, policy = watch_page(view)
            self._answer(HTTPStatus.OK, "text/html", text, policy=policy)
        elif self.headers.get("If-None-Match") == view.version:
            self._answer(HTTPStatus.NOT_MODIFIED, "", "", etag=view.version)
        else:
            text = json.dumps(vars(view))
            self._answer(HTTPStatus.OK, "application/json", text, etag=view.version)

    do_HEAD = do_GET

    def _answer(
        self,
        status: HTTPStatus,
        kind: str,
        text: str,
        *,
        etag: str = "",
        policy: str = "default-src 'none'; frame-ancestors 'none'",
    ) -> None:
        content = text.encode()
        self.send_response(status)
        headers = {
            "Content-Type": kind and f"{kind}; charset=utf-8",
            "Content-Length": "" if status == HTTPStatus.NOT_MODIFIED else str(len(content)),
            "ETag": etag,
            "Cache-Control": "no-cache",
            "Content-Security-Policy": policy,
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged: the page makes one a second."""


class WatchServer(ThreadingHTTPServer):
    """The server. ``serve_forever`` serves until ``shutdown`` is called by another thread."""

    daemon_threads = True

    def __init__(self, watch: Watch, host: str, port: int | None) -> None:
        """Bind to ``host`` and ``port``; without one, to 8765 or one of the next that are free.

        Raises:
            ConfigError: That is not possible.
        """
        self.watch = watch
        self._host = host
        ports = range(DEFAULT_PORT, DEFAULT_PORT + _FURTHER_PORTS) if port is None else [port]
        for last in ports:
            try:
                found = socket.getaddrinfo(host, last, type=socket.SOCK_STREAM)
                self.address_family = found[0][0]
                super().__init__((host, last), _Handler)
                return
            except OSError as error:
                problem = error
                if error.errno != errno.EADDRINUSE:
                    break
        raise ConfigError(
            f"cannot listen on {host}, port {ports[0]}: {problem.strerror or problem}; give "
            "another --port (0 takes one that is free) or --host"
        ) from problem

    def server_bind(self) -> None:
        """Bind, without http.server's look-up of the machine's name, which may ask a server."""
        super(ThreadingHTTPServer, self).server_bind()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """Report errors of ours; a browser that has gone away is none."""
        import sys

        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    @property
    def url(self) -> str:
        """The address for a browser on this machine."""
        host = self._host
        if ipaddress_of(host) is not None and ipaddress.ip_address(host).is_unspecified:
            host = "127.0.0.1"
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}/"

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        address = ipaddress_of(str(self.server_address[0]))
        return address is not None and address.is_loopback

    def is_named(self, host: str) -> bool:
        """Whether a ``Host`` header names this machine, on any port (of a tunnel).

        A page of another site has that site's name in the header, whatever address the name leads
        to; an address cannot be made to lead elsewhere.
        """
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        address = ipaddress_of(name)
        if self.is_local:
            return name == "localhost" or (address is not None and address.is_loopback)
        known = {"localhost", self._host.lower(), os.uname().nodename.lower()}
        return address is not None or name in known


def ipaddress_of(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address, or None if the text is a name."""
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
