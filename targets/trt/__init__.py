"""TensorRT and TensorRT-RTX: engines, the process that builds them, and what they contain."""
