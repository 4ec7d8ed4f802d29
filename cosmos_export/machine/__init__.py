"""Facts about the machine: memory and its limits, GPUs, installed packages."""
