"""GPU kernels for graph operations, each in a file of its own beside the plain reference it must equal.

A kernel module holds: the contract (shapes, types, errors) and how ONNX and TensorRT say the same in its docstring,
``reference`` in plain PyTorch, the Triton kernel, the function that launches it, and ``VARIANTS``, the forms that are
compiled ahead of time. Where a library is at the ceiling it is a candidate behind the same signature
(`cosmos_export.kernels.candidates`), and the benchmark on the GPU decides.
"""
