"""The processes of a run: what they sum, exchange and wait for, and what ends them together.

Tensors are summed by torch.distributed: NCCL between GPUs, gloo on CPUs. All else goes through the
TCPStore that torchrun provides: exchanges of small values, waiting for the first process, and what
is known of peers. So a process may wait as long as it must for one that downloads or answers, and
needs neither a GPU nor a collective for it.

A thread of every process says twice a second that it lives, and how many sums it has begun, and
looks at the others. A peer has failed if it says so (an exception), if its process has gone or is
silent (a kill), or if it has not come to a sum within the time-out (a hang). The first failure that
is written to the store is the one that every process raises, as `ProcessFailed`. Nothing waits in
torch: a sum is polled, so that a process notices the failure of a peer, can end NCCL's kernel, which
would wait for ever, and save its state.

torch is imported only where it is needed: the command line asks for `rank_of_process` first.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from halfbyte.errors import ConfigError, Interrupted, ProcessFailed, RunStopped, UserError
from halfbyte.foreign_text import quote, shorten

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import TCPStore, Work

TIMEOUT = 600.0  # seconds
_BEAT = 0.5  # seconds between two signs of life
_SILENT = 30.0  # without a sign of life, a process that cannot be looked at has gone
_TO_BE_NOTICED = 5.0  # seconds that the reason for a broken connection may take to be known
_TO_LEAVE = 20.0  # torchrun kills what has not ended 30 s after the first process has
_LONGEST_REASON = 2000
_SHORTEST_PAUSE, _LONGEST_PAUSE = 20e-6, 1e-3  # of polling; a step takes 100 ms and more


def rank_of_process() -> tuple[int, int]:
    """Return rank and number of the processes that torchrun has started; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def claim_gpu() -> None:
    """Let this process see its own GPU only, as ``LOCAL_RANK`` numbers them, before CUDA starts.

    So ``cuda`` is that GPU everywhere. Setting torch's current device would hold for one thread,
    and base models are loaded in another.

    Raises:
        ConfigError: If there are fewer GPUs than processes.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if rank_of_process()[1] == 1 or os.environ.get("HALFBYTE_GPU") == f"{os.getpid()}/{local}":
        return
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.set_device(local)
        return
    given, visible = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
    if not visible:
        return
    if here > visible:
        raise ConfigError(
            f"{here} processes were started on this machine, and torch finds {visible} GPUs. Start "
            "as many processes as there are GPUs, or use --device cpu"
        )
    names = given.split(",") if given else [str(number) for number in range(visible)]
    os.environ["CUDA_VISIBLE_DEVICES"] = names[local].strip()
    os.environ["HALFBYTE_GPU"] = f"{os.getpid()}/{local}"


@dataclass(frozen=True)
class Failure:
    """Why a run of several processes ends.

    Attributes:
        rank: The process that failed.
        reason: What happened to it, as the end of a sentence that begins with its name.
        exit_code: What all processes exit with.
        lost: Whether it cannot save anything: it has gone, or hangs.
    """

    rank: int
    reason: str
    exit_code: int = 1
    lost: bool = False

    def error(self) -> ProcessFailed:
        """Return the error that the other processes raise."""
        return ProcessFailed(f"rank {self.rank} {self.reason}", self.rank, self.exit_code)


class ProcessGroup:
    """The processes of a run; without torchrun this one, whose operations do nothing.

    A context manager. An error that leaves it ends the other processes, too, with its reason; on
    success it waits for all of them.

    Args:
        rank: The number of this process.
        size: The number of processes.
        store: Their store; None for a single process.
        on_gpu: Whether sums are of GPU tensors.
        timeout: Seconds to wait for a process that should be at a sum.

    Attributes:
        rank: As given.
        size: As given.
        failure: What has ended the run; None while all is well.
        at: What this process does, such as ``step 3``, for messages of the others.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        store: "TCPStore | None" = None,
        on_gpu: bool = False,
        timeout: float = TIMEOUT,
    ) -> None:
        self.rank, self.size, self._timeout, self._on_gpu = rank, size, timeout, on_gpu
        self.failure: Failure | None = None
        self.at = "the start"
        self._exchanges = self._firsts = self._sums = 0
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        if store is None:
            return
        from torch.distributed import PrefixStore

        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._tcp = store
        self._store = PrefixStore(f"halfbyte/{again}", store)
        # A client of its own, since a client serves one thread at a time.
        self._watch_store = PrefixStore(f"halfbyte/{again}", store.clone())
        self._seen: dict[int, tuple[str, float]] = {}
        self._peers: dict[int, dict[str, Any]] = {}
        self._tell(self._store)

    @classmethod
    def from_environment(cls, device: str, *, timeout: float = TIMEOUT) -> "ProcessGroup":
        """Join the processes that torchrun has started; return a single process without it.

        Args:
            device: ``cpu`` or ``cuda``.
            timeout: As for the class.

        Raises:
            ConfigError: If there are fewer GPUs than processes, or the others cannot be reached.
        """
        rank, size = rank_of_process()
        if size == 1:
            return cls()
        import torch
        from torch import distributed

        on_gpu = device == "cuda"
        host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            store = distributed.TCPStore(
                host,
                int(port),
                is_master=rank == 0 and not by_agent,
                timeout=timedelta(seconds=timeout),
                wait_for_workers=False,
            )
            group = cls(rank, size, store=store, on_gpu=on_gpu, timeout=timeout)
            group._start()
            if on_gpu:
                # On a time-out of its own, NCCL would end this process before it has saved.
                os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            distributed.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=distributed.PrefixStore(f"halfbyte/{again}/torch", store),
                rank=rank,
                world_size=size,
                # Our own comes first; this one lets gloo's threads end.
                timeout=timedelta(seconds=timeout + _TO_BE_NOTICED),
                device_id=torch.device("cuda", torch.cuda.current_device()) if on_gpu else None,
            )
        except (ValueError, OSError, RuntimeError) as error:
            raise ConfigError(
                f"rank {rank} of {size} cannot reach the others at {host or '?'}:{port or '?'} "
                f"(MASTER_ADDR, MASTER_PORT): {error}"
            ) from error
        if on_gpu:  # NCCL's memory is taken now, so that plans see it
            group.sum_(torch.zeros(1, device="cuda"))
        return group

    @property
    def is_first(self) -> bool:
        """Whether this process writes: the output directory, the hub and the terminal."""
        return self.rank == 0

    # --- sums -------------------------------------------------------------------------------------

    def begin_sum(self, tensor: "Tensor") -> "PendingSum":
        """Begin to sum a tensor over all processes, in place; `PendingSum.wait` ends it."""
        return PendingSum(self, tensor)

    def sum_(self, tensor: "Tensor") -> None:
        """Sum a tensor over all processes, in place, with the same bits on each.

        Raises:
            ProcessFailed: Another process has failed, or has not come here within the time-out.
        """
        if self.size > 1:
            self.begin_sum(tensor).wait()

    def same_(self, tensors: "Sequence[Tensor]") -> None:
        """Set tensors to those of the first process, bit for bit.

        Raises:
            ProcessFailed: As `sum_`.
        """
        for tensor in tensors if self.size > 1 else ():
            if not self.is_first:
                tensor.detach().zero_()
            self.sum_(tensor.detach())

    # --- small values, through the store ----------------------------------------------------------

    def gather_object(self, value: Any) -> list[Any]:
        """Return the JSON values of all processes, by rank; waits for them as long as they live.

        Raises:
            ProcessFailed: Another process has failed.
        """
        if self.size == 1:
            return [value]
        self._exchanges += 1
        number = self._exchanges
        self._store.set(f"exchange/{number}/{self.rank}", json.dumps(value))
        keys = [f"exchange/{number}/{rank}" for rank in range(self.size)]
        self._poll(lambda: self._store.check(keys), longest=0.02)
        found = [json.loads(self._store.get(key)) for key in keys]
        if number > 1:  # all have read the one before, since they are here
            self._store.delete_key(f"exchange/{number - 1}/{self.rank}")
        return found

    def barrier(self) -> None:
        """Wait until all processes are here, as long as they live; raises like `gather_object`."""
        self.gather_object(None)

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Return what ``make`` returns in the first process, a JSON value; others do not call it.

        Raises:
            ProcessFailed: Another process has failed.
        """
        return self.gather_object(make() if self.is_first else None)[0]

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Run the block in the first process, then in the others, which find what it has cached.

        Raises:
            ProcessFailed: Another process has failed.
        """
        if self.size == 1:
            yield
            return
        self._firsts += 1
        key = f"first/{self._firsts}"
        if not self.is_first:
            self._poll(lambda: self._store.check([key]), longest=0.02)
        yield
        if self.is_first:
            self._store.set(key, "")

    def require_same(self, values: Mapping[str, str]) -> None:
        """Check that values are equal in all processes.

        Args:
            values: What each is called, and a text or digest of it.

        Raises:
            UserError: In all processes, if one has another value; it names the process, what
                differs, and both values.
            ProcessFailed: Another process has failed.
        """
        found = self.gather_object(dict(values))
        for rank, others in enumerate(found):
            names = [name for name in found[0] if others.get(name) != found[0][name]]
            if names:
                each = "; ".join(
                    f"{name}: {quote(others.get(name))}, and {quote(found[0][name])} on rank 0"
                    for name in names
                )
                raise UserError(
                    f"rank {rank} does not have the same as rank 0, so nothing is trained: {each}. "
                    "Start all processes with the same options, files and version of halfbyte"
                )

    # --- failures ---------------------------------------------------------------------------------

    def claim(self, what: str) -> bool:
        """Return whether this process is the one to do ``what``: one of those that ask.

        The lowest rank that lives is usually first, since the others wait a moment before.
        """
        if self.size == 1:
            return True
        lost = self.failure.rank if self.failure is not None and self.failure.lost else None
        before = sum(rank != lost for rank in range(self.rank))
        time.sleep(_BEAT * min(before, 4))
        try:
            return bool(self._store.compare_set(f"claim/{what}", "", str(self.rank)) == self._name)
        except RuntimeError:  # the store has gone, with its process or its host
            return before == 0

    @property
    def _name(self) -> bytes:
        return str(self.rank).encode()

    def declare(self, failure: Failure) -> Failure:
        """Say why the run ends; return what was said first, by whichever process."""
        if self.failure is None:
            said = json.dumps(asdict(failure))
            try:
                said = self._store.compare_set("failure", "", said).decode()
            except RuntimeError:  # the store has gone, so this process is on its own
                pass
            self.failure = self.failure or Failure(**json.loads(said))
        return self.failure

    def _poll(
        self,
        ready: Callable[[], bool],
        late: Callable[[], Failure] | None = None,
        *,
        longest: float = _LONGEST_PAUSE,
    ) -> None:
        """Wait until ``ready`` returns true.

        Args:
            ready: Asked again and again.
            late: Returns whom to blame after the time-out; None: wait as long as all live.
            longest: Seconds between two questions, at most.

        Raises:
            ProcessFailed: A process has failed.
        """
        until, pause = time.monotonic() + self._timeout, _SHORTEST_PAUSE
        while True:
            try:
                if ready():
                    return
            except RuntimeError as error:  # gloo's connection, or the store's
                self._blame_for(error)
            if self.failure is None and late is not None and time.monotonic() > until:
                self.declare(late())
            if self.failure is not None:
                raise self.failure.error()
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def _blame_for(self, error: Exception) -> None:
        """Set `failure` for a connection that broke, if need be without knowing why."""
        until = time.monotonic() + _TO_BE_NOTICED
        while self.failure is None and time.monotonic() < until:
            time.sleep(_BEAT / 10)
        if self.failure is None:
            said = str(error).partition("\n")[0]
            self.declare(Failure(self.rank, f"lost the connection to the others: {said}"))

    def _late(self, *, on_time: bool = True) -> Failure:
        """Return the failure of the process that has not come to a sum.

        Args:
            on_time: Whether this process has: its GPU has computed what is summed.
        """
        if not on_time:
            text = f"hangs: its GPU has not finished {self.at} in {self._timeout:g} s"
            return Failure(self.rank, text, lost=True)
        behind = {r: p["sums"] for r, p in self._peers.items() if p["sums"] < self._sums}
        if not behind:
            text = f"waited {self._timeout:g} s for a sum that all processes have begun"
            return Failure(self.rank, f"{text}: the connection between them hangs")
        rank = min(behind, key=lambda one: (behind[one], one))
        return Failure(
            rank,
            f"hangs: the others have waited for it for {self._timeout:g} s (--ddp-timeout) in "
            f"{self.at}, and it was in {self._peers[rank]['at']}",
            lost=True,
        )

    # --- the thread that watches ------------------------------------------------------------------

    def _start(self) -> None:
        """Begin to watch the others, once all are there."""
        keys = [f"alive/{rank}" for rank in range(self.size)]
        self._store.wait(keys, timedelta(seconds=self._timeout))
        self._watcher = threading.Thread(target=self._watch, name="watch-processes", daemon=True)
        self._watcher.start()

    def _tell(self, store: Any, *, left: bool = False) -> None:
        """Say that this process lives, and how far it is."""
        said = {"pid": os.getpid(), "host": _this_host(), "sums": self._sums, "at": self.at}
        said |= {"left": left, "now": time.monotonic()}  # no two are the same
        store.set(f"alive/{self.rank}", json.dumps(said))

    def _watch(self) -> None:
        while not self._closing.wait(_BEAT):
            try:
                self._tell(self._watch_store)
                self._look(self._watch_store)
            except RuntimeError as error:
                if not self._closing.is_set():
                    said = str(error).partition("\n")[0]
                    self.declare(Failure(0, f"or its launcher no longer answers: {said}", lost=True))
                return

    def _look(self, store: Any) -> None:
        """Look at the others once."""
        if self.failure is None and store.check(["failure"]):
            self.failure = Failure(**json.loads(store.get("failure")))
        now = time.monotonic()
        said = store.multi_get([f"alive/{rank}" for rank in range(self.size)])
        for rank, text in enumerate(one.decode() for one in said):
            if rank == self.rank:
                continue
            if self._seen.get(rank, ("", 0.0))[0] != text:
                self._seen[rank], self._peers[rank] = (text, now), json.loads(text)
            peer = self._peers[rank]
            if self.failure is None and not peer["left"]:
                if peer["host"] == _this_host() and not _lives(peer["pid"]):
                    if store.get(f"alive/{rank}").decode() == text:  # not left meanwhile
                        self.declare(Failure(rank, f"died (process {peer['pid']})", lost=True))
                elif now - self._seen[rank][1] > _SILENT:
                    reason = f"gives no sign of life (process {peer['pid']} on {peer['host']})"
                    self.declare(Failure(rank, reason, lost=True))

    # --- the end ----------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._watcher is None:
            return
        together = error is None or isinstance(error, RunStopped)
        try:
            if together:
                self.barrier()
        except ProcessFailed as failed:
            error, together = failed, False
            raise
        finally:
            if not together and error is not None:
                self._end_others(error)
            self._closing.set()
            self._watcher.join()
        from torch import distributed

        if together:
            self._leave()
            distributed.destroy_process_group()
        elif isinstance(error, Interrupted) and self.failure and self.failure.rank != self.rank:
            # torchrun ends the others by a signal once a process has ended.
            raise self.failure.error() from error

    def _leave(self) -> None:
        """Leave after the others; the first process last, since it may have the store."""
        until = time.monotonic() + _TO_LEAVE
        with contextlib.suppress(RuntimeError):
            self._tell(self._store, left=True)
            while self.is_first and time.monotonic() < until and self._others_left():
                time.sleep(_BEAT / 50)

    def _end_others(self, error: BaseException) -> None:
        """Have the others know why this process ends, and give them time to save."""
        if isinstance(error, Interrupted):
            with contextlib.suppress(RuntimeError):
                self._look(self._store)  # is it because another one has failed?
        if not isinstance(error, ProcessFailed):
            reason = shorten(f"{type(error).__name__}: {error}", _LONGEST_REASON)
            code = 2 if isinstance(error, UserError) else 1
            self.declare(Failure(self.rank, f"failed: {reason}", code))
        until = time.monotonic() + _TO_LEAVE
        with contextlib.suppress(RuntimeError):  # without the store there is nobody to wait for
            self._closing.set()  # or the thread would say that it has not left
            assert self._watcher is not None
            self._watcher.join()
            self._tell(self._store, left=True)
            while time.monotonic() < until and self._others_left():
                time.sleep(_BEAT / 5)
        if not self.is_first:  # which says the reason before torchrun notices that one has ended
            time.sleep(2 * _BEAT)

    def _others_left(self) -> bool:
        """Whether another process lives, and has not left yet."""
        lost = self.failure.rank if self.failure is not None and self.failure.lost else None
        said = self._store.multi_get([f"alive/{rank}" for rank in range(self.size)])
        others = [json.loads(text) for text in said]
        return any(
            not one["left"] and rank not in (self.rank, lost) and _may_live(one)
            for rank, one in enumerate(others)
        )


class PendingSum:
    """A sum over all processes that has begun.

    Args:
        processes: The processes.
        tensor: What is summed, in place.
    """

    def __init__(self, processes: ProcessGroup, tensor: "Tensor") -> None:
        from torch import distributed

        self._processes = processes
        self._ready: torch.cuda.Event | None = None
        if tensor.is_cuda:
            import torch

            self._ready = torch.cuda.Event()
            self._ready.record()
        else:
            processes._sums += 1
        try:
            work: Work | None = distributed.all_reduce(tensor, async_op=True)
        except RuntimeError as error:
            processes._blame_for(error)
            assert processes.failure is not None
            raise processes.failure.error() from error
        assert work is not None
        self._work = work

    def wait(self) -> None:
        """Wait for the result, and have the current stream see it.

        Raises:
            ProcessFailed: Another process has failed, or has not come here within the time-out.
                NCCL's kernel has been ended then, so the device can be used.
        """
        processes = self._processes
        try:
            processes._poll(self._is_done, self._late)
        except ProcessFailed:
            if self._ready is not None:
                _abort()
            raise
        self._work.wait()

    def _late(self) -> Failure:
        return self._processes._late(on_time=self._ready is None)

    def _is_done(self) -> bool:
        # A process whose own kernels hang has not come to the sum, although its host has.
        if self._ready is not None:
            if not self._ready.query():
                return False
            self._processes._sums += 1
            self._ready = None
        if not self._work.is_completed():
            return False
        if not self._work.is_success():
            raise RuntimeError(str(self._work.exception()))
        return True


def _abort() -> None:
    """End NCCL's kernels, in a thread: if that hangs, too, what the host has can be saved."""
    from torch import distributed

    group: Any = distributed.group.WORLD
    ending = threading.Thread(target=group.abort, name="abort-nccl", daemon=True)
    ending.start()
    ending.join(_TO_BE_NOTICED)


def _this_host() -> str:
    """Return what processes have in common that can look at each other: host, boot, namespace."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{os.uname().nodename} {boot[:8]} {os.readlink('/proc/self/ns/pid')}"
    return os.uname().nodename


def _lives(pid: int) -> bool:
    """Whether a process of this host runs; one that nobody has waited for does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return not Path("/proc/self/stat").exists()  # no /proc: its signs of life decide
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def _may_live(peer: Mapping[str, Any]) -> bool:
    return bool(peer["host"] != _this_host() or _lives(peer["pid"]))
