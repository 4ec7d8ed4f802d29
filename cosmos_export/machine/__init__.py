"""What is asked of the machine: memory and its limits, GPUs, installed packages."""
