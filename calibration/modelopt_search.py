"""NVIDIA ModelOpt's algorithms on one decoder layer: AWQ, SVDQuant and AutoQuantize.

ModelOpt sees the linears of a layer as a network of their own, each fed the rows it was seen to read. Linears that
read the same tensor are one there, with their weights stacked: they share what is found, as they share a product in an
engine.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cosmos_export.calibration.formats import layout_of
from cosmos_export.calibration.search import BUDGETED, Rows, SearchResult
from cosmos_export.precision.schemes import SCHEMES, UNQUANTIZED, searched_schemes

_CONFIGS = {name: config for name in BUDGETED if (config := SCHEMES[name].modelopt)}
(_PRE_SCALED,) = searched_schemes("modelopt-awq")
"""The scheme that pre-scales and parts of low rank are for."""
_SEED = 0


class _Sites(nn.Module):
    """The linears of a layer, side by side."""

    def __init__(self, layer: nn.Module, readers: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.readers = readers
        self.linears = nn.ModuleList()
        for members in readers.values():
            weight = torch.cat([layer.get_parameter(f"{name}.weight").detach().float() for name in members])
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight)
            self.linears.append(linear)

    def forward(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [linear(x) for linear, x in zip(self.linears, rows, strict=True)]


def search_pre_scales(
    layer: nn.Module, readers: Mapping[str, Sequence[str]], rows: Rows, _: Rows, *, rank: int = 0
) -> SearchResult:
    """Pre-scales for INT4 by ``awq_lite``; with a ``rank`` by ``svdquant``, which makes them first."""
    mtq = _modelopt()
    fitting = {name: members for name, members in readers.items() if _fits(layer, members)}
    if not fitting:
        return SearchResult()
    sites, inputs = _Sites(layer, fitting), [rows[name] for name in fitting]
    algorithm: Any = {"method": "svdquant", "lowrank": rank} if rank else {"method": "awq_lite", "alpha_step": 0.1}
    config = {"quant_cfg": mtq.INT4_AWQ_CFG["quant_cfg"], "algorithm": algorithm}
    with _quiet(), torch.no_grad():
        mtq.quantize(sites, config, lambda model: model(inputs))
    pre_scales: dict[str, torch.Tensor] = {}
    low_rank: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    quantized: list[Any] = list(sites.linears)
    for linear, members in zip(quantized, fitting.values(), strict=True):
        scale = linear.input_quantizer.pre_quant_scale.detach().float().clone()
        pre_scales |= dict.fromkeys(members, scale)
        if rank:
            down = linear.weight_quantizer.svdquant_lora_a.detach().float().clone()
            up = linear.weight_quantizer.svdquant_lora_b.detach().float()
            sizes = [layer.get_parameter(f"{name}.weight").shape[0] for name in members]
            low_rank |= {name: (down, part.clone()) for name, part in zip(members, up.split(sizes), strict=True)}
    return SearchResult(pre_scales, low_rank)


def choose_schemes(
    layer: nn.Module, readers: Mapping[str, Sequence[str]], rows: Rows, _: Rows, *, bits: float
) -> SearchResult:
    """A scheme for each linear at ``bits`` per weight on average, by ``auto_quantize``.

    ModelOpt weighs a format by the squared change of each output times the squared gradient of a loss. A layer by
    itself has no loss: it is given the sum of every output along random signs, over the output's norm, so that relative
    errors count alike in all of them.
    """
    mtq = _modelopt()
    sites, inputs = _Sites(layer, readers), [rows[name] for name in readers]
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        outputs = sites(inputs)
    signs = [torch.randint(0, 2, y.shape, generator=generator) * 2.0 - 1.0 for y in outputs]
    along = [sign / y.norm().clamp(min=torch.finfo(torch.float32).tiny) for sign, y in zip(signs, outputs, strict=True)]

    def loss(found: Sequence[torch.Tensor], _: object) -> torch.Tensor:
        return torch.stack([(y * d).sum() for y, d in zip(found, along, strict=True)]).sum()

    with _quiet(), torch.enable_grad():
        _, state = mtq.auto_quantize(
            sites,
            {"effective_bits": bits},
            [getattr(mtq, name) for name in _CONFIGS.values()],
            data_loader=[inputs],
            forward_step=lambda model, batch: model(batch),
            loss_func=loss,
            num_calib_steps=1,
            num_score_steps=1,
        )
    chosen = {key.removesuffix(".quant_recipe"): recipe for key, recipe in state["best"]["recipe"].items()}
    names = {f"linears.{i}": members for i, members in enumerate(readers.values())}
    return SearchResult(schemes={n: _scheme(chosen[key]) for key, members in names.items() for n in members})


def _modelopt() -> Any:
    with _quiet():
        import modelopt.torch.quantization as mtq
    return mtq


def _scheme(recipe: Any) -> str:
    """The scheme of ModelOpt's choice; it names formats by the configuration they were given as, or by their bits."""
    text = str(recipe)
    for scheme, config in _CONFIGS.items():
        if text.startswith(config) or text.endswith(f"(effective-bits: {BUDGETED[scheme]})"):
            return scheme
    return UNQUANTIZED


def _fits(layer: nn.Module, members: Sequence[str]) -> bool:
    shapes = (tuple(layer.get_parameter(f"{name}.weight").shape) for name in members)
    return not any(map(layout_of(_PRE_SCALED.name).refusal, shapes))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ModelOpt prints each linear it looks at, has a bar of its own, and warns of releases it was not tested with."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield
