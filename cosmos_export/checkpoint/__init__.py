"""The checkpoint, read without loading it: layout, configuration, and the place of every tensor.

Opening reads JSON and safetensors headers only and validates all of it; weights are mapped, never copied, and nothing
is ever unpickled. No torch here except in ``demo``, which is imported only to write a demo checkpoint.
"""

from cosmos_export.checkpoint.geometry import Geometry
from cosmos_export.checkpoint.identity import checkpoint_identity
from cosmos_export.checkpoint.layout import ExpectedTensor, Tower, expected_tensors
from cosmos_export.checkpoint.quantized import QuantizedLinear, quantized_linears
from cosmos_export.checkpoint.reader import Checkpoint, open_checkpoint
from cosmos_export.checkpoint.safetensors_header import TensorEntry

__all__ = [
    "Checkpoint",
    "ExpectedTensor",
    "Geometry",
    "QuantizedLinear",
    "TensorEntry",
    "Tower",
    "checkpoint_identity",
    "expected_tensors",
    "open_checkpoint",
    "quantized_linears",
]
