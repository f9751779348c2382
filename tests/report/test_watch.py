"""The page that is served: by HTTP, and in a real browser."""

import http.client
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from halfbyte import cli
from halfbyte.checkpoint.output_lock import output_lock
from halfbyte.errors import ConfigError
from halfbyte.report import watch as module
from halfbyte.report.watch import Watch, WatchServer
from tests.browser import PROGRAM, Page, browser
from tests.cli.test_main import with_source
from tests.report.test_following import WRITER, add, age, step
from tests.report.test_page import EVIL, Checked, journal_lines, write_journal


@pytest.fixture(autouse=True)
def looks_whenever_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LOOKS", 0.0)
    soon = dict.fromkeys(module._SECONDS_BETWEEN_QUESTIONS, 0.1)
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_QUESTIONS", soon)


@contextmanager
def served(*paths: Path, host: str = "127.0.0.1") -> Iterator[WatchServer]:
    with WatchServer(Watch(paths), host, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


Answer = tuple[int, dict[str, str], str]


def ask(server: WatchServer, path: str = "/", method: str = "GET", **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, headers=named)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), text


# --- HTTP ----------------------------------------------------------------------------------------


def test_the_page_and_its_changes(tmp_path: Path) -> None:
    file = tmp_path / "out" / "journal.jsonl"
    with output_lock(tmp_path / "out"), served(tmp_path / "out") as server:
        add(file, {"event": "begin", "total_steps": 20}, step(1, 5.0), step(2, 4.0))
        status, headers, html = ask(server)
        page = Checked(html)
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert "running; last line" in page.text
        assert "2 of 20" in page.text
        status, headers, text = ask(server, "/changes")
        found = json.loads(text)
        assert (status, found["title"], found["over"]) == (200, "10% · out · halfbyte", False)
        assert found["spoken"] == "out: running, 10 % of the steps made"
        assert found["html"] in html
        etag = headers["ETag"]
        assert etag == found["version"]
        assert ask(server, "/changes", If_None_Match=etag)[::2] == (304, "")
        add(file, step(3, 3.0))
        status, headers, text = ask(server, "/changes", If_None_Match=etag)
        assert status == 200
        assert headers["ETag"] != etag
        assert "3 of 20" in json.loads(text)["html"]
        assert json.loads(text)["spoken"] == found["spoken"]  # not every step is spoken of


def test_it_is_right_however_the_run_ends(tmp_path: Path) -> None:
    file = tmp_path / "out" / "journal.jsonl"
    with served(tmp_path / "out") as server:

        def state() -> tuple[str, bool]:
            found = json.loads(ask(server, "/changes")[2])
            return found["spoken"], found["over"]

        assert state() == (
            f"out: waiting for the run to begin: there is no {tmp_path}/out yet",
            False,
        )
        with output_lock(tmp_path / "out"):
            assert state() == ("out: loading: its first step has not begun", False)
            add(file, {"event": "begin", "total_steps": 3}, step(1), step(2))
            add(file, {"event": "evaluation", "step": 2, "loss": 1.5})
            add(file, {"event": "warning", "step": 2, "text": "odd"})
            said = "out: running, 60 % of the steps made, held-out loss 1.5000, 1 warning"
            assert state() == (said, False)
        age(file)
        spoken, over = state()
        assert over
        assert spoken.startswith("out: died after step 2: its process has ended")
        add(file, {"event": "finish", "steps": 3})
        assert state() == ("out: finished, held-out loss 1.5000, 1 warning", True)


def test_several_runs_and_those_that_begin_later(tmp_path: Path) -> None:
    write_journal(tmp_path / "runs" / "a", journal_lines(lora_r=8))
    with served(tmp_path / "runs") as server:
        assert "lora_r" in ask(server)[2]
        write_journal(tmp_path / "runs" / "b", journal_lines(lora_r=64))
        text = ask(server)[2]
        assert "<h1>2 runs</h1>" in text
        assert "a: finished" in text
        assert '<tr><th scope="row">lora_r</th><td>8</td><td>64</td></tr>' in text


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8765", 200),
        ("127.0.0.1", 200),
        ("localhost:9000", 200),  # a forwarded port
        ("LOCALHOST", 200),
        ("[::1]:8765", 200),
        ("evil.example", 403),
        ("evil.example:8765", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("192.168.0.7", 403),
        ("evil.example@localhost", 200),  # the name is localhost: what stands before @ is a user
        ("localhost@evil.example", 403),
        ("[", 403),
        ("", 403),
    ],
)
def test_a_site_whose_name_leads_here_reads_nothing(tmp_path: Path, host: str, status: int) -> None:
    write_journal(tmp_path / "out", journal_lines())
    with served(tmp_path / "out") as server:
        for path in ("/", "/changes"):
            got, _, text = ask(server, path, Host=host)
            assert got == status
            assert ("tiny.gguf" in text) == (status == 200)


def test_on_all_addresses_it_has_its_own_names_only(tmp_path: Path) -> None:
    write_journal(tmp_path / "out", journal_lines())
    with served(tmp_path / "out", host="0.0.0.0") as server:
        assert not server.is_local
        assert server.url == f"http://127.0.0.1:{server.server_port}/"
        for host in ("192.168.0.7:8765", "localhost", os.uname().nodename):
            assert ask(server, Host=host)[0] == 200
        assert ask(server, Host="evil.example")[0] == 403


@pytest.mark.parametrize(
    "path",
    [
        "/journal.jsonl",
        "/../out/journal.jsonl",
        "/%2e%2e/out/config.yaml",
        "//etc/passwd",
        "/changes/../../etc/passwd",
        "/favicon.ico",
    ],
)
def test_no_file_is_served(tmp_path: Path, path: str) -> None:
    write_journal(tmp_path / "out", journal_lines())
    with served(tmp_path / "out") as server:
        status, headers, text = ask(server, path)
        assert (status, text) == (404, "There is nothing here.\n")
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")


def test_other_methods_and_no_content_for_head(tmp_path: Path) -> None:
    write_journal(tmp_path / "out", journal_lines())
    with served(tmp_path / "out") as server:
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(server, method=method)[0] == 501
        status, headers, text = ask(server, method="HEAD")
        assert (status, text) == (200, "")
        assert int(headers["Content-Length"]) > 10_000


def test_what_the_headers_forbid(tmp_path: Path) -> None:
    write_journal(tmp_path / "out", journal_lines())
    with served(tmp_path / "out") as server:
        _, headers, html = ask(server)
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in policy["script-src"]
    assert policy["script-src"].count("sha256-") == html.count("<script>") == 2
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "Access-Control-Allow-Origin" not in headers


def test_nothing_in_a_journal_becomes_markup(tmp_path: Path) -> None:
    lines = journal_lines(**{EVIL: EVIL})
    lines[2] |= {"model": EVIL}
    lines[-1] = {"event": "stopped", "reason": EVIL + "\ud800"}
    out = write_journal(tmp_path / EVIL.replace("/", "_"), lines)
    with served(out) as server:
        html = ask(server)[2]
        read = Checked(html)
        assert (read.count("script"), read.count("img")) == (2, 0)
        assert not [a for _, a in read.tags if any(name.startswith("on") for name in a)]
        assert "alert(1)" in read.text
        spoken = json.loads(ask(server, "/changes")[2])["spoken"]
        assert "alert(1)" in spoken


def test_many_ask_at_once_and_it_looks_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LOOKS", 60.0)
    write_journal(tmp_path / "out", journal_lines())
    watch = Watch([tmp_path / "out"])
    views: list[Any] = []
    threads = [threading.Thread(target=lambda: views.append(watch.view())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(views) == 8
    assert all(view is views[0] for view in views)


# --- the command ---------------------------------------------------------------------------------


def test_a_port_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port}: Address already in use; give anoth"):
            WatchServer(Watch([tmp_path]), "127.0.0.1", port)
        monkeypatch.setattr(module, "DEFAULT_PORT", port)
        with WatchServer(Watch([tmp_path]), "127.0.0.1", None) as server:
            assert port < server.server_port < port + module._FURTHER_PORTS
    with pytest.raises(ConfigError, match=r"cannot listen on nowhere\.invalid"):
        WatchServer(Watch([tmp_path]), "nowhere.invalid", 0)


def test_the_command_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    write_journal(tmp_path / "out", journal_lines())
    words = [sys.executable, "-m", "halfbyte", "watch", str(tmp_path / "out"), "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, env=with_source(), text=True, **pipes) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/", url)
        assert found
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=10)
        connection.request("GET", "/")
        assert b"tiny.gguf" in connection.getresponse().read()
        connection.close()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
        assert process.returncode == 130
    assert said.endswith("halfbyte watch: interrupted\n")
    assert "Traceback" not in said


def test_what_is_no_run_is_refused_before_anything_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("hello\n")
    assert cli.main(["watch", str(tmp_path / "notes.txt")]) == 2
    assert "is not the journal of a run" in capsys.readouterr().err
    assert cli.main(["watch"]) == 2
    assert "`runs` is missing" in capsys.readouterr().err
    assert cli.main(["watch", "out", "--port", "65536"]) == 2
    assert "`port`" in capsys.readouterr().err


# --- the browser ---------------------------------------------------------------------------------

in_a_browser = pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed")
CONTROLS = {"button", "link", "progressbar", "image", "DisclosureTriangle", "textbox"}


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.textContent.trim()"))


@in_a_browser
def test_a_run_from_its_beginning_to_its_end(tmp_path: Path, tab: Page) -> None:
    """The page follows without being loaded again, and keeps what the reader has done to it."""
    out = tmp_path / "out"
    file = out / "journal.jsonl"
    *begun, last = (line for line in journal_lines() if line["event"] != "finish")
    with served(out) as server, output_lock(out):
        tab.open(server.url)
        tab.wait("document.querySelector('.state').textContent.startsWith('loading')")
        add(file, *begun[:14])
        tab.wait("document.querySelectorAll('figure').length >= 5")
        assert tab.evaluate("document.querySelector('progress').value") == 10
        # Opened by the keyboard, a table of values stays open, and the focus stays.
        for _ in range(20):
            tab.press("Tab")
            if focused(tab) == "Values":
                break
        assert focused(tab) == "Values"
        tab.press("Enter")
        tab.wait("document.querySelector('figure details').open")
        tab.evaluate("window.same = document.querySelector('figure svg'); window.scrollTo(0, 200)")
        spoken = tab.evaluate("document.querySelector('#spoken').textContent")
        add(file, begun[14])
        tab.wait("document.querySelector('progress').value === 11")
        assert tab.evaluate("document.querySelector('figure svg') === window.same")
        assert tab.evaluate("document.querySelector('figure details').open")
        assert tab.evaluate("document.querySelectorAll('figure td').length") >= 11
        assert focused(tab) == "Values"
        assert tab.evaluate("window.scrollY") == 200
        assert tab.evaluate("document.querySelector('#spoken').textContent") == spoken
        add(file, *begun[15:], last)
        tab.wait("document.title.startsWith('100%')")
        assert "100 % of the steps" in tab.evaluate("document.querySelector('#spoken').textContent")
        add(file, journal_lines()[-1])
        tab.wait("document.querySelector('.state').textContent === 'finished'")
    tab.wait("document.querySelector('#link').textContent.includes('does not answer')")
    assert all(one.startswith((server.url, "data:")) for one in tab.requests)
    assert {one.removeprefix(server.url) for one in tab.requests} >= {"", "changes"}
    assert [one for one in tab.problems if "ERR_CONNECTION_REFUSED" not in one] == []


@in_a_browser
def test_a_killed_run_is_seen_and_updates_can_be_paused(tmp_path: Path, tab: Page) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-c", WRITER, str(out)]
    with (
        served(out) as server,
        subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        process.stdout.readline()
        tab.open(server.url)
        state = "document.querySelector('.state').textContent"
        tab.wait(f"{state}.startsWith('running')")
        for _ in range(20):
            tab.press("Tab")
            if focused(tab) == "Pause updates":
                break
        tab.press("Enter")
        tab.wait("document.querySelector('#pause').textContent === 'Go on updating'")
        process.send_signal(signal.SIGKILL)
        process.wait()
        count = len(tab.requests)
        tab.evaluate("new Promise((done) => setTimeout(done, 500))")
        assert len(tab.requests) == count
        assert tab.evaluate(state).startswith("running")
        tab.press("Enter")
        tab.wait(f"{state}.startsWith('died after step 1')")
        assert "died" in tab.evaluate("document.querySelector('#spoken').textContent")


@in_a_browser
def test_everything_has_a_name_and_fits(tmp_path: Path, tab: Page) -> None:
    """For a screen reader, on a phone, at 200 % zoom, in dark colours."""
    lines = journal_lines()
    lines.append({"event": "warning", "step": 3, "text": "the loss jumped"})
    runs = [write_journal(tmp_path / name, lines) for name in ("a", "b")]
    with output_lock(tmp_path / "c"), served(*runs, tmp_path / "c") as server:
        add(tmp_path / "c" / "journal.jsonl", *journal_lines()[:12])
        tab.open(server.url)
        tab.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        tree = tab.tree()
        roles = {role for role, _ in tree}
        assert {"main", "banner", "heading", "status", "progressbar"} <= roles
        assert {"image", "table", "button", "group"} <= roles
        assert [role for role, name in tree if role in CONTROLS and not name.strip()] == []
        assert tab.evaluate(
            "[...document.querySelectorAll('[tabindex]')].every((one) => one.ariaLabel.trim())"
        )
        levels = tab.evaluate(
            "[...document.querySelectorAll('h1,h2,h3,h4')].map((one) => +one.tagName[1])"
        )
        assert levels[0] == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
        paper = "getComputedStyle(document.body).backgroundColor"
        tab.appear(color_scheme="light")
        light = tab.evaluate(paper)
        tab.appear(color_scheme="dark")
        assert tab.evaluate(paper) != light
        for width in (320, 640, 1280):  # 640: a window of 1280 pixels at 200 %
            tab.appear(width=width)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
        # The values under the pointer.
        tab.evaluate("document.querySelector('.area').scrollIntoView({ block: 'center' })")
        x, y = tab.evaluate(
            "(({ x, y, width, height }) => [x + width / 2, y + height / 2])"
            "(document.querySelector('.area').getBoundingClientRect())"
        )
        tab.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        tab.wait("document.querySelector('.tip')?.textContent.startsWith('step 10')")
