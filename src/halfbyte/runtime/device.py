"""The properties of a GPU that decisions depend on, queried once and in one place.

Code that chooses by device (dtype, kernel, number of programs) uses `spec_of`'s `DeviceSpec` and
nothing else: no other file asks the driver or torch for a property (`tests/runtime/test_device.py`
checks this). So what a T4 or an RTX 4090 would use can be tested, and compiled, on a machine
without a GPU: a test passes another spec. What `plan` predicts follows from the same class, so
torch is imported only where it is needed.
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Maximum shared memory of a block, in bytes (CUDA C++ Programming Guide, "Technical Specifications
# per Compute Capability"). torch reports only the 48 KB available without opting in.
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
    """The capabilities of a GPU for kernels; its speed is in `plan.roofline.GpuSpec`.

    Attributes:
        name: Its name in the driver.
        capability: CUDA compute capability, (major, minor).
        num_sms: Number of streaming multiprocessors.
        memory: Bytes of GPU memory, including the driver's share.
    """

    name: str
    capability: tuple[int, int]
    num_sms: int
    memory: int

    @property
    def shared_memory(self) -> int:
        """Maximum shared memory of a block, in bytes: of the nearest known capability below."""
        known = max(known for known in _SHARED_MEMORY if known <= max(self.capability, (5, 0)))
        return _SHARED_MEMORY[known]

    @property
    def runs_triton(self) -> bool:
        """Whether Triton compiles for it: from Turing (T4, RTX 20) on, not for Volta."""
        return self.capability >= (7, 5)

    @property
    def has_tensor_cores(self) -> bool:
        """Whether Triton's kernels use its tensor cores: on Turing only cuBLAS does."""
        return self.capability >= (8, 0)

    @property
    def has_bfloat16(self) -> bool:
        """Whether it multiplies bfloat16: from Ampere (A100, RTX 30) on."""
        return self.capability >= (8, 0)

    @property
    def has_fp8(self) -> bool:
        """Whether it multiplies 8-bit floating-point numbers: from Ada (L4, RTX 40) on."""
        return self.capability >= (8, 9)

    @property
    def is_hopper(self) -> bool:
        """Whether kernels tuned to Hopper's TMA and registers run on it."""
        return self.capability[0] == 9

    @property
    def has_flash_attention(self) -> bool:
        """Whether torch's flash attention runs on it, with usual head widths: from Ampere on."""
        return self.capability >= (8, 0)

    def runs_flash_attention(self, head_dim: int) -> bool:
        """Return whether torch's flash attention runs on it, in 16 bits, forward and backward.

        With heads wider than 192 its backward needs more shared memory than a block has on GeForce
        GPUs.
        """
        roomy = self.shared_memory >= _SHARED_MEMORY[8, 0]
        return self.has_flash_attention and head_dim <= (256 if roomy else 192)


# Triton's interpreter, on a CPU: runs every kernel, few programs.
INTERPRETER = DeviceSpec("Triton's interpreter", (9, 0), num_sms=3, memory=0)


@cache
def spec_of(device: "torch.device") -> DeviceSpec:
    """Return the properties of a device; `INTERPRETER` if it is not a GPU.

    The driver is queried at the first call for a device. No call synchronises with the GPU.
    """
    if device.type != "cuda":
        return INTERPRETER
    import torch

    found = torch.cuda.get_device_properties(device)
    return DeviceSpec(
        name=found.name,
        capability=(found.major, found.minor),
        num_sms=found.multi_processor_count,
        memory=found.total_memory,
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means out of GPU memory or of page-locked memory."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    said = str(error)
    signs = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "CUDA out of memory")
    return isinstance(error, RuntimeError) and any(sign in said for sign in signs)
