"""The processes of a run: what they sum, exchange and wait for, and what ends them together.

Tensors are summed by torch.distributed: NCCL between GPUs, gloo on CPUs. All else goes through the
TCPStore that torchrun provides: exchanges of small values, and waiting for the first process. So a
process may wait as long as it must for one that downloads or answers, and needs neither a GPU nor a
collective for it.

Nothing waits in torch: a sum is polled. So a process notices the failure of another one
(runtime/peers.py), can end NCCL's kernel, which would wait for ever, and can save its state. All
processes then raise `ProcessFailed` with the same reason.

torch is imported only where it is needed: the command line asks for `rank_of_process` first.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from halfbyte.errors import ConfigError, Interrupted, ProcessFailed, RunStopped, UserError
from halfbyte.foreign_text import quote, shorten
from halfbyte.runtime.peers import Failure, Peers

if TYPE_CHECKING:
    from torch import Tensor

TIMEOUT = 600.0  # seconds
_TO_NOTICE = 5.0  # seconds that gloo and NCCL have in addition
_LONGEST_REASON = 2000
_SHORTEST_PAUSE, _LONGEST_PAUSE = 20e-6, 1e-3  # of polling; a step takes 100 ms and more


def rank_of_process() -> tuple[int, int]:
    """Return rank and number of the processes that torchrun has started; (0, 1) without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")), size) if size > 1 else (0, 1)


def claim_gpu() -> None:
    """Let this process see its own GPU only, as ``LOCAL_RANK`` numbers them, before CUDA starts.

    So ``cuda`` is that GPU in every thread, where torch's current device is a thread's own. It has
    to be called before anything asks CUDA for its devices (`torch.cuda.is_available` does). If
    something has, torch's current device is set instead, in this thread.

    Raises:
        ConfigError: If there are fewer GPUs than processes.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if rank_of_process()[1] == 1 or os.environ.get("HALFBYTE_GPU") == f"{os.getpid()}/{local}":
        return
    import torch

    # Counted by the driver's management library, which does not start CUDA.
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
    if _devices_of_cuda() > 1:  # it had started, and keeps what it saw then
        torch.cuda.set_device(local)


def _devices_of_cuda() -> int:
    """Return the number of GPUs that CUDA sees, which starts it."""
    import torch

    return int(torch._C._cuda_getDeviceCount())


class ProcessGroup:
    """The processes of a run; without torchrun this one, whose operations do nothing.

    A context manager. An error that leaves it ends the other processes, too, with its reason; on
    success it waits for all of them.

    Args:
        rank: The number of this process.
        size: The number of processes.
        store: Their ``torch.distributed`` store; None for a single process.
        timeout: Seconds to wait for a process that should be at a sum.

    Attributes:
        rank: As given.
        size: As given.
        peers: What is known of the others; None in a single process.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, store: Any = None, *, timeout: float = TIMEOUT
    ) -> None:
        self.rank, self.size, self._store, self._timeout = rank, size, store, timeout
        self.peers = None if store is None else Peers(rank, size, store, timeout)
        self._exchanges = self._firsts = 0

    @classmethod
    def from_environment(cls, device: str, *, timeout: float = TIMEOUT) -> "ProcessGroup":
        """Join the processes that torchrun has started; return a single process without it.

        Args:
            device: ``cpu`` or ``cuda``.
            timeout: As for the class.

        Raises:
            ConfigError: The others cannot be reached.
        """
        rank, size = rank_of_process()
        if size == 1:
            return cls()
        import torch
        from torch import distributed

        stores: Any = distributed
        on_gpu = device == "cuda"
        host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        limit = timedelta(seconds=timeout)
        if on_gpu:  # on a time-out of its own, NCCL would end this process before it has saved
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        group: ProcessGroup | None = None
        try:
            tcp = stores.TCPStore(
                host,
                int(port),
                is_master=rank == 0 and not by_agent,
                timeout=limit,
                wait_for_workers=False,
            )
            # Processes that torchrun has restarted know nothing of those before.
            again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = stores.PrefixStore(f"halfbyte/{again}", tcp)
            group = cls(rank, size, store, timeout=timeout)
            assert group.peers is not None
            group.peers.start(lambda keys: store.wait(keys, limit))
            distributed.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=stores.PrefixStore(f"halfbyte/{again}/torch", tcp),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout + _TO_NOTICE),  # ours comes first
                device_id=torch.device("cuda", torch.cuda.current_device()) if on_gpu else None,
            )
            if on_gpu:  # NCCL's memory is taken now, so that plans see it
                group.sum_(torch.zeros(1, device="cuda"))
        except (ValueError, OSError, RuntimeError) as error:
            failed = ConfigError(
                f"rank {rank} of {size} cannot reach the others at {host or '?'}:{port or '?'} "
                f"(MASTER_ADDR, MASTER_PORT): {error}"
            )
            if group is not None and group.peers is not None:  # they wait for this one
                group.peers.declare(Failure(rank, f"failed: ConfigError: {failed}", 2))
            raise failed from error
        return group

    @property
    def is_first(self) -> bool:
        """Whether this process writes: the output directory, the hub and the terminal."""
        return self.rank == 0

    @property
    def on_this_host(self) -> int:
        """The number of processes on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.size > 1 else 1

    @property
    def rank_on_this_host(self) -> int:
        """The number of this process among those."""
        return int(os.environ.get("LOCAL_RANK", self.rank)) if self.size > 1 else 0

    @property
    def host(self) -> int:
        """The number of this machine."""
        return int(os.environ.get("GROUP_RANK", "0"))

    def now_at(self, what: str) -> None:
        """Say what this process does from now on, such as ``step 3``, for messages."""
        if self.peers is not None:
            self.peers.at = what

    # --- sums -------------------------------------------------------------------------------------

    def begin_sum(self, tensor: "Tensor") -> "PendingSum":
        """Begin to sum a tensor over all processes, in place; `PendingSum.wait` ends it."""
        assert self.peers is not None
        return PendingSum(tensor, self.peers, self._poll)

    def sum_(self, tensor: "Tensor") -> None:
        """Sum a tensor over all processes, in place, with the same bits on each.

        Raises:
            ProcessFailed: Another process has failed, or has not come here within the time-out.
        """
        if self.size > 1:
            self.begin_sum(tensor).wait()

    def same_(self, tensors: "Sequence[Tensor]") -> None:
        """Set tensors to those of the first process, bit for bit; raises like `sum_`."""
        for tensor in tensors if self.size > 1 else ():
            if not self.is_first:
                tensor.detach().zero_()
            self.sum_(tensor.detach())

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
        peers = self.peers
        assert peers is not None
        until, pause = time.monotonic() + self._timeout, _SHORTEST_PAUSE
        while True:
            try:
                if ready():
                    return
            except RuntimeError as error:  # gloo's connection, or the store's
                raise peers.blame_for(error).error() from error
            if late is not None and time.monotonic() > until:
                peers.declare(late())
            if peers.failure is not None:
                raise peers.failure.error()
            time.sleep(pause)
            pause = min(2 * pause, longest)

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
        keys = [f"exchange/{number}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], json.dumps(value))
        self._wait_for_keys(keys)
        found = [json.loads(said) for said in self._store.multi_get(keys)]
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
        self._firsts += 1
        key = f"first/{self._firsts}"
        if not self.is_first:
            self._wait_for_keys([key])
        yield
        if self.is_first and self.size > 1:
            self._store.set(key, "")

    def _wait_for_keys(self, keys: Sequence[str]) -> None:
        self._poll(lambda: bool(self._store.check(keys)), longest=0.02)

    def shared_memory(self, nbytes: int, *, page_locked: bool) -> "Tensor":
        """Return host memory that all processes of this machine have in common, zeros.

        Args:
            nbytes: Its size, at least 1, the same in all.
            page_locked: Whether a GPU will copy from it or to it.

        Returns:
            uint8 [nbytes].

        Raises:
            ConfigError: This process cannot map it.
            ProcessFailed: Another process has failed.
        """
        from halfbyte.runtime import host_memory

        own = handle = None
        if self.rank_on_this_host == 0:
            own, handle = host_memory.shared_memory(nbytes, page_locked=page_locked)
        found = self.gather_object([self.host, handle])
        if own is None:
            given = next(handle for host, handle in found if host == self.host and handle)
            try:
                own = host_memory.opened_memory(given, nbytes, page_locked=page_locked)
            except (OSError, RuntimeError) as error:
                raise ConfigError(
                    f"rank {self.rank} cannot map the host memory that the processes of this "
                    f"machine share: {error}"
                ) from None
        self.barrier()  # all have mapped it
        return own

    def require_same(self, values: Mapping[str, str]) -> None:
        """Check that values are equal in all processes.

        Args:
            values: What each is called, and a text or digest of it.

        Raises:
            UserError: In all processes, if one has another value; it names the process, what
                differs, and both values.
            ProcessFailed: Another process has failed.
        """
        usual, *others = self.gather_object(dict(values))
        for rank, found in enumerate(others, start=1):
            each = "; ".join(
                f"{name} {quote(found.get(name))}, and {quote(usual[name])} on rank 0"
                for name in usual
                if found.get(name) != usual[name]
            )
            if each:
                raise UserError(
                    f"rank {rank} does not make the same run as rank 0, so nothing is trained. It "
                    f"has {each}. Start all processes with the same options, files and version"
                )

    def claim(self, what: str) -> bool:
        """Return whether this process is the one to do ``what``, of those that ask."""
        return self.peers is None or self.peers.claim(what)

    # --- the end ----------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        peers = self.peers
        if peers is None:
            return
        if error is None or isinstance(error, RunStopped):
            try:
                self.barrier()
            except ProcessFailed:
                with contextlib.suppress(Interrupted):
                    peers.leave(failed=True)
                raise
            peers.leave(failed=False)
            from torch import distributed

            distributed.destroy_process_group()
            return
        if isinstance(error, Interrupted):
            peers.look()  # torchrun sends a signal once another process has ended
        if not isinstance(error, ProcessFailed):
            reason = shorten(f"{type(error).__name__}: {error}", _LONGEST_REASON)
            if isinstance(error, Interrupted):
                reason = f"was interrupted (signal {error.signal})"
            peers.declare(
                Failure(self.rank, f"failed: {reason}", 2 if isinstance(error, UserError) else 1)
            )
        with contextlib.suppress(Interrupted):  # of torchrun; what has happened is known
            peers.leave(failed=True)
        failure = peers.failure
        if isinstance(error, Interrupted) and failure is not None and failure.rank != self.rank:
            raise failure.error() from error


class PendingSum:
    """A sum over all processes that has begun.

    Args:
        tensor: What is summed, in place.
        peers: What is known of the other processes.
        poll: Waits, as `ProcessGroup._poll`.
    """

    def __init__(self, tensor: "Tensor", peers: Peers, poll: Callable[..., None]) -> None:
        import torch

        self._peers, self._poll, self._on_gpu = peers, poll, tensor.is_cuda
        self._computed: Any = None  # what is summed, on the device
        if self._on_gpu:
            self._computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._computed.record()
        else:
            peers.sums += 1
        try:
            self._work: Any = torch.distributed.all_reduce(tensor, async_op=True)
        except RuntimeError as error:
            raise peers.blame_for(error).error() from error

    def wait(self) -> None:
        """Wait for the result, and have the current stream see it.

        Raises:
            ProcessFailed: Another process has failed, or has not come here within the time-out.
                NCCL's kernel has been ended then, so the device can be used.
        """
        try:
            self._poll(self._is_done, lambda: self._peers.late(on_time=self._computed is None))
        except ProcessFailed:
            if self._on_gpu:
                _abort()
            raise

    def _is_done(self) -> bool:
        # A process whose own kernels hang has not come to the sum, although its host has.
        if self._computed is not None:
            if not self._computed.query():
                return False
            self._peers.sums += 1
            self._computed = None
        if not self._work.is_completed():
            return False
        self._work.wait()  # does not wait any more: it raises an error of gloo
        return True


def _abort() -> None:
    """End NCCL's kernels, in a thread: if that hangs, too, what the host has can be saved."""
    from torch import distributed

    group: Any = distributed.group.WORLD
    ending = threading.Thread(target=group.abort, name="abort-nccl", daemon=True)
    ending.start()
    ending.join(_TO_NOTICE)
