"""Every command on a GPU as a person types it, on a real model, and whether its result is right.

The model is SmolLM2-135M-Instruct, whose GGUF file HALFBYTE_TEST_MODEL names. It learns the demo's
task, which it cannot do before and nearly can after 56 steps of default options; so a loss or an
answer tells whether an adapter was there. What the program writes is read again: the directory that
`quantize` makes of the file, the models that `merge` makes, and the files of `export`.

Most of a command's time is spent importing and loading, so several run beside each other, each
begun as soon as those are done whose output it reads. A test waits for the ones it is about.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from halfbyte.report.journal import read_journal
from halfbyte.tools.demo_task import SYSTEM, write_task

MODEL = os.environ.get("HALFBYTE_TEST_MODEL", "")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not MODEL, reason="needs SmolLM2's GGUF file: HALFBYTE_TEST_MODEL names it"),
]

AT_ONCE = 8
SECONDS = 240  # a command takes ten or so; one that hangs must not hang the tests
LINEARS = 30 * 7  # of SmolLM2-135M that get an adapter
ADAPTER = "adapter_model.safetensors"


class Done(NamedTuple):
    """A command that has ended."""

    code: int
    out: str
    err: str


class Jobs:
    """Commands by name, beside each other; paths in them are seen from ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._begun: dict[str, Future[Done]] = {}
        self._pool = ThreadPoolExecutor(AT_ONCE)
        paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths)),
            "HF_HUB_OFFLINE": "1",
        }

    def begin(self, name: str, text: str, *, after: str = "", **more: Any) -> None:
        """Run ``text`` once the commands ``after`` have ended, which were begun before."""
        self.begin_call(name, lambda: self.run(text.split(), **more), after=after)

    def begin_call(self, name: str, call: Callable[[], Done], *, after: str = "") -> None:
        awaited = [self._begun[other] for other in filter(None, after.split(", "))]

        def run() -> Done:
            for other in awaited:
                other.result()
            return call()

        self._begun[name] = self._pool.submit(run)

    def start(self, words: list[str], **streams: Any) -> subprocess.Popen[str]:
        call = [sys.executable, "-m", "halfbyte", *words]
        return subprocess.Popen(
            call,
            cwd=self.root,
            env=self.environment,
            text=True,
            start_new_session=True,
            **streams,
        )

    def run(self, words: list[str], *, typed: str = "", prompt: str = "") -> Done:
        """Run a command to its end; what hangs is killed, and fails."""
        more = ["--prompt", prompt, "--system", SYSTEM] if prompt else []
        more += ["--system", SYSTEM] if typed else []
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = self.start([*words, *more], **pipes)
        try:
            out, err = process.communicate(typed, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            err += f"\nkilled: it did not end within {SECONDS} s"
        return Done(process.returncode, out, err)

    def done(self, name: str) -> Done:
        """Wait for a command, which must succeed."""
        ended = self._begun[name].result()
        assert ended.code == 0, f"{name} ended with {ended.code}:\n{ended.err[-3000:]}"
        return ended

    def answer(self, name: str) -> Any:
        """What a command with ``--json`` printed."""
        return json.loads(self.done(name).out)

    def losses(self, run: str) -> list[float]:
        """The losses of a run's steps."""
        records = read_journal(self.root / run / "journal.jsonl")
        return [record["loss"] for record in records if record["event"] == "step"]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def rows_of(path: Path, count: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]


def interrupted(jobs: Jobs, words: list[str], output: Path) -> Done:
    """Kill a run when it has saved a checkpoint, and have it resumed."""
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    process = jobs.start(words, **quiet)
    until = time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < until:
        if list(output.glob("checkpoint-*")):
            break
        time.sleep(0.005)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        return Done(process.returncode, "", "the run was over before it could be interrupted")
    steps = [record for record in read_journal(output / "journal.jsonl") if "loss" in record]
    (jobs.root / "killed.json").write_text(json.dumps(len(steps)))
    return jobs.run([*words, "--resume"])


PROMPT: dict[str, Any] = {}  # the first held-out order and its answer, once they are written


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """Every command, begun: what most wait for comes first."""
    found = Jobs(tmp_path_factory.mktemp("commands"))
    task = write_task(found.root)
    for name, count in (("held", 32), ("few", 8)):
        lines = task.test.read_text(encoding="utf-8").splitlines(keepends=True)[:count]
        (found.root / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    messages = rows_of(task.test, 1)[0]["messages"]
    PROMPT.update(asked=messages[-2]["content"], expected=messages[-1]["content"])
    begin_all(found, str(Path(MODEL).resolve()), "orders.train.jsonl")
    yield found
    found.close()


def begin_all(jobs: Jobs, model: str, data: str) -> None:
    begin, asked = jobs.begin, PROMPT["asked"]
    scored = "--no-exact-match --json"
    exact = f"{scored} --compute-dtype float32"
    begin("train", f"train --model {model} --data {data} --output run")
    begin("quantize", f"quantize {model} packed --json")
    twice = f"train --model {model} --data {data} --deterministic --max-steps 40 --save-steps 5"
    begin("whole", f"{twice} --output whole")
    again = [*twice.split(), "--output", "resumed"]
    jobs.begin_call("resumed", lambda: interrupted(jobs, again, jobs.root / "resumed"))
    begin("eval base", f"eval --model {model} --data held.jsonl {scored}")
    begin("few base", f"eval --model {model} --data few.jsonl {exact}")
    begin("few base cpu", f"eval --model {model} --data few.jsonl {exact} --device cpu")
    begin("generate base", f"generate --model {model} --max-new-tokens 40 --json", prompt=asked)
    begin("doctor", "doctor --json")

    packed = "--model packed"
    begin(
        "train packed",
        f"train {packed} --data {data} --output packed-run",
        after="quantize",
    )
    begin("eval packed base", f"eval {packed} --data held.jsonl {scored}", after="quantize")

    # With the adapter that was trained on the file.
    live = f"--model {model} --adapter run"
    begin("eval", f"eval {live} --data held.jsonl --json", after="train")
    begin("few", f"eval {live} --data few.jsonl {exact}", after="train")
    begin("few cpu", f"eval {live} --data few.jsonl {exact} --device cpu", after="train")
    words = f"generate {live} --max-new-tokens 64 --json"
    begin("generate", words, prompt=asked, after="train")
    typed = f"{asked}\n/reset\n{asked}\n/exit\n"
    begin("chat", f"chat {live} --max-new-tokens 64", typed=typed, after="train")
    begin("merge", f"merge {model} run merged --into decoded --verify --json", after="train")
    begin("merge best", f"merge {model} run best --json", after="train")
    unmeasured = "--no-measure --verify --min-agreement 0 --json"
    for way in ("original", "nf4"):
        begin(f"merge {way}", f"merge {model} run {way} --into {way} {unmeasured}", after="train")
    begin("export", f"export {model} run exported --json", after="train")
    begin("export q8_0", f"export {model} run exported-q8 --type q8_0 --json", after="train")
    begin("export lora", f"export {model} run lora --format gguf-lora --json", after="train")
    begin("report", "report run --output page.html --json", after="train")
    both = "eval --model packed --adapter run --data held.jsonl"
    begin("eval packed copy", f"{both} {scored}", after="train, quantize")

    # What was written, read again.
    own = f"{packed} --adapter packed-run"
    begin("eval packed", f"eval {own} --data held.jsonl {scored}", after="train packed")
    begin("few packed", f"eval {own} --data few.jsonl {exact}", after="train packed")
    words = f"generate {own} --max-new-tokens 64 --json"
    begin("generate packed", words, prompt=asked, after="train packed")
    words = "merge packed packed-run packed-merged --into decoded --verify --json"
    begin("merge packed", words, after="train packed")
    plain = f"--quant none --data held.jsonl {scored}"
    begin("eval merged", f"eval --model merged {plain}", after="merge")
    begin("eval original", f"eval --model original {plain}", after="merge original")
    begin("eval f16", f"eval --model exported/model.gguf {plain}", after="export")
    begin("eval q8_0", f"eval --model exported-q8/model.gguf {plain}", after="export q8_0")
    # Packed in four bits again it would forget: that is what the tests of `merge nf4` say.
    words = f"train --model merged --data {data} --output merged-run --quant none --max-steps 8"
    begin("train merged", words, after="merge")

    words = f"compare --model {model} --data {data} --eval-data held.jsonl --output compared"
    begin("compare", f"{words} --max-steps 10 --no-exact-match --json")
    begin("demo", f"demo --model {model} --output demo --json")


def test_training_with_default_options_learns(jobs: Jobs) -> None:
    jobs.done("train")
    losses = jobs.losses("run")
    assert len(losses) == 56  # 448 orders, 8 in a step
    assert statistics.mean(losses[-5:]) < 0.2 * statistics.mean(losses[:3])
    records = read_journal(jobs.root / "run" / "journal.jsonl")
    assert records[-1]["event"] == "finish"
    begin = next(record for record in records if record["event"] == "begin")
    assert begin["device"] == "cuda"
    assert (jobs.root / "run" / "report.html").exists()


def test_the_adapter_answers_held_out_orders(jobs: Jobs) -> None:
    base, live = jobs.answer("eval base"), jobs.answer("eval")
    assert base["loss"] > 1
    assert live["loss"] < 0.2 * base["loss"]
    assert live["supervised_tokens"] == base["supervised_tokens"]
    assert live["cases"] == 32
    assert live["exact_match"] > 0.1
    assert jobs.answer("generate base")["answer"] != PROMPT["expected"]
    answer = jobs.answer("generate")["answer"]
    assert answer.startswith("{item:"), answer
    assert answer.endswith("}"), answer


def test_a_chat_from_a_pipe_says_what_generate_says(jobs: Jobs) -> None:
    answer = jobs.answer("generate")["answer"].strip()
    said = jobs.done("chat").out
    assert said.count(answer) == 2, said
    assert "new conversation" in said


@pytest.mark.parametrize("name", ["few base", "few"])
def test_losses_are_the_cpus(jobs: Jobs, name: str) -> None:
    # In float32, what differs is the order of sums, and the last bit of some packed scales.
    on_gpu, on_cpu = jobs.answer(name)["loss"], jobs.answer(f"{name} cpu")["loss"]
    assert on_gpu == pytest.approx(on_cpu, rel=5e-3, abs=5e-4)


def test_an_interrupted_run_is_the_run_that_was_not_byte_for_byte(jobs: Jobs) -> None:
    jobs.done("whole")
    jobs.done("resumed")
    made = json.loads((jobs.root / "killed.json").read_text())
    assert 0 < made < 40
    assert jobs.losses("resumed") == jobs.losses("whole")
    whole, resumed = ((jobs.root / run / ADAPTER).read_bytes() for run in ("whole", "resumed"))
    assert resumed == whole


def test_a_packed_directory_is_the_file_it_was_made_of(jobs: Jobs) -> None:
    result = jobs.answer("quantize")
    files = [path for path in (jobs.root / "packed").iterdir() if path.is_file()]
    assert result["bytes"] == sum(path.stat().st_size for path in files)
    config = json.loads((jobs.root / "packed" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    # The file is packed on the GPU as it is read, the directory was on a CPU; products in bfloat16.
    packed, read = jobs.answer("eval packed base")["loss"], jobs.answer("eval base")["loss"]
    assert packed == pytest.approx(read, rel=0.01)


def test_an_adapter_is_used_on_a_packed_copy_of_its_base(jobs: Jobs) -> None:
    copy, live = jobs.answer("eval packed copy")["loss"], jobs.answer("eval")["loss"]
    assert copy == pytest.approx(live, rel=0.05, abs=0.005)


def test_training_on_a_packed_directory_learns(jobs: Jobs) -> None:
    jobs.done("train packed")
    assert len(jobs.losses("packed-run")) == 56
    base, live = jobs.answer("eval packed base")["loss"], jobs.answer("eval packed")["loss"]
    assert live < 0.5 * base
    assert jobs.answer("generate packed")["answer"].startswith("{item:")
    assert jobs.answer("merge packed")["verified"]["top1_agreement"] > 0.95


def test_merged_into_the_decoded_base_it_computes_what_was_trained(jobs: Jobs) -> None:
    result = jobs.answer("merge")
    assert result["into"] == "decoded"
    kl = {way: found["kl"] for way, found in result["distances"].items()}
    assert set(kl) == {"decoded", "original", "nf4", "no adapter"}
    # Of the others none is sure to be nearer than the next: the text is not what it was trained on.
    assert 10 * kl["decoded"] < min(kl["original"], kl["nf4"], kl["no adapter"])
    assert result["verified"]["by_heart"] > 0
    assert result["verified"]["forgotten"] <= 0.05 * result["verified"]["by_heart"]
    # Its weights are rounded to bfloat16 once more.
    merged, live = jobs.answer("eval merged")["loss"], jobs.answer("eval")["loss"]
    assert merged == pytest.approx(live, rel=0.1, abs=0.01)


def test_the_other_ways_to_merge(jobs: Jobs) -> None:
    best = jobs.answer("merge best")
    nearest = min(best["sizes"], key=lambda way: best["distances"][way]["kl"])
    assert best["into"] == nearest
    for way in ("original", "nf4"):
        assert jobs.answer(f"merge {way}")["into"] == way
        # Written and read back, it is as far from the adapter as was measured before.
        measured, read = best["distances"][way], jobs.answer(f"merge {way}")["verified"]
        assert read["kl"] == pytest.approx(measured["kl"], rel=0.02)
        assert read["top1_agreement"] == pytest.approx(measured["top1_agreement"], abs=0.02)
    config = json.loads((jobs.root / "nf4" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    # What was learned survives on the original weights; on a CPU the loss was 0.10, the live
    # adapter's 0.07, the base's 2.55. In NF4 again it was 2.51: all of it is rounded away.
    assert jobs.answer("eval original")["loss"] < 0.2 * jobs.answer("eval base")["loss"]


def test_a_merged_model_trains_on_from_what_it_knows(jobs: Jobs) -> None:
    jobs.done("train merged")
    losses = jobs.losses("merged-run")
    assert len(losses) == 8
    assert statistics.mean(losses) < 0.2 * jobs.losses("run")[0]


def read_gguf(path: Path) -> Any:
    gguf = pytest.importorskip("gguf")
    return gguf.GGUFReader(path)


def test_an_exported_file_opens_elsewhere_and_answers_as_the_adapter(jobs: Jobs) -> None:
    live = jobs.answer("eval")["loss"]
    sizes = {}
    for name, directory, kind, least in (
        ("f16", "exported", "F16", 0.95),
        ("q8_0", "exported-q8", "Q8_0", 0.8),
    ):
        result = jobs.answer("export" if name == "f16" else f"export {name}")
        assert result["distance"]["top1_agreement"] > least
        path = jobs.root / directory / "model.gguf"
        read, original = read_gguf(path), read_gguf(Path(MODEL))
        assert read.fields["general.architecture"].contents() == "llama"
        tokens = read.fields["tokenizer.ggml.tokens"].contents()
        assert tokens == original.fields["tokenizer.ggml.tokens"].contents()
        assert {t.name for t in read.tensors} == {t.name for t in original.tensors}
        kinds = {t.tensor_type.name for t in read.tensors if ".attn_q." in t.name}
        assert kinds == {kind}
        sizes[name] = path.stat().st_size
        assert "model.gguf" in (jobs.root / directory / "Modelfile").read_text()
        # f16 rounds less than the live model's products do; q8_0 costs a model this small a little.
        assert jobs.answer(f"eval {name}")["loss"] == pytest.approx(live, rel=0.1, abs=0.02)
    assert 0.5 < sizes["q8_0"] / sizes["f16"] < 0.6


def test_an_exported_adapter_is_that_of_llama_cpp(jobs: Jobs) -> None:
    result = jobs.answer("export lora")
    read = read_gguf(jobs.root / "lora" / "adapter.gguf")
    assert result["bytes"] == (jobs.root / "lora" / "adapter.gguf").stat().st_size
    assert read.fields["general.type"].contents() == "adapter"
    assert read.fields["adapter.type"].contents() == "lora"
    assert read.fields["adapter.lora.alpha"].contents() == 16
    names = [tensor.name for tensor in read.tensors]
    for end in (".lora_a", ".lora_b"):
        assert sum(name.endswith(end) for name in names) == LINEARS
    assert len(names) == 2 * LINEARS


def test_the_page_of_a_run_is_written_anew(jobs: Jobs) -> None:
    page = Path(jobs.answer("report")["page"])
    text = (jobs.root / page).read_text(encoding="utf-8")
    assert "<html" in text
    assert "orders.train.jsonl" in text


def test_lora_and_qlora_are_compared(jobs: Jobs) -> None:
    result = jobs.answer("compare")
    lora, qlora = (result["variants"][name] for name in ("lora", "qlora"))
    for one in (lora, qlora):
        assert one["held_out_loss"] < 0.95 * jobs.answer("eval base")["loss"]
        assert one["tokens_per_second"] > 0
    assert qlora["load_peak"] < lora["load_peak"]
    assert [run["failure"] for run in result["runs"]] in ([None, None], ["", ""])
    assert (jobs.root / "compared" / "compare.html").exists()


def test_the_demo_teaches_its_task(jobs: Jobs) -> None:
    result = jobs.answer("demo")
    assert result["cases"] == 120
    assert result["exact_match_before"] < 0.05
    assert result["exact_match_after"] > 0.9


def test_the_doctor_finds_a_gpu_that_computes_rightly(jobs: Jobs) -> None:
    result = jobs.answer("doctor")
    assert result["passed"]
    assert result["machine"]["gpu"].startswith(torch.cuda.get_device_name())
    assert result["used"]["products"].startswith("on cuda")


@pytest.mark.filterwarnings("ignore")  # what others warn of is theirs
def test_the_adapter_loads_in_peft(jobs: Jobs) -> None:
    peft, bitsandbytes = pytest.importorskip("peft"), pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    from halfbyte.checkpoint.base_model import open_base
    from halfbyte.data import load_dataset

    jobs.done("train packed")
    where = jobs.root / "packed"
    base = AutoModelForCausalLM.from_pretrained(where, device_map={"": 0}, dtype=torch.bfloat16)
    for module in base.modules():  # as ours is asked: decoded to float32, products in float32
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
            module.weight.quant_state.dtype = torch.float32
    for parameter in base.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    model = peft.PeftModel.from_pretrained(base, str(jobs.root / "packed-run")).eval()
    tokenizer = open_base(str(where)).tokenizer()
    data = load_dataset(jobs.root / "few.jsonl", tokenizer, max_length=1024)
    total, count = 0.0, 0
    for row in data.examples:
        ids = torch.as_tensor(row.tokens, dtype=torch.int64, device="cuda")
        learned = torch.as_tensor(row.labels_mask, dtype=torch.bool, device="cuda")
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        total += float(losses[learned[1:]].sum())
        count += int(learned[1:].sum())
    result = jobs.answer("few packed")
    assert count == result["supervised_tokens"]
    # Only sums are in another order: on a CPU, 0.25464 and 0.25465.
    assert total / count == pytest.approx(result["loss"], rel=1e-3)
