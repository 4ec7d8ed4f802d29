"""Makes ``modelopt_0_47.safetensors``: one seeded linear, quantized and exported by NVIDIA's ModelOpt itself.

    pip install --target DIR nvidia-modelopt==0.47.0      # heavy, and needed for nothing else
    PYTHONPATH=DIR python tests/calibration/make_modelopt_fixture.py

``test_formats.py`` holds our bytes and scales equal to this file, and where ModelOpt is installed to ModelOpt as well.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

FIXTURE = Path(__file__).with_name("modelopt_0_47.safetensors")
VERSION = "0.47.0"
CONFIGS = {
    "fp8": "FP8_DEFAULT_CFG",
    "int4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "int4_awq": "INT4_AWQ_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
}
KEPT = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
SEARCHED = "searched_pre_scale"
"""What the AWQ search found, before it is rounded to bfloat16 for the file."""


def layer(seed: int = 0, rows: int = 64, columns: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """A bfloat16 weight with outlier channels and a block of zeros, and 96 inputs for it."""
    generator = np.random.Generator(np.random.PCG64(seed))
    weight = generator.standard_normal((rows, columns), dtype=np.float32) / 16
    weight[3, 16:32] = 0
    weight[5, :128] = 0
    inputs = generator.standard_normal((96, columns), dtype=np.float32) * 2
    inputs[:, ::37] *= 20
    return torch.from_numpy(weight).bfloat16(), torch.from_numpy(inputs).bfloat16()


def exported(name: str, weight: torch.Tensor, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """What ModelOpt writes of the linear after calibration on ``inputs``."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export.unified_export_hf import _export_quantized_weight
    from modelopt.torch.quantization import model_calib

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    model: Any = torch.nn.Sequential(linear)
    scales: list[torch.Tensor] = []
    smooth = model_calib.apply_pre_quant_scale_and_smooth

    def recorded(module: torch.nn.Module, pre_quant_scale: torch.Tensor) -> None:
        scales.append(pre_quant_scale)  # in float32; the file has it rounded, the weight is divided before that
        smooth(module, pre_quant_scale)

    with mock.patch.object(model_calib, "apply_pre_quant_scale_and_smooth", recorded):
        mtq.quantize(model, copy.deepcopy(getattr(mtq, CONFIGS[name])), lambda module: module(inputs))
    _export_quantized_weight(model[0], torch.bfloat16)
    state = {key.removeprefix("input_quantizer._"): value for key, value in model[0].state_dict().items()}
    kept = {key: state[key].detach().clone() for key in KEPT if key in state}
    return kept | ({SEARCHED: scales[0].float()} if scales else {})


def main() -> None:
    import modelopt
    from safetensors.torch import save_file

    assert modelopt.__version__ == VERSION, modelopt.__version__
    weight, inputs = layer()
    tensors = {"weight": weight, "inputs": inputs}
    for name in CONFIGS:
        tensors |= {f"{name}.{key}": value for key, value in exported(name, weight, inputs).items()}
    save_file(tensors, FIXTURE, metadata={"modelopt": VERSION})


if __name__ == "__main__":
    main()
