"""The machine: device properties, dtype of products, C++ builds, the C heap, matrix products."""
