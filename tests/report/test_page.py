"""Pages from journals: of finished runs, of broken ones, of hostile ones."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte import cli
from halfbyte.errors import ConfigError, OutputError
from halfbyte.report import open_report
from halfbyte.report.page import page, write_page
from halfbyte.report.runs import read_run

VOID = {"meta", "link", "path", "br"}
EVIL = "</script><script>alert(1)</script><img src=x onerror=\"alert('&')\">"


class Checked(HTMLParser):
    """Reads a page strictly: every tag is closed in order; collects what a browser would do."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data

    def count(self, tag: str) -> int:
        return sum(one == tag for one, _ in self.tags)


def write_journal(directory: Path, lines: list[dict[str, Any]]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def journal_lines(**config: Any) -> list[dict[str, Any]]:
    """What a run of 20 steps writes."""
    begin = {
        "event": "begin",
        "time": "2026-11-24T12:00:00+00:00",
        "total_steps": 20,
        "model": "tiny.gguf",
        "quant": "nf4",
        "machine": "Two Cores",
        "versions": {"torch": "2.13.0"},
        "config": {"lora_r": 8, "seed": 0, "output": "x"} | config,
        "given": ["lora_r"],
        "data_verdict": {"lines": ["d.jsonl: 3 of 4 rows usable"]},
    }
    steps = [
        {
            "event": "step",
            "step": i,
            "loss": 3 - 0.1 * i,
            "learning_rate": 1e-4,
            "grad_norm": 0.5,
            "tokens": 100,
            "tokens_per_second": 50.0,
            "seconds": 2.0,
            "data_seconds": 0.5,
            "update_seconds": 0.25,
            "peak_memory_bytes": 900_000_000 + i,
        }
        for i in range(1, 21)
    ]
    answers = [{"prompt": "1 + 1?", "expected": "2", "got": "fish"}]
    return [
        {"event": "note", "text": "4-bit it is"},
        {"event": "loaded", "seconds": 4.0, "peak_memory_bytes": 700_000_000},
        begin,
        {"event": "samples", "step": 0, "samples": answers, "seconds": 1.0},
        *steps,
        {
            "event": "memory",
            "step": 20,
            "predicted_bytes": 1e9,
            "ledger": [
                {"group": "base", "name": "codes", "nbytes": 5e8},
                {"group": "base", "name": "scales", "nbytes": 1e8},
                {"group": "trained", "name": "adapters, 5 M", "nbytes": 1e8},
                {"group": "step", "name": "kept for backward", "nbytes": 9e8},
            ],
        },
        {"event": "evaluation", "step": 20, "loss": 1.25, "seconds": 2.0},
        {"event": "samples", "step": 20, "samples": [answers[0] | {"got": "2"}], "seconds": 1.0},
        {"event": "finish", "steps": 20, "seconds": 40.0, "peak_memory_bytes": 950_000_000},
    ]


def test_a_finished_run(tmp_path: Path) -> None:
    run = read_run(write_journal(tmp_path / "first", journal_lines()))
    assert run.finished
    assert run.tokens_per_second == pytest.approx(50)
    assert run.seconds == pytest.approx(
        {
            "loading the model": 4.0,
            "sample answers": 2.0,
            "preparing batches": 10.0,
            "forward and backward": 25.0,
            "optimizer": 5.0,
            "held-out evaluation": 2.0,
        }
    )
    assert run.step_seconds == pytest.approx(
        {"forward and backward": 1.25, "preparing batches": 0.5, "optimizer": 0.25}
    )
    assert run.predicted == [
        ("base", 6e8),
        ("adapters", 1e8),
        ("activations, workspace, program", 3e8),
    ]
    html = page([run])
    read = Checked(html)
    for message in (
        "tiny.gguf · QLoRA, NF4 · Two Cores · 2026-11-24 12:00 UTC",
        "1.2500",
        "950 MB",
        "20 of 20",
        "1.00 GB expected, 950 MB measured: 5.0% less.",
        "d.jsonl: 3 of 4 rows usable",
        "4-bit it is",
    ):
        assert message in read.text
    assert read.text.index("fish") < read.text.index("after 20")
    assert html.count('class="right"') == 1
    assert "http" not in html.replace("http-equiv", "")
    # Each chart has a sentence and a table; the curves are loss, speed, rate and norm.
    pictures = [a for tag, a in read.tags if a.get("role") == "img"]
    assert len(pictures) == 7
    assert all(a["aria-label"] for a in pictures)
    assert pictures[-1]["aria-label"] == "average step 2.0 s"
    assert read.count("figure") == 7 == sum(t == "table" for t, _ in read.tags) - 2


@pytest.mark.parametrize(
    ("device", "options", "message"),
    [
        ("cpu", {}, "processor, with the same versions, every loss is the same. Options"),
        ("cuda", {}, "GPU, with the same versions, every loss is the same but for the order"),
        ("cuda", {"deterministic": True}, "GPU, with the same versions, every loss is the same. O"),
    ],
)
def test_what_would_be_the_same_again(
    device: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    lines = journal_lines(**options)
    for line in lines:
        if line["event"] == "begin":
            line["device"] = device
    assert message in page([read_run(write_journal(tmp_path / "again", lines))])


def test_a_step_is_split_where_the_engine_told_of_its_parts(tmp_path: Path) -> None:
    lines = journal_lines()
    for line in lines:
        if line["event"] == "step":
            line |= {"forward_seconds": 0.4, "loss_seconds": 0.1, "backward_seconds": 0.7}
    run = read_run(write_journal(tmp_path / "split", lines))
    assert list(run.step_seconds) == [
        "preparing batches",
        "forward",
        "loss",
        "backward",
        "optimizer",
        "rest of a step",
    ]
    assert run.step_seconds["backward"] == pytest.approx(0.7)
    assert run.step_seconds["rest of a step"] == pytest.approx(2.0 - 0.5 - 0.25 - 1.2)


def test_a_run_that_is_not_over_says_so(tmp_path: Path) -> None:
    going = write_journal(tmp_path / "going", journal_lines()[:10])
    assert "last update" in Checked(page([read_run(going)])).text
    stopped = [*journal_lines()[:10], {"event": "stopped", "reason": "NonFiniteLossError: step 7"}]
    run = read_run(write_journal(tmp_path / "stopped", stopped))
    assert "stopped: NonFiniteLossError: step 7" in Checked(page([run])).text
    resumed = read_run(write_journal(tmp_path / "resumed", [*stopped, *journal_lines()[2:]]))
    assert resumed.state == "finished"
    empty = read_run(write_journal(tmp_path / "empty", []))
    Checked(page([empty]))


def test_a_torn_journal_is_read_to_its_last_whole_line(tmp_path: Path) -> None:
    directory = write_journal(tmp_path / "torn", journal_lines()[:8])
    file = directory / "journal.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    assert read_run(directory).steps == 3


def test_warnings_are_at_the_top_and_not_endless(tmp_path: Path) -> None:
    warnings = [{"event": "warning", "step": n, "text": f"<b>{n}</b> jumped"} for n in range(10)]
    run = read_run(write_journal(tmp_path / "odd", [*journal_lines(), *warnings]))
    assert run.warnings == [f"<b>{n}</b> jumped" for n in range(10)]
    html = page([run])
    read = Checked(html)
    assert "<b>7</b> jumped" in read.text
    assert "<b>8</b> jumped" not in read.text
    assert "and 2 more, in the journal" in read.text
    assert html.index("jumped") < html.index("<section>")


def test_runs_side_by_side(tmp_path: Path) -> None:
    first = write_journal(tmp_path / "a" / "run", journal_lines(lora_r=8))
    second = write_journal(tmp_path / "b" / "run", journal_lines(lora_r=64))
    runs = [read_run(first), read_run(second)]
    read = Checked(page(runs))
    assert [run.name for run in runs] == ["a/run", "b/run"]
    assert "Where their options differ" in read.text
    cells = re.findall(r"<tr><th scope=\"row\">lora_r</th><td>8</td><td>64</td></tr>", page(runs))
    assert cells
    assert "options that differ" in read.text


def test_paging_is_drawn_where_something_was_paged(tmp_path: Path) -> None:
    lines = journal_lines()
    for line in lines:
        if line["event"] == "step":
            line |= {"paged_bytes": 0, "paging_ms": 0.0}
    assert "state moved" not in page([read_run(write_journal(tmp_path / "still", lines))])
    lines[8] |= {"paged_bytes": 3_000_000, "paging_ms": 1.5}
    html = page([read_run(write_journal(tmp_path / "paged", lines))])
    assert "Optimizer state moved, bytes a step, over steps" in html
    assert "highest 3 MB" in html


def test_nothing_in_a_journal_becomes_markup(tmp_path: Path) -> None:
    lines = journal_lines(**{EVIL: EVIL})
    lines[0]["text"] = EVIL
    lines[2] |= {"model": EVIL, "machine": EVIL, "versions": {EVIL: EVIL}}
    lines[-4]["ledger"][2]["name"] = EVIL
    lines[2]["data_verdict"] = {"lines": [EVIL]}
    evil = dict.fromkeys(("code", "severity", "text", "remedy", "source"), EVIL)
    lines[2]["data_check"] = {"findings": [evil]}
    lines[3]["samples"] = [{"prompt": EVIL, "expected": EVIL, "got": EVIL}]
    runs = [read_run(write_journal(tmp_path / name, lines)) for name in ("a", "b")]
    for html in (page(runs[:1]), page(runs)):
        read = Checked(html)
        assert read.count("script") == 1
        assert read.count("img") == 0
        assert "alert(1)" in read.text
        assert not [a for _, a in read.tags if any(name.startswith("on") for name in a)]


def test_the_page_lets_no_other_script_run_and_fetches_nothing(tmp_path: Path) -> None:
    import base64
    import hashlib

    html = page([read_run(write_journal(tmp_path / "r", journal_lines()))])
    script = html[html.index("<script>") + 8 : html.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in html


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([1e308, -1e308, 5e-324, 10**400])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
FIELDS = [
    *("step", "loss", "tokens", "seconds", "data_seconds", "tokens_per_second", "learning_rate"),
    *(
        "config",
        "ledger",
        "predicted_bytes",
        "versions",
        "samples",
        "data_verdict",
        "data_check",
        "given",
        "total_steps",
        "time",
    ),
    *("peak_memory_bytes", "reason", "text", "quant"),
]
EVENTS = [
    "begin",
    "loaded",
    "memory",
    "samples",
    "step",
    "evaluation",
    "stopped",
    "note",
    "finish",
    7,
]
LINES = st.lists(
    st.builds(
        lambda event, fields: {"event": event} | fields,
        st.sampled_from(EVENTS),
        st.dictionaries(st.sampled_from(FIELDS), JUNK),
    ),
    max_size=8,
)


@given(lines=LINES)
def test_whatever_a_journal_says_there_is_a_page(
    lines: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = write_journal(tmp_path_factory.mktemp("junk"), lines)
    Checked(write_page([directory], directory / "p.html").read_text())


# --- the command, and the end of a run -----------------------------------------------------------


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    first = write_journal(tmp_path / "first", journal_lines())
    second = write_journal(tmp_path / "second", journal_lines())
    assert cli.main(["report", str(first)]) == 0
    assert (first / "report.html").exists()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(first), str(second / "journal.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"page": "report.html"}
    assert "2 runs" in Path("report.html").read_text()


def test_only_a_page_is_replaced(tmp_path: Path) -> None:
    write_journal(tmp_path, journal_lines())
    mine = tmp_path / "index.html"
    mine.write_text("<title>mine</title>")
    with pytest.raises(OutputError, match="is not a page of halfbyte"):
        write_page([tmp_path], mine)
    assert mine.read_text() == "<title>mine</title>"
    page = tmp_path / "report.html"
    first = write_page([tmp_path], page).read_bytes()
    assert write_page([tmp_path], page).read_bytes() == first


def test_the_verb_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report"]) == 2
    assert "`runs` is missing" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "contains no journal of a run" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"expected .*/nowhere"):
        read_run(tmp_path / "nowhere")


def fail(directory: Path, error: Exception, *, begun: bool) -> None:
    with open_report(directory, quiet=True) as report:
        report.note("x")
        if begun:
            report.begin(total_steps=1, start_step=0, metadata={})
        raise error


def test_a_page_is_written_however_a_run_ends(tmp_path: Path) -> None:
    with open_report(tmp_path / "good", quiet=True) as report:
        report.begin(total_steps=1, start_step=0, metadata={})
        report.step({"step": 1, "loss": 0.5})
        report.finish({"steps": 1, "seconds": 1.0})
    assert read_run(tmp_path / "good").finished
    assert "not finished" not in (tmp_path / "good" / "report.html").read_text()
    with pytest.raises(RuntimeError, match="out of luck"):
        fail(tmp_path / "bad", RuntimeError("out of luck"), begun=True)
    assert "stopped: RuntimeError: out of luck" in (tmp_path / "bad" / "report.html").read_text()


def test_a_run_that_never_began_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        fail(tmp_path / "none", ConfigError("no"), begun=False)
    assert not (tmp_path / "none").exists()


def test_a_page_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "report.html" / "in the way").mkdir(parents=True)
    with open_report(tmp_path / "run") as report:
        report.begin(total_steps=1, start_step=0, metadata={})
        report.finish({"steps": 1})
    assert "cannot write" in capsys.readouterr().err
