"""What `finish` reads of a bundle and beside it: requests that fit the manifest, and nothing of another owner."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import bundle_samples
import pytest

import cosmos_export.compiler.finish as finishing
from cosmos_export.bundle import open_bundle, verify_bundle
from cosmos_export.diagnostics import CosmosExportError, ToolError
from cosmos_export.kernels.description import DOCUMENT, Output, PluginRecord, document_text

REQUEST = bundle_samples.REQUEST
waiting = bundle_samples.waiting


def with_value(field: str, value: Any) -> dict[str, Any]:
    return {"engines": [copy.deepcopy(REQUEST) | {field: value}]}


def test_requests_are_read(tmp_path: Path) -> None:
    (found,) = finishing.read_requests(open_bundle(waiting(tmp_path / "x")))
    assert (found.graph, found.shapes) == ("reasoner", ({"input_ids": ((1,), (512,), (4096,))},))
    assert json.loads(finishing.requests_text([found])) == {"engines": [REQUEST]}


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ([], "not an object"),
        ({}, "field `engines` is missing"),
        ({"engines": [REQUEST], "more": 1}, "unknown field"),
        ({"engines": [REQUEST, REQUEST]}, "is asked for twice"),
        (with_value("graph", "../../x"), "graph's name"),
        (with_value("graph", "other"), "not a graph"),
        (with_value("graph", "generator"), "not a model"),
        (with_value("graph", {}), "expected a string"),
        (with_value("profiles", ["720p"]), "not profiles"),
        (with_value("profiles", []), "not profiles"),
        (with_value("shapes", []), "0 for 1 profiles"),
        (with_value("shapes", [{"input_ids": [[1], [2]]}]), "no smallest"),
        (with_value("shapes", [{"input_ids": [[1], [2], [3, 4]]}]), "no smallest"),
        (with_value("shapes", [{"input_ids": [[1], [3], [2]]}]), "min <= opt"),
        (with_value("shapes", [{"input_ids": [[-1], [3], [4]]}]), "min <= opt"),
        (with_value("shapes", [{"input_ids": [["1"], [3], [4]]}]), "expected an integer"),
        (with_value("attention", -1), "less than 0"),
        (with_value("attention", True), "expected an integer"),
        (with_value("plugins", 1.5), "expected an integer"),
        (with_value("decomposable_attention", 1), "expected a boolean"),
        (with_value("weights", [REQUEST["weights"][0] | {"offset": 8}]), "not within weights"),
        (with_value("weights", [REQUEST["weights"][0] | {"path": "onnx/reasoner.onnx"}]), "not within weights"),
        (with_value("weights", [REQUEST["weights"][0] | {"more": 1}]), "unknown field"),
    ],
)
def test_requests_that_do_not_fit_are_refused(tmp_path: Path, document: Any, said: str) -> None:
    with pytest.raises(CosmosExportError, match=said) as caught:
        finishing.finish(waiting(tmp_path / "x", document))
    assert caught.value.code == "CX711"


def test_kernels_are_files_of_the_bundle(tmp_path: Path) -> None:
    record = PluginRecord("norm", "k", ("bf16",), (Output("bf16", (1,)),), (), (1, 1, 1), 32, 0)
    asked = with_value("plugins", 1)
    good = {DOCUMENT: document_text([record]).encode(), "norm.ptx": b"// ptx"}
    assert finishing.read_requests(open_bundle(waiting(tmp_path / "good", asked, good)))
    outside = document_text([replace(record, name="../../outside/norm")]).encode()
    for number, plugins in enumerate((None, {DOCUMENT: good[DOCUMENT]}, {**good, DOCUMENT: outside})):
        with pytest.raises(CosmosExportError) as caught:
            finishing.read_requests(open_bundle(waiting(tmp_path / f"{number}", asked, plugins)))
        assert caught.value.code == "CX711"


def test_no_text_of_the_requests_is_code(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    code, weight = f"__import__('os').mkdir({str(mark)!r})", REQUEST["weights"][0]
    changed = [{**REQUEST, field: code} for field in REQUEST]
    changed += [{**REQUEST, "weights": [{**weight, field: code}]} for field in weight]
    changed += [{**REQUEST, "profiles": [code]}, {**REQUEST, "shapes": [{"input_ids": [[code], [512], [4096]]}]}]
    changed += [{**REQUEST, "shapes": [{code: REQUEST["shapes"][0]["input_ids"]}]}, {**REQUEST, code: 1}]
    taken = 0
    for number, request in enumerate(changed):
        root = waiting(tmp_path / f"{number}", {"engines": [request]})
        try:
            finishing.read_requests(open_bundle(root))
            taken += 1
        except CosmosExportError as error:
            assert error.code == "CX711"
        assert not mark.exists(), request
    assert taken == 3, "names of weights, of their types and of inputs are text"


def test_a_damaged_manifest_is_refused_before_anything_is_removed(tmp_path: Path) -> None:
    root = waiting(tmp_path / "x")
    left = root / "engines" / "reasoner.engine"
    left.write_bytes(b"half")
    manifest = root / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"steps"', b'"stepz"').replace(b"480p", b"481p"))
    with pytest.raises(CosmosExportError) as caught:
        finishing.finish(root)
    assert caught.value.code == "CX711" and left.exists()


def test_what_others_left_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link and a file of another user are not removed, and the bundle does not verify."""
    root = waiting(tmp_path / "x")
    (root / "engines" / "reasoner.engine").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CosmosExportError) as caught:
        finishing.finish(root)
    assert caught.value.code == "CX711" and (root / "engines" / "reasoner.engine").is_symlink()
    (root / "engines" / "reasoner.engine").unlink()
    (root / "engines" / "reasoner.engine").write_bytes(b"half")
    monkeypatch.setattr(os, "geteuid", lambda: 12_345)
    with pytest.raises(CosmosExportError) as caught:
        finishing.finish(root)
    assert caught.value.code == "CX711" and (root / "engines" / "reasoner.engine").exists()
    monkeypatch.undo()
    with pytest.raises(CosmosExportError) as caught:
        finishing.finish(root)  # ours: it is removed
    assert caught.value.code == "CX404" and verify_bundle(root).ok


def test_timings_are_those_of_this_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "x"
    cache = tmp_path / ".x.timing-cache"
    assert finishing._timing_cache(root) == cache
    cache.write_bytes(b"timings")
    cache.chmod(0o644)
    assert finishing._timing_cache(root) == cache and not capsys.readouterr().err
    cache.chmod(0o666)
    assert finishing._timing_cache(root) is None
    assert "not used" in capsys.readouterr().err
    cache.chmod(0o600)
    monkeypatch.setattr(os, "geteuid", lambda: 12_345)
    assert finishing._timing_cache(root) is None
    monkeypatch.undo()
    cache.unlink()
    cache.symlink_to(tmp_path / "elsewhere")
    assert finishing._timing_cache(root) is None


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ToolError("CX422", "node `\x1b]0;owned\x07`"), 4, "error[CX422]: node `\\x1b]0;owned\\x07`\n"),
        (PermissionError(13, "Permission denied", "x"), 4, "error[CX801]: [Errno 13]"),
        (KeyboardInterrupt(), 130, "interrupted: the bundle is as it was"),
    ],
)
def test_how_it_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    def fails(root: Path) -> None:
        raise error

    monkeypatch.setattr(finishing, "finish", fails)
    assert finishing.main(["x"]) == code
    assert capsys.readouterr().err.startswith(said)
