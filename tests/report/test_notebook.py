"""The screen of a notebook is one output that is replaced, and the example runs in one."""

import asyncio
import sys
import threading
import types
from pathlib import Path

import pytest

from halfbyte.report import open_report
from halfbyte.report.live import PlainScreen
from halfbyte.report.notebook import NotebookScreen
from tests.tiny import write_tiny_model

EXAMPLE = Path(__file__).parents[2] / "examples/fine_tune.ipynb"


class Outputs:
    """IPython's ``display``: what each output shows."""

    def __init__(self):
        self.shown, self.updates = [], 0

    def __call__(self, output, *, raw, display_id):
        assert raw
        assert display_id
        self.shown.append(output)
        number = len(self.shown) - 1

        class Handle:
            def update(_, output, *, raw):
                assert raw
                self.shown[number], self.updates = output, self.updates + 1

        return Handle()


def record(step, loss=1.0):
    return {"step": step, "loss": loss, "learning_rate": 1e-3, "tokens": 10, "seconds": 0.1}


def test_all_of_a_run_is_one_output(monkeypatch):
    outputs = Outputs()
    screen = NotebookScreen(outputs)
    assert outputs.shown == []  # nothing before there is something to say
    screen.note("a note <b>")
    with screen.task("reading", None) as progress:
        progress(1, 4)
        assert "reading …" in outputs.shown[0]["text/plain"]
    screen.begin(total_steps=200, start_step=0, metadata={})
    assert "the first step takes longest" in outputs.shown[0]["text/plain"]
    before = outputs.updates
    for step in range(1, 101):
        screen.step(record(step, 1 / step))
    assert outputs.updates - before < 10  # not one for each step
    screen.warning("odd")
    shown = outputs.shown[0]["text/plain"].splitlines()
    assert shown[0] == "a note <b>"
    assert shown[-3] == "warning: odd"
    assert shown[-2].startswith("training " + "█" * 15 + "░" * 15 + " 100/200")
    assert shown[-1].startswith("loss 0.0")
    assert "100 tokens/s" in shown[-1]
    screen.evaluation({"step": 100, "loss": 0.5, "rows": 8, "of_rows": 8})
    screen.finish({"steps": 200, "final_loss": 0.25, "seconds": 3.0})
    screen.close()
    shown = outputs.shown[0]["text/plain"].splitlines()
    assert shown[-2] == "step 100, evaluation: loss 0.5000"
    assert shown[-1].startswith("200 steps in 3.0 s, loss 0.2500")
    assert len(outputs.shown) == 1
    assert "a note &lt;b&gt;" in outputs.shown[0]["text/html"]


def test_foreign_text_is_escaped_and_many_lines_are_counted():
    outputs = Outputs()
    screen = NotebookScreen(outputs)
    screen.note("\x1b[31mred\u202e")
    assert outputs.shown[0]["text/plain"] == r"\x1b[31mred\u202e"
    for number in range(250):
        screen.note(f"line {number}")
    shown = outputs.shown[0]["text/plain"].splitlines()
    assert len(shown) == 101
    assert shown[0] == "… 151 lines before these are in journal.jsonl"
    assert shown[-1] == "line 249"


def test_a_thread_may_say_that_the_run_stops():
    outputs = Outputs()
    screen = NotebookScreen(outputs)
    thread = threading.Thread(target=screen.stopping, args=("stopping",))
    thread.start()
    thread.join()
    assert outputs.shown[0]["text/plain"] == "stopping"


@pytest.mark.parametrize(("shell", "kind"), [("kernel", NotebookScreen), ("terminal", PlainScreen)])
def test_only_a_kernel_is_a_notebook(monkeypatch, shell, kind):
    ipython = types.SimpleNamespace(**{shell: object()})
    module = types.ModuleType("IPython")
    module.get_ipython = lambda: ipython
    display = types.ModuleType("IPython.display")
    display.display = Outputs()
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    with open_report() as report:
        assert type(report._screen) is kind
    with open_report(quiet=True) as report:
        report.note("seen by nobody")
    assert display.display.shown == []


# --- the example ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The example's cells, run from top to bottom with a tiny model, by their names."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    place = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(EXAMPLE, as_version=4)
    (parameters,) = [
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())
    ]
    model = write_tiny_model(place / "model", layers=1, hidden=32)
    parameters.source = f"MODEL, OUTPUT, STEPS = {str(model)!r}, 'orders', 5"
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(place)}}
    )
    asyncio.run(client.async_execute())
    return {cell.id: cell for cell in notebook.cells}, place


def test_the_example_runs_from_top_to_bottom(executed):
    cells, place = executed
    assert (place / "orders/adapter_model.safetensors").is_file()
    printed = {
        name: "".join(out.get("text", "") for out in cell.outputs)
        for name, cell in ((name, cell) for name, cell in cells.items() if cell.cell_type == "code")
    }
    assert printed["result"].startswith("the adapter of step ")
    assert " of 5 is in orders" in printed["result"]
    assert printed["evaluate"].startswith("held-out loss ")
    (drawn,) = cells["chart"].outputs
    svg = drawn["data"]["image/svg+xml"]
    assert svg.count("<circle") >= 5
    assert "<title>loss of 5 steps" in svg


def test_its_progress_is_one_output_without_widgets_and_errors(executed):
    cells, _ = executed
    (output,) = cells["fine-tune"].outputs
    assert set(output["data"]) == {"text/plain", "text/html"}
    shown = output["data"]["text/plain"].splitlines()
    assert shown[0].startswith("reading orders")
    assert any(line.startswith("step 1, evaluation") for line in shown)
    assert any(line.startswith("5 steps in ") for line in shown)


def test_it_is_kept_without_outputs():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(EXAMPLE, as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]
