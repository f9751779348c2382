"""Training steps on 1, 2, 4 and 8 GPUs of a machine: data parallel, divided weights, and FSDP.

    python benchmarks/scaling.py --shape llama2-7b --only data-parallel shard shard-host
    python benchmarks/scaling.py --shape llama2-70b --only shard fsdp --memory-budget 24

Every GPU has ``--batch`` rows of ``--length`` tokens in a step, whatever their number. The model is
that of ``halfbyte compare --shape``: random weights in NF4 with double quantisation, r = 16 on all
linears, no dropout, bfloat16, every position supervised, AdamW with 8-bit state. *shard* divides
the packed weights among the GPUs, *shard-host* holds them once in host memory. *fsdp* is PEFT +
bitsandbytes under torch's FullyShardedDataParallel: 4-bit weights stored as bfloat16 so that they
can be sharded, adapters in bfloat16, layers checkpointed, torch's fused AdamW.

Each row is made by processes of its own, started as torchrun does:

    ms, tokens_per_second   median of the timed steps
    times_one               tokens per second, of those of a single GPU
    over_data_parallel      the same, of those of data parallel on as many GPUs
    peak_GB                 torch's peak over all steps, of the GPU that took most
    losses                  of three steps before these, of the same ``--batch`` rows in all on any
                            number of GPUs, so they are equal to rounding
    planned_MB              bytes of a step between GPUs, and to and from the host (plan/traffic.py)
    nvlink_MB               bytes that the NVLinks of the first GPU receive in a step, as its
                            counters say, where the driver shows them

``--device cpu`` makes the same with gloo, to try the script.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halfbyte.runtime.distributed import claim_gpu
from halfbyte.runtime.precision import configure_allocators

if "--worker" in sys.argv:
    if "fsdp" not in sys.argv:
        configure_allocators()  # as the command does, before CUDA starts
    claim_gpu()  # before bitsandbytes, which measuring imports, asks CUDA for its devices

import torch
from measuring import Row, reason, require_cuda, write

from halfbyte.engine.memory_policy import peak_memory, used_memory

CONTESTANTS = ("data-parallel", "shard", "shard-host", "fsdp")
RANK = 16
COMPARED = 3  # steps of the same rows on any number of GPUs


def ours(args: argparse.Namespace) -> tuple[Callable[[], float], Any]:
    """Return a step, and what to say of the model."""
    from halfbyte.config.schema import TrainConfig
    from halfbyte.engine.choose import choose_engine
    from halfbyte.engine.packing import Batch
    from halfbyte.linear.lora import adapter_parameters
    from halfbyte.plan.holding import Holding
    from halfbyte.plan.ledger import PART_TOKENS, Run
    from halfbyte.plan.model_shape import shape_of_config
    from halfbyte.plan.traffic import traffic
    from halfbyte.report import open_report
    from halfbyte.tools.synthetic_model import PREFIX, random_model
    from halfbyte.train.processes import processes_of
    from halfbyte.train.schedule import Schedule
    from halfbyte.train.trainer import Trainer
    from halfbyte.train.weight_location import Processes, connect

    device, dtype = args.device, torch.bfloat16 if args.device == "cuda" else torch.float32
    waits = {"shard": "gpus", "shard-host": "host"}.get(args.worker)
    options: Row = {"model": PREFIX + args.shape, "data": "d", "output": "o", "device": device}
    options |= {"optim": "adamw_8bit", "activations": args.keep, "shard": waits is not None}
    options["weights"] = "host" if waits == "host" else "gpu"
    if args.memory_budget:
        options["memory_budget"] = int(args.memory_budget * 1e9)
    config = TrainConfig.model_validate(options)
    processes = processes_of(config)
    with open_report(None, quiet=True) as report:
        model, memory = random_model(config, dtype, device, report, Processes.of(processes))
    connect(model, processes)
    loaded = used_memory(device)
    rows, length = args.batch * processes.size, args.length
    few, many = [length] * args.batch, [length] * rows
    engine, message = choose_engine(model, device, lengths=[few, many], state_bits=8)
    schedule = Schedule(1e-4, "constant", 0, 100)
    trainer = Trainer(engine, adapter_parameters(model), config, schedule, processes)
    plan = trainer.fit([[(args.batch, length)], [(rows, length)]], [few, many])
    trainer.capture()
    if not processes.rank:
        print(message, plan.summary(), sep="\n")
    generator = torch.Generator().manual_seed(0)

    def step(count: int = rows) -> float:
        ids = torch.randint(3, model.config.vocab_size, (count, length), generator=generator)
        return trainer.step(0, [Batch(ids, ids)]).loss

    losses = [step(args.batch) for _ in range(COMPARED)]
    run = Run(
        Holding("nf4", itemsize=dtype.itemsize),
        batch=args.batch,
        length=length,
        optimizer="adamw_8bit",
        device=device,
        policy=plan.policy,
        embedding_on_host=True,
        part_size=engine.buckets.part_tokens if engine.buckets else PART_TOKENS,
        waits=waits,
        shards=processes.size,
    )
    planned = traffic(shape_of_config(model.config, args.shape), run, processes.size)
    about = {
        "losses": losses,
        "base_bytes": memory.total_bytes,
        "loaded_GB": round(loaded / 1e9, 2),
        "policy": plan.policy.summary(len(engine.layers)),
        "planned_MB": {name: round(n / 1e6, 1) for name, n in planned._asdict().items()},
        "processes": processes,
    }
    return step, about


def fsdp(args: argparse.Namespace) -> tuple[Callable[[], float], Any]:
    """Return a step of PEFT + bitsandbytes under FSDP."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch import distributed
    from torch.distributed.fsdp import FullyShardedDataParallel
    from transformers import AutoModelForCausalLM

    from halfbyte.plan.model_shape import config_of

    rank = int(os.environ["RANK"])
    distributed.init_process_group("nccl")
    config = config_of(args.shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.set_attn_implementation("sdpa")
    torch.manual_seed(0)

    def drawn(shape: Any) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device="cuda")
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda").mul_(0.02)

    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            four = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                quant_storage=torch.bfloat16,
                device="meta",
            )
            packed, state = bnb.functional.quantize_4bit(
                drawn(module.weight.shape),
                blocksize=64,
                compress_statistics=True,
                quant_type="nf4",
                quant_storage=torch.bfloat16,
            )
            four.weight = bnb.nn.Params4bit(
                packed,
                requires_grad=False,
                quant_state=state,
                quant_type="nf4",
                quant_storage=torch.bfloat16,
                bnb_quantized=True,
                module=four,
            )
            four.quant_state = state
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, four)
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.nn.Parameter(drawn(parameter.shape), requires_grad=False)
            setattr(module, name, value)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config, device="cuda")
    model.is_loaded_in_4bit = True
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to("cuda", torch.bfloat16)
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "LlamaDecoderLayer"
    model = FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model),
        device_id=torch.cuda.current_device(),
        use_orig_params=False,
        limit_all_gathers=True,
    ).train()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(rank)

    def step() -> float:
        shape = (args.batch, args.length)
        ids = torch.randint(3, config.vocab_size, shape, generator=generator).cuda()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step, {"loaded_GB": round(base / 1e9, 2)}


def received_by_nvlink(gpu: int) -> int | None:
    """Return the bytes that a GPU's NVLinks have received, or None if the driver does not say."""
    command = ["nvidia-smi", "nvlink", "-gt", "d", "-i", str(gpu)]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.findall(r"Data Rx: (\d+) KiB", said.stdout)
    return 1024 * sum(map(int, found)) if found else None


def work(args: argparse.Namespace) -> None:
    """Be one process of a contestant."""
    on_gpu, rank = args.device == "cuda", int(os.environ.get("RANK", "0"))
    began = time.perf_counter()
    step, about = (fsdp if args.worker == "fsdp" else ours)(args)
    built, seconds = time.perf_counter() - began, []
    for _ in range(args.warm):
        loss = step()
    before = received_by_nvlink(rank) if on_gpu else None
    for _ in range(args.steps):
        start = time.perf_counter()
        loss = step()  # a number, so the device has ended the step
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    after = received_by_nvlink(rank) if on_gpu else None
    size = int(os.environ.get("WORLD_SIZE", "1"))
    peak = torch.tensor([peak_memory(args.device) / 1e9], device=args.device)
    if size > 1:
        torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    processes = about.pop("processes", None)
    if rank == 0:
        ms = 1e3 * statistics.median(seconds)
        row = {
            "contestant": args.worker,
            "shape": args.shape,
            "gpus": size,
            "per_gpu": f"{args.batch}x{args.length}",
            "ms": round(ms, 1),
            "tokens_per_second": round(1e3 * args.batch * args.length * size / ms),
            "peak_GB": round(float(peak), 2),
            "built_s": round(built, 1),
            "loss": round(loss, 4),
        }
        if before is not None and after is not None:
            row["nvlink_MB"] = round((after - before) / args.steps / 1e6, 1)
        Path(args.result).write_text(json.dumps(row | about))
    if processes is not None:
        processes.__exit__(None, None, None)


def contestant(name: str, gpus: int, args: argparse.Namespace) -> Row:
    """Start the processes of a contestant; return its row, or why there is none."""
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory, "row.json")
        launcher = [sys.executable]
        if gpus > 1:
            launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={gpus}"]
        mine = [__file__, "--worker", name, "--result", result, "--shape", args.shape]
        mine += ["--batch", args.batch, "--length", args.length, "--device", args.device]
        mine += ["--steps", args.steps, "--warm", args.warm, "--keep", args.keep]
        mine += ["--memory-budget", args.memory_budget]
        row: Row = {"contestant": name, "gpus": gpus}
        try:
            command = [*launcher, *map(str, mine)]
            done = subprocess.run(command, timeout=args.seconds, check=False)
        except subprocess.TimeoutExpired as error:
            return row | {"failed": reason(error)}
        if not result.exists():
            return row | {"failed": f"exit code {done.returncode}"}
        return dict(json.loads(result.read_text()))


def compare(rows: list[Row]) -> None:
    """Add ratios to the rows of a shape."""
    speeds = {(r["contestant"], r["gpus"]): r["tokens_per_second"] for r in rows if "ms" in r}
    alone = speeds.get(("data-parallel", 1))
    for row in rows:
        if "ms" not in row or row["gpus"] == 1:
            continue
        if alone:
            row["times_one"] = round(row["tokens_per_second"] / alone, 3)
        parallel = speeds.get(("data-parallel", row["gpus"]))
        if parallel and row["contestant"].startswith("shard"):
            row["over_data_parallel"] = round(row["tokens_per_second"] / parallel, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama2-7b")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--gpus", nargs="+", type=int, help="their numbers [1, 2, 4, 8, as far as]")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--keep", default="offload")
    parser.add_argument("--memory-budget", type=float, default=0.0, help="GB; 0: none")
    parser.add_argument("--seconds", type=float, default=200.0, help="limit of a contestant")
    parser.add_argument("--name", default="scaling")
    parser.add_argument("--output", type=Path, help="file; a dated one in benchmarks/results")
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    if args.device == "cuda":
        require_cuda()
    there = torch.cuda.device_count() if args.device == "cuda" else 2
    rows = []
    for gpus in args.gpus or [n for n in (1, 2, 4, 8) if n <= there]:
        for name in args.only:
            if gpus == 1 and name != "data-parallel":
                continue  # one GPU has nothing to divide
            rows.append(contestant(name, gpus, args))
            print(rows[-1], flush=True)
    compare(rows)
    for row in rows:
        print({name: value for name, value in row.items() if name != "losses"})
    write(args.name, args.output, rows=rows)


if __name__ == "__main__":
    main()
