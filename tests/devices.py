"""GPUs that are not here, as `spec_of` would tell of them: for tests of what each is given."""

from halfbyte.runtime.device import DeviceSpec

T4 = DeviceSpec("Tesla T4", (7, 5), num_sms=40, memory=15_828_320_256)
V100 = DeviceSpec("Tesla V100-SXM2-16GB", (7, 0), num_sms=80, memory=16_935_682_048)
A100 = DeviceSpec("NVIDIA A100-SXM4-80GB", (8, 0), num_sms=108, memory=84_987_740_160)
RTX3090 = DeviceSpec("NVIDIA GeForce RTX 3090", (8, 6), num_sms=82, memory=25_438_126_080)
RTX4090 = DeviceSpec("NVIDIA GeForce RTX 4090", (8, 9), num_sms=128, memory=25_393_692_672)
L4 = DeviceSpec("NVIDIA L4", (8, 9), num_sms=58, memory=23_581_229_056)
H100 = DeviceSpec("NVIDIA H100 80GB HBM3", (9, 0), num_sms=132, memory=85_029_158_912)
H200 = DeviceSpec("NVIDIA H200", (9, 0), num_sms=132, memory=150_110_011_392)
B200 = DeviceSpec("NVIDIA B200", (10, 0), num_sms=148, memory=191_501_500_416)
RTX5090 = DeviceSpec("NVIDIA GeForce RTX 5090", (12, 0), num_sms=170, memory=33_661_911_040)

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
