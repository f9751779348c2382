"""GPUs that are not here, as `spec_of` would tell of them: for tests of what each is given."""

from halfbyte.runtime.device import DeviceSpec

MB = 1 << 20
T4 = DeviceSpec("Tesla T4", (7, 5), num_sms=40, l2=4 * MB, memory=15_828_320_256)
V100 = DeviceSpec("Tesla V100-SXM2-16GB", (7, 0), num_sms=80, l2=6 * MB, memory=16_935_682_048)
A100 = DeviceSpec("NVIDIA A100-SXM4-80GB", (8, 0), num_sms=108, l2=40 * MB, memory=84_987_740_160)
RTX3090 = DeviceSpec(
    "NVIDIA GeForce RTX 3090", (8, 6), num_sms=82, l2=6 * MB, memory=25_438_126_080
)
RTX4090 = DeviceSpec(
    "NVIDIA GeForce RTX 4090", (8, 9), num_sms=128, l2=72 * MB, memory=25_393_692_672
)
L4 = DeviceSpec("NVIDIA L4", (8, 9), num_sms=58, l2=48 * MB, memory=23_581_229_056)
H100 = DeviceSpec("NVIDIA H100 80GB HBM3", (9, 0), num_sms=132, l2=50 * MB, memory=85_029_158_912)
H200 = DeviceSpec("NVIDIA H200", (9, 0), num_sms=132, l2=50 * MB, memory=150_110_011_392)
B200 = DeviceSpec("NVIDIA B200", (10, 0), num_sms=148, l2=126 * MB, memory=191_501_500_416)
RTX5090 = DeviceSpec(
    "NVIDIA GeForce RTX 5090", (12, 0), num_sms=170, l2=96 * MB, memory=33_661_911_040
)

DEVICES = {
    "t4": T4,
    "v100": V100,
    "a100": A100,
    "3090": RTX3090,
    "4090": RTX4090,
    "l4": L4,
    "h100": H100,
    "h200": H200,
    "b200": B200,
    "5090": RTX5090,
}
