"""GPU kernels for graph operations, each beside the CPU reference it must equal."""
