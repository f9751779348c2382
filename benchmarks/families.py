"""Every model family of transformers, trained by halfbyte and compared with transformers + PEFT.

    python benchmarks/families.py                     continue where the last run stopped
    python benchmarks/families.py --again             from the beginning
    python benchmarks/families.py --only mamba jamba  these rows anew

Each row of ``family_configs.ROWS`` is a tiny random model, saved by transformers and trained from
its files by the code behind ``halfbyte train``, in float32. It ends in one of three outcomes: it
*trains on the layer engine*, it *trains under autograd*, or it is *refused* in one sentence, by
``plan`` as by ``train``, before a weight is read. Of what trains, the reference being
the class that the files name, ``from_pretrained``, and PEFT over the same files, the sweep compares

    logits      of the base model and with the trained adapter
    gradients   of one step, with the trained adapter; in float64 where float32 rounds more
    adapter     every key and value that PEFT reads, with nothing missing and nothing unexpected
    generate    greedy, token for token, two prompts at once, after the step
    nf4         packed, it trains as well
    causality   no logit depends on a later token, or training means nothing
    merge       the model with the adapter merged in, as transformers loads it, encoders unchanged

Errors are relative to the largest value (of all gradients: to that of their tensor, or a
thousandth of the largest). Everything else, a traceback or a difference above ``TOLERANCE``, is a
*defect*. Rows run in processes of their own, with a limit of time. They are kept in
``benchmarks/results``, and ``docs/models.md`` is written from them.
"""

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from family_configs import ROWS, WHOLE, tiny_config, tiny_model
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from halfbyte import cli
from halfbyte.checkpoint.base_model import load_base, open_base
from halfbyte.checkpoint.directory import DirectorySource
from halfbyte.checkpoint.merged import Merged, write_merged
from halfbyte.checkpoint.peft import load_adapter
from halfbyte.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from halfbyte.config.schema import TrainConfig
from halfbyte.data.templates import prompt_ids
from halfbyte.engine.choose import choose_engine
from halfbyte.engine.packing import Batch
from halfbyte.errors import UserError
from halfbyte.layers.multimodal import SUPPORTED, removed_modules
from halfbyte.linear.lora import adapter_parameters
from halfbyte.models.build import BaseRecipe
from halfbyte.models.generate import end_tokens, generate
from halfbyte.plan.policy import ActivationPolicy
from halfbyte.report import open_report
from halfbyte.train.run import train

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.tiny import tiny_tokenizer  # noqa: E402

TOLERANCE = 1e-4
SECONDS = 180  # limit of a row
NEW_TOKENS = 12
PROMPTS = ("What is the capital of France?", "Again.")
OUTCOMES = {
    "layer engine": "trains on the layer engine",
    "autograd": "trains under autograd",
    "refused": "refused",
    "defect": "defect",
}


class Defect(Exception):
    """A difference from transformers and PEFT; the message says which."""


# --- one row ------------------------------------------------------------------------------------


def examine(row: str, place: Path) -> dict[str, Any]:
    """Return what becomes of a row, in an empty directory ``place``."""
    model_dir = place / "model"
    _write_model(row, model_dir)
    with _weights_read() as read:
        try:
            engine = _train(model_dir, place, "none")
        except UserError as error:
            return _refusal(str(error), model_dir, place, late=bool(read))
    found = {"outcome": "layer engine" if engine.startswith("layer engine") else "autograd"}
    found["note"] = engine.partition("layer by layer is not possible: ")[2]
    found |= compare(model_dir, place / "none")
    _train(model_dir, place, "nf4")
    return found


def _write_model(row: str, directory: Path) -> None:
    """Save the model of a row; where transformers cannot build it, something to refuse."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    config = tiny_config(row)
    try:
        model = tiny_model(row)
    except (ValueError, TypeError, AttributeError, RuntimeError, ImportError, LookupError):
        config.save_pretrained(directory)
        with (directory / "model.safetensors").open("wb") as file:
            write_safetensors(file, {f"tensor.{i}": torch.zeros(1) for i in range(64)})
    else:
        model.save_pretrained(directory)


@contextlib.contextmanager
def _weights_read() -> Iterator[list[str]]:
    """Yield a list to which every tensor that is loaded from a directory is added."""
    read: list[str] = []
    tensors = DirectorySource.tensors

    def watched(source: DirectorySource, *args: Any) -> Iterator[Any]:
        for name, value in tensors(source, *args):
            read.append(name)
            yield name, value

    DirectorySource.tensors = watched  # type: ignore[method-assign]
    try:
        yield read
    finally:
        DirectorySource.tensors = tensors  # type: ignore[method-assign]


def _train(model_dir: Path, place: Path, quant: str) -> str:
    """Train two steps into ``place / quant``, and return the engine's description."""
    rows = [
        {"prompt": f"{prompt} {i}", "completion": "The capital of France is Paris." + " Again." * i}
        for i, prompt in enumerate(PROMPTS * 2)
    ]
    data = place / "data.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    config = TrainConfig(
        model=str(model_dir),
        data=str(data),
        output=place / quant,
        quant=quant,
        batch_size=2,
        gradient_accumulation_steps=1,
        max_steps=2,
        learning_rate=2e-2,
        lora_r=4,
        compute_dtype="float32",
        device="cpu",
        samples=0,
    )
    with open_report(config.output, quiet=True) as report:
        train(config, report)
    lines = map(json.loads, (config.output / "journal.jsonl").read_text().splitlines())
    return str(next(line["engine"] for line in lines if "engine" in line))


def _refusal(message: str, model_dir: Path, place: Path, *, late: bool) -> dict[str, Any]:
    """Return the outcome of a row that ``train`` refused, if ``plan`` refuses it as well."""
    if late:
        raise Defect(f"refused only after weights were read: {message}")
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = cli.main(["plan", str(model_dir), "--card", "4090"])
    if code != 2:
        raise Defect(f"plan does not refuse it (exit code {code}), train says: {message}")
    if len(message) > 600 or message.count("\n") > 10:
        raise Defect(f"a message of {len(message)} characters: {message[:200]}")
    return {"outcome": "refused", "note": message.replace(str(model_dir), "the model")}


def compare(model_dir: Path, adapter_dir: Path) -> dict[str, Any]:
    """Return the errors of halfbyte's model with an adapter against PEFT's.

    Raises:
        Defect: If they differ.
    """
    found, ids = {}, _tokens()[0]
    base, reference = _open(model_dir, torch.float32)
    _require_causal(reference, ids)
    found["base_logits"] = _error(_logits(base.model, ids), _logits(reference, ids))
    _limit(found, "base_logits")
    peft = _with_peft(reference, adapter_dir)
    load_adapter(adapter_dir).put_on(base.model)
    found["logits"] = _error(_logits(base.model, ids), _logits(peft, ids))
    _limit(found, "logits")
    found["gradients"] = _gradient_error(base.model, peft)
    if found["gradients"] > TOLERANCE:  # rounding of a random model, or a difference?
        wide, wide_reference = _open(model_dir, torch.float64)
        load_adapter(adapter_dir).put_on(wide.model)
        wide_peft = _with_peft(wide_reference, adapter_dir)
        found["gradients_float64"] = _gradient_error(wide.model, wide_peft)
        _limit(found, "gradients_float64")
    _require_same_answers(base.model, base.tokenizer, peft)
    try:
        found["merged"] = _merged_error(model_dir, base.model, peft, adapter_dir.parent / "merged")
    except UserError as error:  # layers that share a weight
        found["not_merged"] = str(error).replace(str(model_dir), "the model")
    else:
        _limit(found, "merged")
    return found


def _merged_error(model_dir: Path, model: Any, peft: Any, out: Path) -> float:
    """Return the error of the logits of the model that is written with its adapter merged in."""
    write_merged(Merged(open_base(model_dir), model, "decoded", torch.float32), out)
    merged, amiss = _whole(out, torch.float32)
    if faults := [f"{kind} {keys}" for kind, keys in amiss.items() if keys]:
        raise Defect(f"transformers loads a merged model with {'; '.join(faults)[:300]}")
    before = dict(_whole(model_dir, torch.float32)[0].named_parameters())
    after = dict(merged.named_parameters())
    encoders = [p for path in removed_modules(model) for p in before if p.startswith(f"{path}.")]
    if changed := [name for name in encoders if not torch.equal(before[name], after[name])]:
        raise Defect(f"a merge changes encoders: {changed[:3]}")
    ids = _tokens()[0]
    return _error(_logits(merged, ids), _logits(peft, ids))


def _open(model_dir: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the model as halfbyte and as transformers opens it."""
    ours = load_base(str(model_dir), BaseRecipe("none", compute_dtype=dtype))
    return ours, _whole(model_dir, dtype)[0]


def _whole(directory: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Return a model of the class that its files name, and what was amiss with them."""
    name = json.loads((directory / "config.json").read_text())["architectures"][0]
    model, amiss = getattr(transformers, name).from_pretrained(
        directory, dtype=dtype, output_loading_info=True
    )
    return model.eval(), amiss


def _tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 390, (2, 18), generator=generator)
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    targets[1, 10:] = -100
    return ids, targets


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def _error(got: Tensor, reference: Tensor) -> float:
    if got.shape != reference.shape or not torch.isfinite(got).all():
        return float("inf")
    return float((got - reference).abs().max() / reference.abs().max())


def _limit(errors: dict[str, float], name: str) -> None:
    if not errors[name] <= TOLERANCE:
        raise Defect(f"{name} differ by {errors[name]:.1e}")


def _require_causal(model: nn.Module, ids: Tensor) -> None:
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 7) % 390
    before, after = _logits(model, ids), _logits(model, changed)
    error = _error(before[:, : ids.shape[1] - 1], after[:, : ids.shape[1] - 1])
    if error > TOLERANCE:
        raise Defect(f"trained, though logits depend on later tokens ({error:.1e})")


def _with_peft(reference: Any, adapter_dir: Path) -> Any:
    """Return the reference with the adapter, checked key by key."""
    from peft import PeftModel, get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", ".*(missing|unexpected|not found).*")
        try:
            model = PeftModel.from_pretrained(reference, adapter_dir, is_trainable=True).eval()
        except Exception as error:
            raise Defect(f"PEFT does not load the adapter: {str(error)[:200]}") from error
    file = SafetensorsFile(adapter_dir / "adapter_model.safetensors")
    written = {name: file.read(name) for name in file.entries}
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    if loaded.keys() != written.keys():
        raise Defect(f"PEFT's adapter has other keys: {sorted(loaded.keys() ^ written.keys())[:3]}")
    wrong = [name for name in written if not torch.equal(loaded[name].float(), written[name])]
    if wrong:
        raise Defect(f"PEFT's adapter has other values: {wrong[:3]}")
    return model


def _gradient_error(model: Any, peft: Any) -> float:
    """Return the largest error of a step's gradients, adapter by adapter."""
    ids, targets = _tokens()
    engine, _ = choose_engine(model, "cpu")
    supervised = int((targets != -100).sum())
    layers = len(getattr(engine, "layers", ()))
    engine.step([Batch(ids, targets)], float(supervised), ActivationPolicy(layers))
    logits = peft(input_ids=ids, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    theirs = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter.grad
        for name, parameter in peft.named_parameters()
        if parameter.requires_grad
    }
    own = {name: parameter.grad for name, parameter in adapter_parameters(model).items()}
    if own.keys() != theirs.keys():
        raise Defect(f"other parameters are trained: {sorted(own.keys() ^ theirs.keys())[:3]}")
    unused = [name for name in own if (own[name] is None) != (theirs[name] is None)]
    if unused:
        raise Defect(f"a gradient is missing: {unused[:3]}")
    used = [name for name in own if own[name] is not None]
    largest = max(float(theirs[name].abs().max()) for name in used)
    if largest == 0:
        raise Defect("all gradients are zero")
    return max(
        float((own[name] - theirs[name]).abs().max())
        / max(float(theirs[name].abs().max()), 1e-3 * largest)
        for name in used
    )


def _require_same_answers(model: Any, tokenizer: Any, peft: Any) -> None:
    """Compare greedy answers token for token; ours of two prompts of different lengths at once."""
    ends = end_tokens(model, tokenizer)
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt_ids(tokenizer, prompt)])
        output = peft.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
        tokens = output[0, ids.shape[1] :].tolist()
        stop = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
        wanted.append(tokens[:stop])

    def as_tokens(tokens: list[int], **_: Any) -> str:
        return json.dumps([token for token in tokens if token not in ends])

    tokenizer.decode = as_tokens
    got = [
        json.loads(text) for text in generate(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS)
    ]
    if got != wanted:
        raise Defect(f"generate gives {got}, transformers + PEFT {wanted}")


# --- all rows -----------------------------------------------------------------------------------


def isolated(row: str) -> dict[str, Any]:
    """Return the outcome of a row, from a process of its own that may crash or hang."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        answer = Path(directory) / "answer.json"
        child = os.fork()
        if child == 0:
            os.setsid()
            _child(row, Path(directory), answer)
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if time.monotonic() - began > SECONDS:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return {"outcome": "defect", "note": f"no end within {SECONDS} s"}
            time.sleep(0.05)
        if not answer.exists():
            return {"outcome": "defect", "note": "the process died"}
        found: dict[str, Any] = json.loads(answer.read_text())
    return found | {"seconds": round(time.monotonic() - began, 1)}


def _child(row: str, place: Path, answer: Path) -> None:
    """Examine a row, write the answer, and end the process."""
    try:
        with (
            (place / "output.txt").open("w") as sink,
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
        ):
            found = examine(row, place)
    except Defect as defect:
        found = {"outcome": "defect", "note": str(defect)}
    except BaseException as error:  # the sweep goes on with the next row
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "/halfbyte/" in f.filename] or frames
        places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in (ours[-1], frames[-1])]
        note = f"{type(error).__name__}: {error}"[:400] + f" ({', '.join(places)})"
        found = {"outcome": "defect", "note": note}
    answer.write_text(json.dumps(found))
    os._exit(0)


def describe(row: str) -> dict[str, Any]:
    """Return the names of a row's class."""
    kind = ROWS[row][0]
    whole, text = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return {"model_type": kind, "class": (whole if row in WHOLE else text)[kind]}


def sweep(
    rows: Sequence[str], kept: dict[str, Any], keep: Callable[[dict[str, Any]], None]
) -> None:
    """Examine rows, adding each to ``kept`` by its name."""
    for number, row in enumerate(rows, start=1):
        found = isolated(row)
        kept[row] = describe(row) | found
        keep(kept)
        print(f"{number}/{len(rows)} {row}: {found['outcome']}. {found['note'][:300]}", flush=True)


# --- what is kept -------------------------------------------------------------------------------


def table(rows: dict[str, Any]) -> str:
    """Return docs/models.md."""
    counts = {key: sum(row["outcome"] == key for row in rows.values()) for key in OUTCOMES}
    said = ", ".join(f"{OUTCOMES[key]} {n}" for key, n in counts.items() if n)
    trained = [row for row in rows.values() if "logits" in row]
    logits = max((max(row["base_logits"], row["logits"]) for row in trained), default=0.0)
    rounded = (row.get("gradients_float64", row["gradients"]) for row in trained)
    wide = [name for name in sorted(rows) if "gradients_float64" in rows[name]]
    lines = [
        "# Models",
        "",
        "What becomes of each model family of transformers, by `benchmarks/families.py`: a tiny",
        "random model of each, saved by transformers, is trained from its files, and its logits,",
        "gradients, adapter and greedy answers are compared with those of transformers + PEFT, in",
        "float32. This file is written by that run.",
        "",
        f"transformers {version('transformers')}, PEFT {version('peft')}.",
        f"{len(rows)} rows: {said}. Of what trains, "
        f"the largest relative error of logits is {logits:.0e}, of gradients "
        f"{max(rounded, default=0.0):.0e}"
        + (f" (in float64 where float32 rounds more: {', '.join(wide)})." if wide else "."),
        "",
        "Of image-text and audio-text models the text decoder is trained, and adapters, merged and",
        "packed models load as the whole model (tests/checkpoint/test_multimodal.py):",
        ", ".join(SUPPORTED) + ".",
        "",
        "| family | class | outcome | note |",
        "|---|---|---|---|",
    ]
    for name in sorted(rows):
        row = rows[name]
        note = " ".join(row["note"].split()).replace("|", "\\|")
        lines.append(f"| {name} | {row['class']} | {OUTCOMES[row['outcome']]} | {note} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help="these rows anew")
    parser.add_argument("--again", action="store_true", help="all rows anew")
    parser.add_argument("--results", type=Path, help="file of the rows")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "models.md")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a process that is forked must have no threads
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    today = datetime.now(UTC).date().isoformat()
    path = args.results or ROOT / "benchmarks" / "results" / f"{today}_families.json"
    kept: dict[str, Any] = {}
    if path.exists() and not args.again:
        kept = json.loads(path.read_text())["rows"]
    versions = {name: version(name) for name in ("transformers", "peft", "torch")}

    def keep(rows: dict[str, Any]) -> None:
        record = {"date": today, "versions": versions, "rows": rows}
        path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")

    sweep(args.only or [row for row in ROWS if row not in kept], kept, keep)
    args.table.write_text(table(kept))
    print({key: sum(row["outcome"] == key for row in kept.values()) for key in OUTCOMES})


if __name__ == "__main__":
    main()
