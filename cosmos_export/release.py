"""The release of the compiler, and where it is installed."""

from pathlib import Path

VERSION = "0.1.0"
"""Version in pyproject.toml; bundles, scale tables and quantized checkpoints name it."""
ROOT = Path(__file__).resolve().parent.parent
"""The folder that a new interpreter imports this package from."""
