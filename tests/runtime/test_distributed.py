"""What processes sum and exchange, and how they learn of each other's failures."""

import os
import time

import pytest
import torch

from halfbyte.errors import ConfigError, Interrupted, ProcessFailed
from halfbyte.runtime import distributed, peers
from halfbyte.runtime.distributed import ProcessGroup, claim_gpu
from tests.processes import forks, in_processes, values

pytestmark = forks


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    monkeypatch.setattr(peers, "_BEAT", 0.1)


def joined(timeout=5.0):
    return ProcessGroup.from_environment("cpu", timeout=timeout)


def test_a_single_process_needs_nothing():
    with ProcessGroup.from_environment("cpu") as group:
        tensor = torch.ones(2)
        group.sum_(tensor)
        group.same_([tensor])
        assert tensor.tolist() == [1.0, 1.0]
        assert group.gather_object({"a": 1}) == [{"a": 1}]
        assert group.from_first(lambda: 3) == 3
        with group.first():
            group.barrier()
        group.require_same({"data": "x"})
        assert group.is_first
        assert group.claim("checkpoint")


def test_sums_and_exchanges():
    def function(rank):
        with joined() as group:
            tensor = torch.tensor([1.0, float(rank)])
            group.sum_(tensor)
            same = torch.full((3,), 7.0 + rank)
            group.same_([same])
            order = []
            with group.first():
                time.sleep(0.2 * (rank == 0))
                order.append(time.monotonic())
            gathered = [group.gather_object([rank, i]) for i in range(3)]
            first = group.from_first(lambda: f"of {rank}")
            group.barrier()
            group.require_same({"data": "x"})
            return [tensor.tolist(), same.tolist(), order, gathered, first, group.claim("it")]

    found = values(in_processes(3, function))
    assert [one[0] for one in found] == [[3.0, 3.0]] * 3
    assert [one[1] for one in found] == [[7.0] * 3] * 3
    assert found[0][2][0] < min(one[2][0] for one in found[1:])
    assert found[1][3] == [[[0, i], [1, i], [2, i]] for i in range(3)]
    assert [one[4] for one in found] == ["of 0"] * 3
    assert [one[5] for one in found].count(True) == 1


@pytest.mark.parametrize("where", ["sum", "exchange", "first"])
def test_the_reason_of_a_failure_reaches_a_process_that_waits(where):
    def function(rank):
        with joined() as group:
            if rank == 0:
                time.sleep(0.3)
                raise ConfigError("it is wrong") if where != "sum" else ValueError("a bug")
            if where == "sum":
                group.sum_(torch.ones(1))
            elif where == "exchange":
                group.barrier()
            else:
                with group.first():
                    pass
        raise AssertionError("it did not end")

    first, second = in_processes(2, function, seconds=15.0)
    assert first.kind == ("ValueError" if where == "sum" else "ConfigError")
    assert second.kind == "ProcessFailed"
    assert second.text == f"rank 0 failed: {first.kind}: {first.text}"


def test_the_others_wait_without_limit_where_one_may_work_alone():
    def function(rank):
        with joined(timeout=0.5) as group:
            if rank == 0:
                time.sleep(1.5)
            group.barrier()
            return rank

    assert values(in_processes(2, function)) == [0, 1]


def test_a_signal_after_a_failure_is_the_launchers():
    """torchrun interrupts the others once a process has gone."""

    def function(rank):
        with joined() as group:
            group.barrier()
            if rank == 1:
                os._exit(1)
            time.sleep(0.3)
            raise Interrupted(15)

    first, _ = in_processes(2, function, seconds=15.0)
    assert first.kind == "ProcessFailed"
    assert first.text.startswith("rank 1 died (process ")


def test_nobody_to_join_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", "nothing")
    with pytest.raises(ConfigError, match=r"rank 1 of 2 cannot reach the others at .*MASTER_ADDR"):
        joined()


def test_a_process_sees_its_own_gpu_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    seen, chosen = [1], []
    monkeypatch.setattr(distributed, "_devices_of_cuda", lambda: seen[0])
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    claim_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5,6,7"  # a single process uses any
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="8 processes were started on this machine, and torch fi"):
        claim_gpu()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("HALFBYTE_GPU", "")  # so that what is set is removed after the test
    for _ in range(2):
        claim_gpu()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    assert not chosen
    seen[0] = 4  # something has asked CUDA for its devices before
    monkeypatch.setenv("HALFBYTE_GPU", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    claim_gpu()
    assert chosen == [1]


class Store:
    """A store of one process, whose others have said what a test lets them say."""

    def __init__(self, said):
        self.said = {key: peers.json.dumps(one).encode() for key, one in said.items()}

    def set(self, key, value):
        self.said[key] = value.encode()

    def get(self, key):
        return self.said[key]

    def multi_get(self, keys):
        return [self.said[key] for key in keys]

    def check(self, keys):
        return all(key in self.said for key in keys)

    def compare_set(self, key, expected, value):
        return self.said.setdefault(key, value.encode())


def peer(**said):
    usual = {"pid": os.getpid(), "host": peers._this_host(), "sums": 3, "at": "step 3"}
    return usual | {"left": False, "now": 0.0} | said


def watched(**others):
    found = peers.Peers(0, 2, Store({"alive/0": peer(), "alive/1": peer(**others)}), 5.0)
    found.at, found.sums = "step 4", 4
    found.look()
    return found


def test_who_is_late():
    late = watched().late(on_time=True)
    assert late.rank == 1
    assert late.lost
    assert "in step 4, and it was in step 3" in late.reason
    assert "their connection hangs" in watched(sums=4).late(on_time=True).reason
    own = watched().late(on_time=False)
    assert (own.rank, own.lost) == (0, True)
    assert "its GPU has not finished step 4 in 5 s" in own.reason


def test_who_has_gone(monkeypatch):
    assert watched().failure is None
    assert watched(pid=2**22 + 1, left=True).failure is None
    gone = watched(pid=2**22 + 1).failure
    assert str(gone.error()) == f"rank 1 died (process {2**22 + 1})"
    elsewhere = watched(pid=2**22 + 1, host="another")
    assert elsewhere.failure is None
    monkeypatch.setattr(peers, "_SILENT", -1.0)
    elsewhere.look()
    assert "rank 1 gives no sign of life" in str(elsewhere.failure.error())


def test_the_first_failure_is_the_one_of_all():
    found = watched()
    found.declare(peers.Failure(1, "failed: first", 2))
    assert found.declare(peers.Failure(0, "failed: second")).reason == "failed: first"
    assert isinstance(found.failure.error(), ProcessFailed)
    assert found.failure.error().exit_code == 2
    assert distributed.rank_of_process() == (0, 1)
