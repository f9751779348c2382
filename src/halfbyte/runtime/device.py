"""The properties of a GPU that decisions depend on, queried once and in one place.

Code that chooses by device (dtype, kernel, number of programs) uses `spec_of`'s `DeviceSpec` and
nothing else. So what a T4 or an RTX 4090 would use can be tested, and compiled, on a machine
without a GPU: a test passes another spec.
"""

from dataclasses import dataclass
from functools import cache

import torch

# Bytes of shared memory a block may have at most (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability"). The driver knows, but torch tells only of the 48 KB that
# need not be asked for.
_SHARED_MEMORY = {
    (5, 0): 49152,
    (7, 0): 98304,
    (7, 5): 65536,
    (8, 0): 166912,
    (8, 6): 101376,
    (8, 7): 166912,
    (8, 9): 101376,
    (9, 0): 232448,
    (12, 0): 101376,
}


@dataclass(frozen=True)
class DeviceSpec:
    """A GPU.

    Attributes:
        name: What its driver calls it.
        capability: CUDA compute capability, (major, minor).
        num_sms: Streaming multiprocessors.
        l2: Bytes of the second cache.
        memory: Bytes of the card, the driver's share included.
    """

    name: str
    capability: tuple[int, int]
    num_sms: int
    l2: int
    memory: int

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that a block may have: the capability's, or the last before it."""
        known = max(known for known in _SHARED_MEMORY if known <= max(self.capability, (5, 0)))
        return _SHARED_MEMORY[known]

    @property
    def runs_triton(self) -> bool:
        """Whether Triton compiles for it: from Turing (T4, RTX 20) on; it left Volta behind."""
        return self.capability >= (7, 5)

    @property
    def has_tensor_cores(self) -> bool:
        """Whether a kernel of Triton's multiplies on tensor cores: on Turing only cuBLAS does."""
        return self.capability >= (8, 0)

    @property
    def has_bfloat16(self) -> bool:
        """Whether it multiplies bfloat16: from Ampere (A100, RTX 30) on."""
        return self.capability >= (8, 0)

    @property
    def is_hopper(self) -> bool:
        """Whether a kernel tuned to Hopper's TMA and registers may run there."""
        return self.capability[0] == 9

    def runs_flash_attention(self, head_dim: int) -> bool:
        """Return whether torch's flash attention runs there, in 16 bits, forward and backward.

        Its backward of heads wider than 192 wants more shared memory than a block has on GeForce
        cards.
        """
        roomy = self.shared_memory >= _SHARED_MEMORY[8, 0]
        return self.capability >= (8, 0) and head_dim <= (256 if roomy else 192)


# Triton's interpreter, on a CPU: runs every kernel, few programs.
INTERPRETER = DeviceSpec("Triton's interpreter", (9, 0), num_sms=3, l2=0, memory=0)


@cache
def spec_of(device: torch.device) -> DeviceSpec:
    """Return what a device is; of one that is no GPU, `INTERPRETER`."""
    if device.type != "cuda":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    return DeviceSpec(
        name=found.name,
        capability=(found.major, found.minor),
        num_sms=found.multi_processor_count,
        l2=found.L2_cache_size,
        memory=found.total_memory,
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a GPU's memory, or page-locked memory, is used up."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    said = str(error)
    signs = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "CUDA out of memory")
    return isinstance(error, RuntimeError) and any(sign in said for sign in signs)
