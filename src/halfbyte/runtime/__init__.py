"""The machine: what a device can do, which dtype it multiplies, compilers, the C heap, products."""
