"""Verification fails closed: each way in which a directory can differ from its manifest is found and named."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bundle_samples
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos_export.bundle import Status, read_bundle, verify_bundle
from cosmos_export.bundle import verify as verifying
from cosmos_export.bundle.manifest import MAX_MANIFEST_BYTES, parse_manifest
from cosmos_export.bundle.strict import StrictError, seal
from cosmos_export.diagnostics import ExitCode, FindingError, UserError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    bundle_samples.write(tmp_path / "x")
    return tmp_path / "x"


def failures(path: Path) -> dict[str, str]:
    report = verify_bundle(path)
    assert not report.ok
    with pytest.raises(FindingError, match="CX711"):
        read_bundle(path)
    return {check.path: check.detail for check in report.failures}


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((path / "manifest.json").read_bytes())
    change(document)
    (path / "manifest.json").write_bytes(seal(document))


def test_a_good_bundle(bundle: Path) -> None:
    report = verify_bundle(bundle)
    assert report.ok
    assert [check.path for check in report.checks] == ["manifest.json", *sorted(bundle_samples.FILES)]
    assert all(check.status is Status.PASS for check in report.checks)


def test_the_path_itself_may_be_a_link(bundle: Path) -> None:
    (bundle.parent / "current").symlink_to(bundle)
    assert verify_bundle(bundle.parent / "current").ok


@pytest.mark.parametrize("name", sorted(set(bundle_samples.FILES) - {"empty.txt"}))
def test_a_changed_byte(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    found = failures(bundle)
    assert list(found) == [name]
    assert found[name].startswith("SHA-256 is ")


def test_every_byte_of_a_file_counts(bundle: Path) -> None:
    path = bundle / "tokenizer" / "tokenizer.json"
    original = path.read_bytes()
    for position in range(len(original)):
        path.write_bytes(original[:position] + b"?" + original[position + 1 :])
        assert failures(bundle)


@pytest.mark.parametrize("change", [-1, 1])
def test_another_size(bundle: Path, change: int) -> None:
    path = bundle / "engines" / "generator.plan"
    os.truncate(path, path.stat().st_size + change)
    assert failures(bundle) == {"engines/generator.plan": f"{17000 + change:,} bytes, the manifest says 17,000"}
    statuses = {check.path: check.status for check in verify_bundle(bundle).checks}
    assert statuses["empty.txt"] is Status.SKIPPED, "what was not hashed is not called good"


def test_missing_file(bundle: Path) -> None:
    (bundle / "engines" / "generator.plan").unlink()
    assert failures(bundle) == {"engines/generator.plan": "missing"}


@pytest.mark.parametrize("name", ["extra.bin", "engines/extra.bin", ".hidden", "engines/.hidden", "Manifest.json"])
def test_extra_file(bundle: Path, name: str) -> None:
    (bundle / name).write_text("")
    assert failures(bundle) == {name: "not listed in the manifest"}


def test_extra_directory_even_if_empty(bundle: Path) -> None:
    (bundle / "plugins").mkdir()
    assert failures(bundle) == {"plugins": "not listed in the manifest"}


def test_many_extra_entries_are_counted_up_to_a_limit(bundle: Path) -> None:
    for i in range(500):
        (bundle / f"extra-{i:03}").write_text("")
    assert len(failures(bundle)) == verifying.MAX_EXTRA_ENTRIES + 1


def test_symlinked_file(bundle: Path) -> None:
    path = bundle / "engines" / "generator.plan"
    path.rename(bundle.parent / "elsewhere")
    path.symlink_to(bundle.parent / "elsewhere")
    assert failures(bundle) == {"engines/generator.plan": "a symbolic link"}


def test_symlink_inside_the_bundle(bundle: Path) -> None:
    (bundle / "engines" / "alias.plan").symlink_to("generator.plan")
    assert failures(bundle) == {"engines/alias.plan": "not listed in the manifest"}


def test_symlinked_directory(bundle: Path) -> None:
    (bundle / "engines").rename(bundle.parent / "elsewhere")
    (bundle / "engines").symlink_to(bundle.parent / "elsewhere")
    found = failures(bundle)
    assert found["engines"] == "a symbolic link"
    assert found["engines/generator.plan"] == "missing"


def test_symlinked_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").rename(bundle.parent / "manifest.json")
    (bundle / "manifest.json").symlink_to(bundle.parent / "manifest.json")
    assert failures(bundle) == {"manifest.json": "cannot be opened: a symbolic link"}


@pytest.mark.parametrize("name", ["engines/generator.plan", "manifest.json"])
def test_hard_link(bundle: Path, name: str) -> None:
    (bundle.parent / "other-name").hardlink_to(bundle / name)
    assert failures(bundle)[name].startswith("2 hard links")


@pytest.mark.parametrize("name", ["engines/generator.plan", "manifest.json"])
def test_fifo_does_not_block(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    assert failures(bundle) == {name: "not a regular file"}


def test_directory_in_place_of_a_file(bundle: Path) -> None:
    (bundle / "empty.txt").unlink()
    (bundle / "empty.txt").mkdir()
    assert failures(bundle) == {"empty.txt": "not a regular file"}


def test_file_in_place_of_a_directory(bundle: Path) -> None:
    (bundle / "tokenizer" / "tokenizer.json").unlink()
    (bundle / "tokenizer").rmdir()
    (bundle / "tokenizer").write_text("")
    assert failures(bundle) == {
        "tokenizer": "a file, expected a directory",
        "tokenizer/tokenizer.json": "missing",
    }


def test_unreadable_directory(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listdir = os.listdir
    calls = iter(range(100))

    def fail_below_the_root(descriptor: int) -> list[str]:
        if next(calls):
            raise PermissionError(13, "Permission denied")
        return listdir(descriptor)

    monkeypatch.setattr(verifying.os, "listdir", fail_below_the_root)
    report = verify_bundle(bundle)
    assert not report.ok
    assert "cannot be listed: Permission denied" in {check.detail for check in report.failures}


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname", "engines/../../outside", "a\\b", "manifest.json"])
def test_a_manifest_whose_paths_leave_the_bundle(bundle: Path, path: str) -> None:
    (bundle.parent / "outside").write_text("")
    edit(bundle, lambda d: d["files"][0].update(path=path))
    found = failures(bundle)
    assert list(found) == ["manifest.json"]
    assert found["manifest.json"].startswith("files[0].path: ")


def test_a_file_that_changes_between_listing_and_hashing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is hashed is what was opened: swapping in a link after the listing gains nothing."""
    compare = verifying._compare_listing

    def then_swap(*args: Any) -> Any:
        result = compare(*args)
        path = bundle / "engines" / "generator.plan"
        path.rename(bundle.parent / "elsewhere")
        path.symlink_to(bundle.parent / "elsewhere")
        return result

    monkeypatch.setattr(verifying, "_compare_listing", then_swap)
    report = verify_bundle(bundle)
    assert {check.path: check.detail for check in report.failures} == {
        "engines/generator.plan": "cannot be read: a symbolic link"
    }


def test_truncated_manifest(bundle: Path) -> None:
    data = (bundle / "manifest.json").read_bytes()
    (bundle / "manifest.json").write_bytes(data[: len(data) // 2])
    assert failures(bundle)["manifest.json"].startswith("not JSON")


def test_huge_manifest_is_not_read(bundle: Path) -> None:
    os.truncate(bundle / "manifest.json", 2**40)  # sparse
    assert failures(bundle) == {"manifest.json": f"larger than the {MAX_MANIFEST_BYTES:,} bytes a manifest may have"}


def flips(count: int, size: int) -> list[tuple[int, int]]:
    chosen = random.Random(0)
    return [(chosen.randrange(size), 1 << chosen.randrange(8)) for _ in range(count)]


@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_no_bit_of_a_manifest_can_flip(bundle: Path, count: int) -> None:
    data = (bundle / "manifest.json").read_bytes()
    for at, bit in flips(count, len(data)):
        changed = bytearray(data)
        changed[at] ^= bit
        with pytest.raises(StrictError):
            parse_manifest(bytes(changed))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data[:-1] + b" ",
        lambda data: data + b"\n",
        lambda data: b" " + data,
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data.replace(b"12.5", b"12.50"),
        lambda data: data.replace(b'"omni"', b'"\\u006fmni"'),
        lambda data: json.dumps(json.loads(data)).encode(),
        lambda data: b"\xef\xbb\xbf" + data,
    ],
)
def test_a_manifest_has_one_form(bundle: Path, change: Callable[[bytes], bytes]) -> None:
    path = bundle / "manifest.json"
    changed = change(path.read_bytes())
    assert changed != path.read_bytes()
    path.write_bytes(changed)
    assert list(failures(bundle)) == ["manifest.json"]


def test_a_manifest_that_was_sealed_again_is_not_noticed(bundle: Path) -> None:
    """The limit stated in docs/bundle.md: without a signature nothing vouches for the manifest itself."""
    edit(bundle, lambda d: d["volatile"].update(build_seconds=0.5))
    assert verify_bundle(bundle).ok


@pytest.mark.parametrize("kind", ["absent", "file", "empty", "nul"])
def test_not_a_bundle(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("x\0y" if kind == "nul" else "x")
    if kind == "file":
        path.write_text("")
    elif kind == "empty":
        path.mkdir()
    with pytest.raises(UserError, match="CX700") as caught:
        verify_bundle(path)
    assert caught.value.exit_code is ExitCode.USAGE


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_damage_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any byte of any file changed, cut off or added: verification says no, and says which."""
    bundle = tmp_path_factory.mktemp("fuzz") / "x"
    bundle_samples.write(bundle)
    name = data.draw(st.sampled_from(sorted(bundle_samples.FILES)))
    content = (bundle / name).read_bytes()
    position = data.draw(st.integers(0, len(content)))
    inserted = data.draw(st.binary(max_size=3))
    removed = data.draw(st.integers(0, 3))
    changed = content[:position] + inserted + content[position + removed :]
    (bundle / name).write_bytes(changed)
    report = verify_bundle(bundle)
    assert report.ok == (changed == content)
    assert report.ok or [check.path for check in report.failures] == [name]
