"""Ahead-of-time compiler for NVIDIA Cosmos 3.

The public surface is the command line (``cosmos-export``) and the sub-packages named in ``docs/architecture.md``.
Importing this package imports nothing heavy.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a source tree `passes`, `kernels`, `calibration` and `targets` lie beside this folder and install inside it.
# Without an installation (`python -m cosmos_export` from the repository root) they are found through this entry.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "passes" / "__init__.py").is_file():
    __path__.append(str(_root))
