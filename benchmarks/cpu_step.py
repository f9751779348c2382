"""Training speed, memory and losses on a CPU, compared with PEFT and PEFT + bitsandbytes.

    python benchmarks/cpu_step.py --model SmolLM2-135M-Instruct.Q4_1.gguf

Every contestant runs in its own process, on the same checkpoint (the GGUF file, decoded to
float32), the same token ids, and the same initial adapter (drawn once, loaded into all). A step is
4 sequences of 256 tokens, every position supervised; AdamW, r = 16 on all linears, no dropout, no
gradient checkpointing for the peers (it would slow them); one of ours has a memory budget. They
take turns for ``--rounds`` rounds, so that a slow minute of the machine affects all of them.
Reported: tokens per second (median over the timed steps of all rounds) and peak resident memory of
the process, both also relative to PEFT + bitsandbytes in float32, and the largest difference of the
first 20 losses from PEFT's in float32 with the same kind of base model.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

BATCH, LENGTH, RANK, LEARNING_RATE = 4, 256, 16, 1e-3
CONTESTANTS = {
    "peft-bitsandbytes-fp32": dict(peer=True, quant=True, dtype="float32"),
    "peft-bitsandbytes-bf16": dict(peer=True, quant=True, dtype="bfloat16"),
    "peft-lora-fp32": dict(peer=True, quant=False, dtype="float32"),
    "halfbyte-nf4-fp32": dict(peer=False, quant=True, dtype="float32"),
    "halfbyte-nf4-fp32-2.8GB": dict(peer=False, quant=True, dtype="float32", budget=2_800_000_000),
    "halfbyte-nf4-bf16": dict(peer=False, quant=True, dtype="bfloat16"),
    "halfbyte-lora-fp32": dict(peer=False, quant=False, dtype="float32"),
    "halfbyte-lora-bf16": dict(peer=False, quant=False, dtype="bfloat16"),
}


def prepare(gguf: Path, directory: Path, steps: int) -> None:
    """Write the float32 checkpoint, the token ids and the initial adapter."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from halfbyte.tools.demo_task import write_task

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    model.hf_quantizer = None  # decoded to float32 by now, though transformers still says GGUF
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(directory)
    rows = write_task(directory, seed=0).train.read_text().splitlines()
    texts = (message["content"] for row in rows for message in json.loads(row)["messages"])
    ids = tokenizer("\n".join(texts))["input_ids"]
    wanted = steps * BATCH * (LENGTH + 1)
    ids = (ids * (wanted // len(ids) + 1))[:wanted]
    tokens = torch.tensor(ids, dtype=torch.int64).view(steps, BATCH, LENGTH + 1)
    state = {"tokens": tokens}
    generator = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            bound = module.in_features**-0.5
            a = torch.empty(RANK, module.in_features).uniform_(-bound, bound, generator=generator)
            state[f"{name}.lora_A.weight"] = a
            state[f"{name}.lora_B.weight"] = torch.zeros(module.out_features, RANK)
    save_file(state, directory / "benchmark_inputs.safetensors")


def peer_steps(directory: Path, *, quant: bool, dtype: str) -> Iterator[float]:
    """Yield the losses of PEFT, with or without bitsandbytes, one step at a time."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings: dict[str, Any] = {}
    if quant:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), device_map="cpu", **settings
    )
    if quant:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    inputs = load_file(directory / "benchmark_inputs.safetensors")
    tokens = inputs.pop("tokens")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                name = name.removeprefix("base_model.model.").replace(".default", "")
                parameter.copy_(inputs[name])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    model.train()
    for batch in tokens:
        ids, labels = batch[:, :-1], batch[:, 1:]
        # `shift_labels` is how transformers takes labels that are shifted already.
        loss = model(input_ids=ids, labels=ids, shift_labels=labels.contiguous()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def our_steps(
    directory: Path, *, quant: bool, dtype: str, budget: int | None = None
) -> Iterator[float]:
    """Yield halfbyte's losses, one step at a time."""
    import torch
    from safetensors.torch import load_file

    from halfbyte.checkpoint.base_model import load_base
    from halfbyte.config.schema import TrainConfig
    from halfbyte.engine.choose import choose_engine
    from halfbyte.engine.packing import Batch
    from halfbyte.linear.lora import LoRAConfig, adapter_parameters, attach, load_adapter_state
    from halfbyte.models.build import BaseRecipe
    from halfbyte.runtime.malloc import keep_freed_memory
    from halfbyte.train.schedule import Schedule
    from halfbyte.train.trainer import Trainer

    keep_freed_memory()
    recipe = BaseRecipe(quant="nf4" if quant else "none", compute_dtype=getattr(torch, dtype))
    model = load_base(str(directory), recipe).model
    attach(model, LoRAConfig(r=RANK, alpha=RANK), seed=0)
    inputs = load_file(directory / "benchmark_inputs.safetensors")
    tokens = inputs.pop("tokens")
    load_adapter_state(model, inputs)
    config = TrainConfig(
        model="-", data="-", output=directory, learning_rate=LEARNING_RATE, memory_budget=budget
    )
    engine, reason = choose_engine(model, "cpu")
    print(reason, file=sys.stderr)
    schedule = Schedule(LEARNING_RATE, "constant", 0, len(tokens))
    trainer = Trainer(engine, adapter_parameters(model), config, schedule)
    plan = trainer.fit([[(BATCH, LENGTH)]], [[LENGTH] * BATCH])
    print(plan.summary(), file=sys.stderr)
    for step, batch in enumerate(tokens):
        yield trainer.step(step, [Batch(batch[:, :-1], batch[:, 1:])]).loss


def worker(args: argparse.Namespace) -> None:
    """Run one contestant and print its figures as JSON."""
    how = dict(CONTESTANTS[args.worker])
    if how.pop("peer"):
        losses_of = peer_steps(args.directory, **how)
    else:
        losses_of = our_steps(args.directory, **how)
    losses, seconds = [], []
    before = time.perf_counter()
    for loss in losses_of:
        now = time.perf_counter()
        losses.append(loss)
        seconds.append(now - before)
        before = now
        if len(losses) == args.steps:
            break
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    # The first two steps load the model and touch every page for the first time.
    print(json.dumps({"losses": losses, "seconds": seconds[2:], "peak_rss": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="SmolLM2's GGUF file")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(CONTESTANTS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    command = "python " + " ".join(sys.argv)
    with tempfile.TemporaryDirectory() as name:
        directory = args.directory or Path(name)
        if not (directory / "benchmark_inputs.safetensors").exists():
            prepare(args.model, directory, max(20, args.steps))
        found: dict[str, dict[str, Any]] = {}
        for round_number in range(args.rounds):
            for contestant in args.only:
                call = [sys.executable, __file__, "--worker", contestant, "--steps"]
                call += [str(args.steps), "--directory", str(directory)]
                done = subprocess.run(call, stdout=subprocess.PIPE, check=True, env=os.environ)
                result = json.loads(done.stdout.splitlines()[-1])
                held = found.setdefault(contestant, {"seconds": [], "peak_rss": 0})
                held["losses"] = result["losses"]
                held["seconds"] += result["seconds"]
                held["peak_rss"] = max(held["peak_rss"], result["peak_rss"])
                speed = BATCH * LENGTH / statistics.median(result["seconds"])
                print(
                    f"round {round_number + 1} {contestant:24s} {speed:7.1f} tokens/s "
                    f"{result['peak_rss'] / 1e9:.2f} GB",
                    flush=True,
                )
    report(found, command, args.output)


def report(found: dict[str, dict[str, Any]], command: str, output: Path) -> None:
    """Print the table and keep it as a dated row."""
    reference = found.get("peft-bitsandbytes-fp32")
    rows = {}
    for name, one in found.items():
        row = {
            "tokens_per_second": round(BATCH * LENGTH / statistics.median(one["seconds"]), 1),
            "peak_rss_gb": round(one["peak_rss"] / 1e9, 3),
        }
        if reference is not None:
            speed = BATCH * LENGTH / statistics.median(reference["seconds"])
            row["speed_ratio"] = round(row["tokens_per_second"] / speed, 2)
            row["memory_ratio"] = round(one["peak_rss"] / reference["peak_rss"], 3)
            kind = "peft-bitsandbytes-fp32" if CONTESTANTS[name]["quant"] else "peft-lora-fp32"
            pairs = zip(one["losses"], found.get(kind, one)["losses"], strict=True)
            row["largest_loss_difference"] = max(abs(a - b) for a, b in pairs)
        rows[name] = row
        print(f"{name:24s} {row}")
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {p: version(p) for p in packages},
        "shape": f"SmolLM2-135M, {BATCH}x{LENGTH} tokens a step, r={RANK} on all linears",
        "rows": rows,
        "losses": {name: one["losses"] for name, one in found.items()},
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{record['date'][:10]}_cpu_step.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


def cpu_name() -> str:
    """Return the processor's name and the vector units torch uses on it."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
