"""Provenance and bill of materials: the standards' own validators take them, and they say what the manifest says."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import build_harness as harness
import pytest
from own_environment import environment

from cosmos_export.bundle import CalibrationRecord, Manifest, PrecisionRecord, provenance, read_bundle
from cosmos_export.compiler.options import resolve
from cosmos_export.diagnostics import UserError
from cosmos_export.options import BuildOptions

CHECK = Path(__file__).with_name("validate_documents.py")
SOURCES = provenance.data_sources(
    {
        "sources": [
            {"name": "prompts.txt", "sha256": "1" * 64, "count": 32, "licence": "Apache-2.0", "origin": "synthetic"},
            {"name": "droid", "sha256": "2" * 64, "count": 8, "licence": None, "origin": None},
        ]
    }
)


def document(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def test_what_a_build_writes(omni_bundle: harness.Built) -> None:
    """The documents in a bundle are those of its manifest, and speak of every file but themselves."""
    manifest = read_bundle(omni_bundle.path)
    for name, data in provenance.documents(manifest).items():
        assert (omni_bundle.path / name).read_bytes() == data
    found = document(omni_bundle.path / provenance.PROVENANCE_FILE)
    own = {provenance.PROVENANCE_FILE, provenance.BOM_FILE}
    assert {one["name"]: one["digest"]["sha256"] for one in found["subject"]} == {
        file.path: file.sha256 for file in manifest.files if file.path not in own
    }
    made_of = {one["name"]: one for one in found["predicate"]["buildDefinition"]["resolvedDependencies"]}
    for file in manifest.inputs:
        assert made_of[f"{manifest.model.id}/{file.path}"]["digest"] == {"sha256": file.sha256}
    checks = found["predicate"]["runDetails"]["byproducts"]
    assert len(checks) == len(manifest.evaluation) + len(manifest.plan_checks) > 0
    bom = document(omni_bundle.path / provenance.BOM_FILE)
    assert {tool["name"]: tool["version"] for tool in bom["metadata"]["tools"]["components"]} == manifest.tools


def quantized(manifest: Manifest, created_by: str) -> Manifest:
    """``manifest`` as of a bundle that was calibrated and has a failed check."""
    calibration = CalibrationRecord("3" * 64, "4" * 64, "5" * 64, "calibration/lineage.json")
    record = PrecisionRecord("fp8", (), {"gen": "fp8"}, "exact", calibration, "quantization/report.json")
    failed = dataclasses.replace(manifest.evaluation[0], verdict="fail", note="3.1 times the limit")
    options = {**manifest.options, provenance.CREATED_BY: created_by}
    found = (failed, *manifest.evaluation[1:])
    return dataclasses.replace(manifest, recipe="fp8", precision=record, evaluation=found, options=options)


def test_the_validators_of_the_standards(omni_bundle: harness.Built, tmp_path: Path) -> None:
    python = environment("validators", "cyclonedx-python-lib[json-validation]==11.12.0", "in-toto-attestation==0.9.3")
    manifest = read_bundle(omni_bundle.path)
    built_by = quantized(manifest, "https://ci.example.com/build.yml@refs/heads/main")
    made = {
        **{f"plain/{name}": data for name, data in provenance.documents(manifest).items()},
        **{f"quantized/{name}": data for name, data in provenance.documents(built_by, SOURCES).items()},
        "engines/provenance.intoto.json": json.dumps(provenance.provenance_of_engines(manifest, "6" * 64)).encode(),
    }
    for name, data in made.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in made]
    checked = subprocess.run([str(python / "python"), str(CHECK), *paths], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.count("valid") == len(made)
    # What the validators would not take is not taken: they do look.
    broken = document(tmp_path / "plain" / provenance.BOM_FILE)
    broken["components"][0]["type"] = "model"
    (tmp_path / "broken.cdx.json").write_text(json.dumps(broken))
    command = [str(python / "python"), str(CHECK), str(tmp_path / "broken.cdx.json")]
    assert subprocess.run(command, capture_output=True).returncode != 0


def test_data_checks_and_the_builder_are_said(omni_bundle: harness.Built) -> None:
    manifest = quantized(read_bundle(omni_bundle.path), "urn:builder:7")
    found = provenance.provenance(manifest, SOURCES)
    assert found["predicate"]["runDetails"]["builder"]["id"] == "urn:builder:7"
    made_of = {one["name"]: one for one in found["predicate"]["buildDefinition"]["resolvedDependencies"]}
    assert made_of["data/prompts.txt"]["annotations"] == {"licence": "Apache-2.0", "origin": "synthetic"}
    assert made_of["data/droid"]["annotations"] == {"licence": "not said", "origin": "not said"}
    assert made_of["calibration/scales"]["digest"] == {"sha256": "4" * 64}
    bom = provenance.bill_of_materials(manifest, SOURCES)
    card = bom["metadata"]["component"]["modelCard"]
    assert any("fail (3.1 times the limit)" in text for text in card["considerations"]["technicalLimitations"])
    assert [one["ref"] for one in card["modelParameters"]["datasets"]] == ["data-0", "data-1"]
    licences = [one.get("licenses") for one in bom["components"][1:]]
    assert licences == [[{"license": {"name": "Apache-2.0"}}], None]


@pytest.mark.parametrize("uri", ["", "a builder", "nobody", "https://x y", "http:", "1:2", "x" * 3000, "urn:\x1b[2J"])
def test_a_builder_is_a_uri(omni: Path, tmp_path: Path, uri: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(BuildOptions(omni, tmp_path / "x", created_by=uri))
    assert error.value.code == "CX726"


def test_the_time_that_a_build_states(monkeypatch: pytest.MonkeyPatch, omni: Path, tmp_path: Path) -> None:
    monkeypatch.setenv(provenance.EPOCH, "1700000000")
    assert provenance.time_of_build().isoformat() == "2023-11-14T22:13:20+00:00"
    for wrong in ("", "now", "-1", "1.5", "9" * 12, "9" * 5000, "\u0663"):
        monkeypatch.setenv(provenance.EPOCH, wrong)
        with pytest.raises(UserError) as error:
            resolve(BuildOptions(omni, tmp_path / "x"))
        assert error.value.code == "CX727"
