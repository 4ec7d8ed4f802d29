"""Capture of the codecs from the installed diffusers: video decoder and encoder as streams, and the sound decoder.

The published video autoencoder works a few frames at a time already, with a list of caches that it fills as it goes.
The adapters hand it that list and return it: a clip is then one call of a `…_first` graph and one of a `…_next` graph
for each further latent frame, with the caches as values between them. Decoding the beginning of a clip is the beginning
of decoding it, and memory does not depend on its length. No layer is written here; no weight is read.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cosmos_export.capture.export import exported
from cosmos_export.capture.importer import Importer
from cosmos_export.diagnostics import InternalError, UserError
from cosmos_export.ir.dims import Dim, Shape, Size, expression, symbol
from cosmos_export.ir.graph import Graph, spec_of
from cosmos_export.ir.program import Edge, Loop, Program
from cosmos_export.ir.spec import Rate, Transform, WeightBinding, WeightSource

_DIMS = {
    "height": Dim("height", 3, 1024, "latent rows"),
    "width": Dim("width", 3, 1024, "latent columns"),
    "sound_len": Dim("sound_len", 1, 65536, "sound latents"),
}
_EXAMPLE = {"height": 6, "width": 10, "sound_len": 13}

_Result = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""A value and the caches by the names of their convolutions."""


def capture_vae_decoder(config: Mapping[str, Any], sources: Mapping[str, WeightSource]) -> Program:
    """Latents to pixels, one latent frame per call.

    ``vae_decoder_first``: ``latent`` float32 [1, C, 1, height, width], normalised as the sampler leaves it → ``pixels``
    float32 [1, 3, 1, 16·height, 16·width] in [−1, 1], and the caches. ``vae_decoder_next``: the next ``latent`` and the
    caches → the next four frames of ``pixels`` and the new caches. ``config`` is ``vae/config.json``.
    """
    vae = empty_video_autoencoder(config)
    vae.encoder = None
    return _stream("vae_decoder", _Decoder(vae), config, sources, "latent", "decoding does not read it")


def capture_vae_encoder(config: Mapping[str, Any], sources: Mapping[str, WeightSource]) -> Program:
    """Pixels to normalised latents, one latent frame per call; the mode of the distribution, never a sample.

    ``vae_encoder_first``: ``pixels`` float32 [1, 3, 1, 16·height, 16·width] in [−1, 1] → ``latent`` float32
    [1, C, 1, height, width] and the caches: all that an image or a policy needs. ``vae_encoder_next``: the next four
    frames and the caches → the next ``latent`` and the new caches. First and next are five frames, and so on.
    """
    vae = empty_video_autoencoder(config)
    vae.decoder = None
    return _stream("vae_encoder", _Encoder(vae), config, sources, "pixels", "encoding does not read it")


def capture_sound_decoder(config: Mapping[str, Any], sources: Mapping[str, WeightSource]) -> Program:
    """Graph ``sound_decoder``: ``sound_latent`` float32 [C, sound_len] → ``waveform`` float32 [2, 1920·sound_len].

    ``config`` is ``sound_tokenizer/config.json``. Weights that are stored as magnitude and direction are bound as such.
    """
    from diffusers import Cosmos3AVAEAudioTokenizer

    with _quiet(), torch.device("meta"):
        model: nn.Module = Cosmos3AVAEAudioTokenizer.from_config({**config, "encoder_enabled": False}).eval()
        normalised = _remove_weight_norm(model)
    bindings = _bindings(model, sources, "sound_tokenizer", normalised)
    capture = _Capture(_SoundDecoder(model), bindings)
    shape = (config["vocoder_input_dim"], symbol("sound_len"))
    graph = capture.graph("sound_decoder", {"sound_latent": shape}, {})
    return Program(
        graphs={graph.name: graph},
        dims={"sound_len": _DIMS["sound_len"]},
        rates={"sound_latent": Rate.REQUEST},
        loop=Loop(body=graph.name, carried={}),
        unused_keys=_unused([graph], sources, "decoding does not read it"),
        history=["capture"],
    )


# -- adapters ---------------------------------------------------------------------------------------------------------


class _Statistics(nn.Module):
    """Mean and deviation of the latents, float32; the pipeline has them in the autoencoder's type."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[f"latents_{name}"], dtype=torch.float32))

    def forward(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and inverse deviation, rounded as the pipeline rounds them."""
        mean, inverse = self.mean.to(dtype), 1.0 / self.std.to(dtype)
        return mean.view(1, -1, 1, 1, 1), inverse.view(1, -1, 1, 1, 1)


class _Stream(nn.Module):
    """A half of the video autoencoder with its caches as arguments and results."""

    input_channels: int
    input_frames: tuple[int, int]
    """Frames that the first and every further call take."""
    input_scale: int
    """Rows of the input per latent row."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.statistics = _Statistics(self.config)

    def codec(self) -> nn.Module:
        """The module that has the caches."""
        raise NotImplementedError

    def cached(self) -> dict[str, Any]:
        """The convolutions over time by name, in the order of their caches."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

        return {
            name.replace(".", "_"): module
            for name, module in self.codec().named_modules()
            if isinstance(module, WanCausalConv3d) and module.kernel_size[0] > 1
        }

    def run_codec(self, x: torch.Tensor, cache: Mapping[str, torch.Tensor] | None, **arguments: bool) -> _Result:
        """The published forward of the codec on the frames ``x`` with the caches of the frames before, if any."""
        convolutions = self.cached()
        state: list[Any] = [None] * len(convolutions) if cache is None else [cache[name] for name in convolutions]
        read = [0]
        y = self.codec()(x, feat_cache=state, feat_idx=read, **arguments)
        if read[0] != len(convolutions):
            raise InternalError("CX205", f"{read[0]} caches were used, {len(convolutions)} convolutions have one")
        before: torch.Tensor | None = None
        caches = {}
        for (name, convolution), kept in zip(convolutions.items(), state, strict=True):
            before = _steady(kept, before, convolution)
            caches[name] = before
        return y, caches


def _steady(kept: Any, before: torch.Tensor | None, convolution: Any) -> torch.Tensor:
    """A cache after the first frame in the form that it has from then on.

    After one frame the published code keeps one frame, or a mark that nothing came before, and fills up with zeros when
    it reads them. Here the zeros are there at once, and every call finds the same shape.
    """
    frames = convolution.kernel_size[0] - convolution.stride[0]
    if isinstance(kept, str):
        # No frame has been through this convolution. It works on what the convolution before it gave.
        assert before is not None
        return before.new_zeros(before.shape[0], convolution.in_channels, frames, *before.shape[3:])
    return F.pad(kept, (0, 0, 0, 0, frames - kept.shape[2], 0))


class _Decoder(_Stream):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.input_channels, self.input_frames, self.input_scale = self.config.z_dim, (1, 1), 1

    def codec(self) -> nn.Module:
        decoder: nn.Module = self.model.decoder
        return decoder

    def forward(self, latent: torch.Tensor, cache: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        dtype = self.model.post_quant_conv.weight.dtype
        mean, inverse = self.statistics(dtype)
        x = self.model.post_quant_conv(latent.to(dtype) / inverse + mean)
        y, caches = self.run_codec(x, cache, first_chunk=cache is None)
        if self.config.patch_size is not None:
            y = unpatchify(y, patch_size=self.config.patch_size)
        return {"pixels": torch.clamp(y, min=-1.0, max=1.0).to(torch.float32), **_named(caches)}


class _Encoder(_Stream):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.input_channels = self.config.in_channels // (self.config.patch_size or 1) ** 2
        self.input_frames = (1, self.config.scale_factor_temporal)
        self.input_scale = self.config.scale_factor_spatial

    def codec(self) -> nn.Module:
        encoder: nn.Module = self.model.encoder
        return encoder

    def forward(self, pixels: torch.Tensor, cache: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        dtype = self.model.quant_conv.weight.dtype
        x = pixels.to(dtype)
        if self.config.patch_size is not None:
            x = patchify(x, patch_size=self.config.patch_size)
        y, caches = self.run_codec(x, cache)
        mode = DiagonalGaussianDistribution(self.model.quant_conv(y)).mode()
        mean, inverse = self.statistics(dtype)
        return {"latent": ((mode - mean) * inverse).to(torch.float32), **_named(caches)}


def _named(caches: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"new_cache_{name}": value for name, value in caches.items()}


class _SoundDecoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, sound_latent: torch.Tensor) -> dict[str, torch.Tensor]:
        dtype = self.model.decoder.conv1.bias.dtype
        return {"waveform": self.model.decode(sound_latent.to(dtype)).to(torch.float32)}


# -- empty models -----------------------------------------------------------------------------------------------------


def empty_video_autoencoder(config: Mapping[str, Any]) -> Any:
    """The published autoencoder with parameters that have shapes only."""
    from diffusers import AutoencoderKLWan

    with _quiet(), torch.device("meta"):
        return AutoencoderKLWan.from_config(dict(config)).eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """The libraries' own use of what torch deprecates is not the user's concern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _remove_weight_norm(model: nn.Module) -> list[str]:
    """Give the normalised convolutions one weight each, as torch does; returns the names of these weights."""
    names = [name for name, module in model.named_modules() if hasattr(module, "weight_g")]
    for name in names:
        torch.nn.utils.remove_weight_norm(model.get_submodule(name))
    return [f"{name}.weight" for name in names]


def _bindings(
    model: nn.Module, sources: Mapping[str, WeightSource], folder: str, normalised: Iterable[str] = ()
) -> dict[str, WeightBinding]:
    """The place of every parameter of ``model`` on disk. All compute in one type, that of the most parameters on disk.

    Normalised weights are made in fp32: the product of magnitude and direction is rounded once, where it is used.
    """
    stored = {name: [name] for name, _ in model.named_parameters()}
    stored |= {name: [f"{name}_g", f"{name}_v"] for name in normalised}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    keys = [key for parts in stored.values() for key in parts]
    missing = [key for key in keys if key not in sources]
    if missing:
        raise UserError(
            "CX214",
            f"{folder}/ lacks {len(missing)} tensors that its configuration calls for, first `{missing[0]}`",
            "the download is incomplete, or the configuration is not of these weights",
        )
    wrong = [name for name, parts in stored.items() if sources[parts[-1]].shape != shapes[name]]
    if wrong:
        name = wrong[0]
        raise UserError(
            "CX214",
            f"{folder}/: `{name}` is {list(sources[stored[name][-1]].shape)}, its configuration calls for "
            f"{list(shapes[name])} ({len(wrong)} tensors differ)",
            "the configuration is not of these weights",
        )
    types = [sources[key].dtype for key in keys]
    dtype = max(sorted(set(types), key=str), key=types.count)
    return {
        name: WeightBinding(
            tuple(sources[key] for key in parts),
            Transform.IDENTITY if len(parts) == 1 else Transform.WEIGHT_NORM,
            dtype if len(parts) == 1 else torch.float32,
        )
        for name, parts in stored.items()
    }


# -- programs ---------------------------------------------------------------------------------------------------------


def _stream(
    name: str, stream: _Stream, config: Mapping[str, Any], sources: Mapping[str, WeightSource], value: str, unused: str
) -> Program:
    """The first and the next call of ``stream`` and the caches between them."""
    capture = _Capture(stream, _bindings(stream.model, sources, "vae"))
    rows, columns = (stream.input_scale * symbol(dim) for dim in ("height", "width"))
    first_shape, next_shape = ((1, stream.input_channels, n, rows, columns) for n in stream.input_frames)
    first = capture.graph(f"{name}_first", {value: first_shape}, {})
    caches = {
        output.removeprefix("new_"): spec_of(node)
        for output, node in first.outputs.items()
        if output.startswith("new_cache_")
    }
    following = capture.graph(f"{name}_next", {value: next_shape}, {k: spec.shape for k, spec in caches.items()})
    return Program(
        graphs={first.name: first, following.name: following},
        dims={dim: _DIMS[dim] for dim in ("height", "width")},
        rates={value: Rate.CARRIED},
        loop=Loop(body=following.name, carried={cache: f"new_{cache}" for cache in caches}),
        edges=[Edge(first.name, f"new_{cache}", following.name, cache) for cache in caches],
        unused_keys=_unused([first, following], sources, unused),
        history=["capture"],
    )


def _unused(graphs: Iterable[Graph], sources: Mapping[str, WeightSource], reason: str) -> dict[str, str]:
    read = {key for graph in graphs for node in graph.weights.values() for key in node.meta["weight"].keys}
    return {key: reason for key in sources if key not in read}


class _Capture:
    """Exports an adapter on tensors that have shapes only."""

    def __init__(self, adapter: nn.Module, bindings: Mapping[str, WeightBinding]) -> None:
        self._adapter = adapter.eval()
        self._bindings = bindings
        self._mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self._constants: dict[str, torch.Tensor] = {}
        self._dtype = next(b.dtype for b in bindings.values() if b.transform is Transform.IDENTITY)
        with self._mode:
            for path, owner in adapter.named_modules():
                for leaf, parameter in list(owner.named_parameters(recurse=False)):
                    empty = torch.empty(parameter.shape, dtype=self._dtype, device="cpu")
                    owner._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
                for leaf, buffer in list(owner.named_buffers(recurse=False)):
                    self._constants[f"{path}.{leaf}".partition(".")[2]] = buffer
                    owner._buffers[leaf] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")

    def graph(self, name: str, inputs: Mapping[str, Shape], caches: Mapping[str, Shape]) -> Graph:
        """The adapter as a graph: ``inputs`` are float32, ``caches`` are in the model's type."""
        declared = {dim.name: torch.export.Dim(dim.name, min=dim.min, max=dim.max) for dim in _DIMS.values()}
        with self._mode:
            example: dict[str, Any] = {k: torch.zeros(_sizes(shape)) for k, shape in inputs.items()}
            state = {k: torch.zeros(_sizes(shape), dtype=self._dtype) for k, shape in caches.items()}
        dynamic: dict[str, Any] = {k: _dynamic(shape, declared) for k, shape in inputs.items()}
        if caches:
            example["cache"] = {k.removeprefix("cache_"): value for k, value in state.items()}
            dynamic["cache"] = {k.removeprefix("cache_"): _dynamic(shape, declared) for k, shape in caches.items()}
        program = exported(self._adapter, example, dynamic)
        graph = Importer(program, name, {**inputs, **caches}, self._bindings, self._constants).run()
        graph.eliminate_dead_code()
        return graph


def _sizes(shape: Shape) -> list[int]:
    known = {symbol(name): size for name, size in _EXAMPLE.items()}
    return [int(expression(size).subs(known)) for size in shape]


def _dynamic(shape: Shape, declared: Mapping[str, Any]) -> dict[int, Any]:
    def dynamic(size: Size) -> Any:
        if isinstance(size, int):
            return torch.export.Dim.STATIC
        factor, dim = size.as_coeff_Mul()
        return declared[dim.name] if factor == 1 else int(factor) * declared[dim.name]

    return {axis: dynamic(size) for axis, size in enumerate(shape)}
