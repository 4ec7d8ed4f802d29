"""Signatures: what is signed is every byte, the stock tool accepts it, and each way of cheating is found and named."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bundle_samples
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from own_environment import environment

import cosmos_export
from cosmos_export import bundle as bundles
from cosmos_export.bundle import signature
from cosmos_export.bundle.files import MAX_SIGNATURE_BYTES, SIGNATURE_NAME
from cosmos_export.bundle.strict import seal
from cosmos_export.cli import run, serve, verbs
from cosmos_export.cli.bundle import register
from cosmos_export.diagnostics import FindingError, UserError

STOCK = ("model-signing==1.1.1", "pyOpenSSL")
"""The second is imported by the first, which does not say so."""


def write_key(folder: Path, name: str, key: Any, encryption: KeySerializationEncryption | None = None) -> Path:
    """``name``.pem and ``name``.pub in ``folder``."""
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())
    (folder / f"{name}.pem").write_bytes(secret)
    (folder / f"{name}.pub").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return folder / f"{name}.pem"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    bundle_samples.write(tmp_path / "x")
    return tmp_path / "x"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return write_key(tmp_path, "key", ec.generate_private_key(ec.SECP256R1()))


def sign(bundle: Path, key: Path, **options: Any) -> signature.Signed:
    return bundles.sign(bundles.open_bundle(bundle), key, **options)


def check(bundle: Path, key: Path) -> signature.Signed:
    """As `run` does it: the signature, then every byte."""
    files = bundles.open_bundle(bundle)
    signed = bundles.require_signature(files, key.with_suffix(".pub"))
    bundles.read_files(files)
    return signed


def edit(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the signature's document."""
    document = json.loads((bundle / SIGNATURE_NAME).read_bytes())
    change(document)
    (bundle / SIGNATURE_NAME).write_text(json.dumps(document))


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_a_signed_bundle(bundle: Path, tmp_path: Path, curve: ec.EllipticCurve) -> None:
    key = write_key(tmp_path, "key", ec.generate_private_key(curve))
    assert sign(bundle, key) == check(bundle, key)
    assert bundles.verify_bundle(bundle).ok  # without a key as well: the signature is the one file nobody lists


def test_a_key_with_a_passphrase(bundle: Path, tmp_path: Path) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    key = write_key(tmp_path, "key", private, BestAvailableEncryption(b"open sesame"))
    sign(bundle, key, passphrase=b"open sesame")
    check(bundle, key)
    for wrong in (None, b"another"):
        with pytest.raises(UserError, match="passphrase") as error:
            sign(bundle, key, passphrase=wrong, force=True)
        assert error.value.code == "CX720"


def test_a_signature_is_not_replaced_unasked(bundle: Path, key: Path) -> None:
    sign(bundle, key)
    with pytest.raises(UserError, match="has a signature already") as error:
        sign(bundle, key)
    assert error.value.code == "CX724"
    sign(bundle, key, force=True)
    check(bundle, key)


def other_key(bundle: Path, key: Path) -> None:
    write_key(key.parent, "key", ec.generate_private_key(ec.SECP256R1()))


def other_key_same_hint(bundle: Path, key: Path) -> None:
    write_key(key.parent, "key", ec.generate_private_key(ec.SECP256R1()))
    hint = signature._fingerprint(signature._public_key(key.with_suffix(".pub")))
    edit(bundle, lambda document: document["verificationMaterial"]["publicKey"].update(hint=hint))


def edited_payload(bundle: Path, key: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        envelope = document["dsseEnvelope"]
        payload = base64.b64decode(envelope["payload"]).replace(b'"name": "x"', b'"name": "y"')
        envelope["payload"] = base64.b64encode(payload).decode()

    edit(bundle, change)


def another_type(bundle: Path, key: Path) -> None:
    edit(bundle, lambda document: document["dsseEnvelope"].update(payloadType="application/json"))


def no_key_of_ours(bundle: Path, key: Path) -> None:
    edit(bundle, lambda document: document.update(verificationMaterial={"certificate": {"rawBytes": "AA=="}}))


def two_signatures(bundle: Path, key: Path) -> None:
    edit(bundle, lambda document: document["dsseEnvelope"]["signatures"].append({"sig": "AA==", "keyid": ""}))


def no_base64(bundle: Path, key: Path) -> None:
    edit(bundle, lambda document: document["dsseEnvelope"].update(payload="not base64"))


def no_json(bundle: Path, key: Path) -> None:
    (bundle / SIGNATURE_NAME).write_bytes(b"\x00\xff" * 50)


@pytest.mark.parametrize(
    ("cheat", "said"),
    [
        (other_key, "made with the key"),
        (other_key_same_hint, "it was changed"),
        (edited_payload, "it was changed"),
        (another_type, "dsseEnvelope.payloadType"),
        (no_key_of_ours, "has 'certificate' and no publicKey"),
        (two_signatures, "exactly one"),
        (no_base64, "is not base64"),
        (no_json, "not JSON"),
    ],
)
def test_a_signature_that_does_not_hold(
    bundle: Path, key: Path, cheat: Callable[[Path, Path], None], said: str
) -> None:
    sign(bundle, key)
    cheat(bundle, key)
    with pytest.raises(FindingError, match=said) as error:
        check(bundle, key)
    assert error.value.code == "CX722"


def test_swapped_contents_with_fresh_digests(bundle: Path, key: Path) -> None:
    """Whoever can write the files can make a manifest that verifies; only the signature tells."""
    sign(bundle, key)
    first, second = bundle / "engines/generator.plan", bundle / "engines/reasoner.plan"
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    document = json.loads((bundle / "manifest.json").read_bytes())
    records = {record["path"]: record for record in document["files"]}
    one, two = records["engines/generator.plan"], records["engines/reasoner.plan"]
    for name in ("sha256", "size_bytes"):
        one[name], two[name] = two[name], one[name]
    (bundle / "manifest.json").write_bytes(seal(document))
    assert bundles.verify_bundle(bundle).ok
    with pytest.raises(FindingError, match=r"another digest of .engines/generator\.plan. and 2 more") as error:
        check(bundle, key)
    assert error.value.code == "CX723"


def test_a_signature_of_another_bundle(bundle: Path, key: Path, tmp_path: Path) -> None:
    bundle_samples.write(tmp_path / "y", build_seconds=99.0)
    sign(tmp_path / "y", key)
    (bundle / SIGNATURE_NAME).write_bytes((tmp_path / "y" / SIGNATURE_NAME).read_bytes())
    with pytest.raises(FindingError, match=r"another digest of .manifest\.json.") as error:
        check(bundle, key)
    assert error.value.code == "CX723"


@pytest.mark.parametrize("listed", ["fewer", "more"])
def test_a_signature_of_other_files(bundle: Path, key: Path, monkeypatch: pytest.MonkeyPatch, listed: str) -> None:
    """Signed with the right key, but not everything, or more than there is."""
    digests = signature._digests(bundles.open_bundle(bundle))
    changed = {**digests, "more.bin": "0" * 64} if listed == "more" else dict(list(digests.items())[:-1])
    with monkeypatch.context() as patch:
        patch.setattr(signature, "_digests", lambda bundle: changed)
        sign(bundle, key)
    said = "a file that the manifest does not list, 'more.bin'" if listed == "more" else "nothing about"
    with pytest.raises(FindingError, match=said) as error:
        check(bundle, key)
    assert error.value.code == "CX723"


def test_a_changed_file_under_a_good_signature(bundle: Path, key: Path) -> None:
    sign(bundle, key)
    data = bytearray((bundle / "engines/generator.plan").read_bytes())
    data[-1] ^= 1
    (bundle / "engines/generator.plan").write_bytes(data)
    with pytest.raises(FindingError, match=r"engines/generator\.plan") as error:
        check(bundle, key)
    assert error.value.code == "CX711"


def test_no_signature(bundle: Path, key: Path) -> None:
    with pytest.raises(FindingError, match="is not signed") as error:
        check(bundle, key)
    assert error.value.code == "CX721"


@pytest.mark.parametrize("kind", ["link", "hard link", "directory", "fifo", "large"])
def test_something_else_under_the_name_of_the_signature(bundle: Path, key: Path, tmp_path: Path, kind: str) -> None:
    sign(bundle, key)
    path = bundle / SIGNATURE_NAME
    if kind == "hard link":
        os.link(path, tmp_path / "other")
    elif kind == "large":
        os.truncate(path, MAX_SIGNATURE_BYTES + 1)
    else:
        path.rename(tmp_path / "real.sig")
        {
            "link": lambda: path.symlink_to(tmp_path / "real.sig"),
            "directory": path.mkdir,
            "fifo": lambda: os.mkfifo(path),
        }[kind]()
    assert [check.path for check in bundles.verify_bundle(bundle).failures] == [SIGNATURE_NAME]
    with pytest.raises(FindingError) as error:
        check(bundle, key)
    assert error.value.code == "CX711"


def rsa_key(folder: Path) -> Path:
    return write_key(folder, "bad", rsa.generate_private_key(65537, 2048))


def edwards_key(folder: Path) -> Path:
    return write_key(folder, "bad", ed25519.Ed25519PrivateKey.generate())


def other_curve(folder: Path) -> Path:
    return write_key(folder, "bad", ec.generate_private_key(ec.SECP256K1()))


def no_pem(folder: Path) -> Path:
    for name in ("bad.pem", "bad.pub"):
        (folder / name).write_bytes(b"\x30\x82\x00")
    return folder / "bad.pem"


def halves_exchanged(folder: Path) -> Path:
    path = write_key(folder, "bad", ec.generate_private_key(ec.SECP256R1()))
    secret, public = path.read_bytes(), path.with_suffix(".pub").read_bytes()
    path.write_bytes(public)
    path.with_suffix(".pub").write_bytes(secret)
    return path


def not_there(folder: Path) -> Path:
    return folder / "absent.pem"


def a_directory(folder: Path) -> Path:
    (folder / "bad.pem").mkdir()
    (folder / "bad.pub").mkdir()
    return folder / "bad.pem"


@pytest.mark.parametrize("make", [rsa_key, edwards_key, other_curve, no_pem, halves_exchanged, not_there, a_directory])
def test_keys_that_cannot_be_used(bundle: Path, key: Path, tmp_path: Path, make: Callable[[Path], Path]) -> None:
    bad = make(tmp_path)
    with pytest.raises(UserError) as error:
        sign(bundle, bad)
    assert error.value.code == "CX720"
    sign(bundle, key)
    with pytest.raises(UserError) as error:
        check(bundle, bad)
    assert error.value.code == "CX720"


def test_a_killed_signing_leaves_nothing_behind_the_next(bundle: Path, key: Path) -> None:
    (bundle / f".{SIGNATURE_NAME}.partial-1").write_bytes(b"half")
    assert not bundles.verify_bundle(bundle).ok
    sign(bundle, key)
    check(bundle, key)


@pytest.fixture
def app() -> verbs.Verbs:
    app = verbs.Verbs()
    register(app)
    return app


def call(app: verbs.Verbs, *arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        app(arguments)
    return int(ended.value.code or 0)


def test_the_verbs(app: verbs.Verbs, bundle: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    public = str(key.with_suffix(".pub"))
    assert call(app, "bundle", "verify", str(bundle), "--key", public) == 1
    assert call(app, "bundle", "sign", str(bundle), "--key", str(key)) == 0
    assert call(app, "bundle", "verify", str(bundle)) == 0
    assert "its signature is not checked" in capsys.readouterr().err
    assert call(app, "bundle", "verify", str(bundle), "--key", public) == 0
    assert "signed with the key" in capsys.readouterr().err
    assert call(app, "bundle", "verify", str(bundle), "--key", public, "--json") == 0
    hint = json.loads((bundle / SIGNATURE_NAME).read_bytes())["verificationMaterial"]["publicKey"]["hint"]
    assert json.loads(capsys.readouterr().out)["signed_with"] == f"sha256:{hint}"


def test_readers_ask_before_anything_else(bundle: Path, key: Path, tmp_path: Path) -> None:
    """An unsigned bundle and one of another key, which could not run either, end with what the signature says."""
    app = verbs.Verbs()
    run.register(app)
    serve.register(app)
    public = str(key.with_suffix(".pub"))
    calls = [
        ("run", str(bundle), "--prompt", "a", "-o", str(tmp_path / "a.mp4"), "--require-signature", public),
        ("serve", str(bundle), "--no-limits", "--require-signature", public),
    ]
    for arguments in calls:
        assert call(app, *arguments) == 1
    with pytest.raises(FindingError, match="CX721"):
        cosmos_export.open(bundle, require_signature=public)
    sign(bundle, write_key(tmp_path, "other", ec.generate_private_key(ec.SECP256R1())))
    for arguments in calls:
        assert call(app, *arguments) == 1
    with pytest.raises(FindingError, match="CX722"):
        cosmos_export.open(bundle, require_signature=public)


def test_a_damaged_bundle_is_not_signed(app: verbs.Verbs, bundle: Path, key: Path) -> None:
    (bundle / "engines/generator.plan").write_bytes(b"other")
    assert call(app, "bundle", "sign", str(bundle), "--key", str(key)) == 1
    assert not (bundle / SIGNATURE_NAME).exists()


# ---------------------------------------------------------------------------------------------------------------------
# The stock tool


@pytest.fixture(scope="module")
def stock() -> str:
    """The stock tool, in an environment of its own: it brings forty packages."""
    return str(environment("model-signing", *STOCK) / "model_signing")


def run_stock(stock: str, verb: str, bundle: Path, *arguments: str) -> int:
    where = ["--signature", str(bundle / SIGNATURE_NAME)]
    return subprocess.run([stock, verb, "key", *where, *arguments, str(bundle)], capture_output=True).returncode


def test_the_stock_tool_reads_and_writes_the_same(stock: str, bundle: Path, key: Path) -> None:
    public = ("--public_key", str(key.with_suffix(".pub")))
    sign(bundle, key)
    assert run_stock(stock, "verify", bundle, *public) == 0
    (bundle / SIGNATURE_NAME).unlink()
    assert run_stock(stock, "sign", bundle, "--private_key", str(key)) == 0
    check(bundle, key)
    data = bytearray((bundle / "engines/generator.plan").read_bytes())
    data[-1] ^= 1
    (bundle / "engines/generator.plan").write_bytes(data)
    assert run_stock(stock, "verify", bundle, *public) != 0
