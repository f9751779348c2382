"""Training steps on several GPUs of one machine: data parallel, divided weights, and FSDP.

    python benchmarks/gpu_data_parallel.py --shape llama2-7b --only one data-parallel shard
    python benchmarks/gpu_data_parallel.py --shape llama2-70b --only shard fsdp

Every GPU has ``--batch`` rows of ``--length`` tokens in a step, one GPU as many as each of several.
The model is that of ``halfbyte compare --shape``: random weights in NF4 with double quantisation,
r = 16 on all linears, no dropout, bfloat16, every position supervised, AdamW with 8-bit state.
*shard* divides the packed weights among the GPUs, *shard-host* holds them once in host memory.
*fsdp* is PEFT + bitsandbytes under torch's FullyShardedDataParallel: 4-bit weights stored as
bfloat16 so that they can be sharded, adapters in bfloat16, layers checkpointed, torch's fused
AdamW.

Each contestant has processes of its own, started as torchrun does. A figure is the median of the
steps after the first three; memory is torch's peak over all of them, of the GPU that took most.
"""

import argparse
import json
import os
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

CONTESTANTS = ("one", "data-parallel", "shard", "shard-host", "fsdp")
RANK = 16


def ours(args: argparse.Namespace) -> tuple[Callable[[], Any], Any]:
    """Return a step, and what to say of the model."""
    from halfbyte.config.schema import TrainConfig
    from halfbyte.engine.choose import choose_engine
    from halfbyte.engine.packing import Batch
    from halfbyte.linear.lora import adapter_parameters
    from halfbyte.report import open_report
    from halfbyte.tools.synthetic_model import PREFIX, random_model
    from halfbyte.train.processes import processes_of
    from halfbyte.train.schedule import Schedule
    from halfbyte.train.trainer import Trainer
    from halfbyte.train.weight_location import Processes, connect

    shards = args.worker.startswith("shard")
    options: Row = {"model": PREFIX + args.shape, "data": "d", "output": "o"}
    options |= {"optim": "adamw_8bit", "activations": args.keep, "shard": shards}
    options |= {"weights": "host" if args.worker == "shard-host" else "gpu", "device": "cuda"}
    if args.memory_budget:
        options["memory_budget"] = int(args.memory_budget * 1e9)
    config = TrainConfig.model_validate(options)
    processes = processes_of(config)
    with open_report(None, quiet=True) as report:
        model, memory = random_model(
            config, torch.bfloat16, "cuda", report, Processes.of(processes)
        )
    connect(model, processes)
    base = torch.cuda.memory_allocated()
    rows, length = args.batch * processes.size, args.length
    engine, message = choose_engine(model, "cuda", lengths=[[length] * rows], state_bits=8)
    trainer = Trainer(
        engine,
        adapter_parameters(model),
        config,
        Schedule(1e-4, "constant", 0, 100),
        processes,
    )
    plan = trainer.fit([[(rows, length)]], [[length] * rows])
    trainer.capture()
    if not processes.rank:
        print(message, plan.summary(), sep="\n")
    generator = torch.Generator().manual_seed(0)

    def step() -> float:
        ids = torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)
        return trainer.step(0, [Batch(ids, ids)]).loss

    about = {
        "base_bytes": memory.total_bytes,
        "loaded_GB": round(base / 1e9, 2),
        "policy": plan.policy.summary(len(engine.layers)),
        "processes": processes,
    }
    return step, about


def fsdp(args: argparse.Namespace) -> tuple[Callable[[], Any], Any]:
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


def work(args: argparse.Namespace) -> None:
    """Be one process of a contestant."""
    began = time.perf_counter()
    step, about = (fsdp if args.worker == "fsdp" else ours)(args)
    built, seconds, losses = time.perf_counter() - began, [], []
    for _ in range(args.steps + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        losses.append(step())
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.tensor([torch.cuda.max_memory_allocated() / 1e9], device="cuda")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    if int(os.environ.get("RANK", "0")) == 0:
        ms = 1e3 * statistics.median(seconds[3:])
        tokens = args.batch * args.length * size
        row = {
            "contestant": args.worker,
            "shape": args.shape,
            "gpus": size,
            "per_gpu": f"{args.batch}x{args.length}",
            "ms": round(ms, 1),
            "tokens_per_second": round(1e3 * tokens / ms),
            "peak_GB": round(float(peak), 2),
            "built_s": round(built, 1),
            "loss": round(losses[-1], 4),
        }
        processes = about.pop("processes", None)
        Path(args.result).write_text(json.dumps(row | about))
    else:
        processes = about.get("processes")
    if processes is not None:
        processes.__exit__(None, None, None)


def contestant(name: str, args: argparse.Namespace) -> Row:
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory, "row.json")
        count = 1 if name == "one" else args.gpus
        launcher = [sys.executable]
        if count > 1:
            launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={count}"]
        mine = [__file__, "--worker", name, "--result", str(result), "--shape", args.shape]
        mine += ["--batch", str(args.batch), "--length", str(args.length)]
        mine += ["--steps", str(args.steps), "--keep", args.keep]
        mine += ["--memory-budget", str(args.memory_budget)]
        try:
            done = subprocess.run([*launcher, *mine], timeout=args.seconds, check=False)
            if result.exists():
                return dict(json.loads(result.read_text()))
            return {"contestant": name, "failed": f"exit code {done.returncode}"}
        except subprocess.TimeoutExpired as error:
            return {"contestant": name, "failed": reason(error)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama2-7b")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--keep", default="offload")
    parser.add_argument("--memory-budget", type=float, default=0.0, help="GB; 0: none")
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--name", default="gpu_data_parallel")
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    require_cuda()
    rows = []
    for name in args.only:
        rows.append(contestant(name, args))
        print(rows[-1], flush=True)
    alone = next((row["ms"] for row in rows if row["contestant"] == "one" and "ms" in row), None)
    parallel = next(
        (r["ms"] for r in rows if r["contestant"] == "data-parallel" and "ms" in r), None
    )
    for row in rows:
        if "ms" in row and alone and row["gpus"] > 1:
            row["times_one"] = round(row["gpus"] * alone / row["ms"], 3)
        if "ms" in row and parallel and row["contestant"].startswith("shard"):
            row["over_data_parallel"] = round(parallel / row["ms"], 3)
        print(row)
    write(args.name, None, rows=rows)


if __name__ == "__main__":
    main()
