"""Models and graphs of a bundle against the manifest's contracts, without a library that runs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from cosmos_export.bundle import BundleFiles, GraphContract, Tensor
from cosmos_export.bundle.manifest import MANIFEST_NAME
from cosmos_export.checkpoint.strict_json import parse_object
from cosmos_export.diagnostics import FindingError, shown
from cosmos_export.targets.onnx.declared import declared

_FORMS: Mapping[str, Mapping[str, str]] = {".onnx": {}, ".cpu.onnx": {"bfloat16": "float32"}}
"""Ending of a model's name → types that it has in place of the graph's: no CPU kernel takes bf16."""


def model_problems(files: BundleFiles) -> Iterator[tuple[str, str]]:
    """Path of each model or graph that takes or returns other tensors than the manifest says, and why; the manifest's
    own name where a graph has none."""
    manifest = files.manifest
    roles = {record.path: record.role for record in manifest.files}
    engines = {engine.graph for engine in manifest.engines}
    separate = manifest.options.get("weights") == "external"
    weights = {weight.name for engine in manifest.engines for weight in engine.weights}
    for name, contract in manifest.graphs.items():
        models = {f"onnx/{name}{ending}": wider for ending, wider in _FORMS.items()}
        document = f"graphs/{name}.json"
        present = [path for path in models if roles.get(path) == "onnx"]
        for path in present:
            try:
                inputs, outputs = declared(files.read(path, "onnx"))
                # Weights that are inputs follow the graph's own. Graphs without an engine have some too.
                more = {tensor.name for tensor in inputs[len(contract.inputs) :]} - weights
                unknown = more if not separate else {name for name in more if "." not in name and manifest.engines}
                problem = (
                    f"it takes {shown(min(unknown))}, which the manifest does not say" if unknown
                    else _model_problem(inputs[: len(contract.inputs)], outputs, contract, models[path])
                )  # fmt: skip
            except ValueError as error:
                problem = f"it is no ONNX model: {error}"
            except FindingError as error:
                problem = error.message
            if problem:
                yield path, problem
        if roles.get(document) == "graph":
            present.append(document)
            try:
                problem = _document_problem(files.read(document, "graph"), contract)
            except FindingError as error:
                problem = error.message
            if problem:
                yield document, problem
        if not present and name not in engines and name not in manifest.chains:
            yield MANIFEST_NAME, f"graphs.{shown(name)}: no file of this bundle runs it"


def _model_problem(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], contract: GraphContract, wider: Mapping[str, str]
) -> str | None:
    for what, found, wanted in (("takes", inputs, contract.inputs), ("returns", outputs, contract.outputs)):
        if problem := _difference(what, found, [_as(tensor, wider) for tensor in wanted]):
            return problem
    return None


def _as(tensor: Tensor, wider: Mapping[str, str]) -> Tensor:
    return Tensor(tensor.name, wider.get(tensor.dtype, tensor.dtype), tensor.dims)


def _difference(what: str, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> str | None:
    if len(found) != len(wanted):
        return f"it {what} {len(found)} tensors, the manifest says {len(wanted)}"
    for mine, theirs in zip(found, wanted, strict=True):
        if mine != theirs:
            return f"it {what} {_form(mine)}, the manifest says {_form(theirs)}"
    return None


def _form(tensor: Tensor) -> str:
    return f"{shown(tensor.name)} {shown(tensor.dtype)}{shown(list(tensor.dims))}"


def _document_problem(data: bytes, contract: GraphContract) -> str | None:
    """Names and types of inputs, their sizes where those are numbers, and names of outputs: what needs no PyTorch. Of
    a closed loop the names alone, since its graph is that of one step."""
    try:
        document = parse_object(data)
        graph, is_loop = document["graph"], "loop" in document
        found = [_plain(Tensor(i["name"], i["dtype"], tuple(i["shape"]))) for i in graph["inputs"]]
        outputs = list(graph["outputs"])
    except (ValueError, KeyError, TypeError) as error:
        return f"it is no document of a graph: {shown(str(error))}"
    if is_loop:
        names = {name for name, _, _ in found}
        wanted = {t.name for t in contract.inputs} | {t.name.removesuffix("_final") for t in contract.outputs}
        return None if wanted <= names else f"it has no {shown(min(wanted - names))}, which the manifest says"
    for mine, theirs in zip(found, map(_plain, contract.inputs), strict=False):
        if mine != theirs:
            return f"it takes {shown(mine)}, the manifest says {shown(theirs)}"
    if len(found) != len(contract.inputs) or outputs != [t.name for t in contract.outputs]:
        return "it takes or returns other tensors than the manifest says"
    return None


def _plain(tensor: Tensor) -> tuple[object, object, tuple[int | None, ...]]:
    """Name, type, and those of its sizes that are numbers."""
    return tensor.name, tensor.dtype, tuple(size if type(size) is int else None for size in tensor.dims)
