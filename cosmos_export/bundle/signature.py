"""Signatures of bundles: who made one, beside what it is.

The format is OpenSSF Model Signing v1.0: a Sigstore bundle v0.3 with a DSSE envelope around an in-toto statement, which
lists every file of the bundle with its SHA-256 (https://github.com/ossf/model-signing-spec). The signature is made from
the digests that the manifest has, so no file is read again, and the stock `model_signing` tool accepts it; a signature
that the stock tool made is accepted here. Keys are ECDSA on P-256, P-384 or P-521; certificates and keyless signatures
are left to the stock tool.

A signature covers every byte: it names each file of the manifest and the manifest itself, with their digests.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from cosmos_export import files as user_files
from cosmos_export.bundle.files import SIGNATURE_NAME, BundleFiles
from cosmos_export.bundle.manifest import MANIFEST_NAME
from cosmos_export.bundle.staging import remove_partials, replace_file
from cosmos_export.bundle.strict import StrictError, parse_object
from cosmos_export.diagnostics import FindingError, UnsupportedError, UserError, shown

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.hashes import HashAlgorithm

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
PASSPHRASE = "COSMOS_EXPORT_KEY_PASSPHRASE"
"""Environment variable with the passphrase of a private key that has one."""
_MAX_KEY_BYTES = 64 * user_files.KIB
_KINDS: Mapping[type, str] = {dict: "an object", list: "a list", str: "a string"}
_CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
"""Curve → hash of its signatures, as Sigstore pairs them."""


@dataclass(frozen=True)
class Signed:
    """A signature that was verified, or was just made."""

    key: str
    """SHA-256 of the public key, PEM form, in hexadecimal digits: the hint in the signature."""
    bundle_id: str
    """SHA-256 of the manifest that was signed."""


def sign(bundle: BundleFiles, key: Path, passphrase: bytes | None = None, force: bool = False) -> Signed:
    """Sign ``bundle`` with the private key in ``key`` (PEM), as `manifest.sig` in it.

    The digests are those of the manifest: verify the bundle first, or a damaged one is signed as what it should be.
    UserError CX720: the key cannot be used; CX724: there is a signature already. UnsupportedError CX725: the package
    `cryptography` is not installed.
    """
    if bundle.has_signature and not force:
        hint = "pass --force to sign in its place"
        raise UserError("CX724", f"{bundle.path} has a signature already: {SIGNATURE_NAME}", hint)
    private = _private_key(key, passphrase)
    hint = _fingerprint(private.public_key())
    data = _envelope(statement(bundle), hint, lambda payload: _signature(private, payload))
    remove_partials(bundle.path, SIGNATURE_NAME)  # of a command that was killed: the bundle would not verify
    replace_file(bundle.path, SIGNATURE_NAME, data)
    return Signed(hint, bundle.bundle_id)


def require_signature(bundle: BundleFiles, key: Path) -> Signed:
    """The signature of ``bundle``, which the private key that belongs to ``key`` (public, PEM) has made.

    It says what the files should be; whether they are, `verify_files` says. UserError CX720: the key cannot be used.
    FindingError CX721: there is no signature; CX722: it is not one of this key; CX723: it is of another bundle.
    """
    public = _public_key(key)
    data = bundle.read_signature()
    if data is None:
        raise FindingError(
            "CX721",
            f"{bundle.path} is not signed: it has no {SIGNATURE_NAME}",
            "get it from those who sign it, or sign it: `cosmos-export bundle sign DIR --key PRIVATE.pem`",
        )
    try:
        hint, payload, signature = _opened(data)
    except StrictError as error:
        raise _invalid(bundle, str(error)) from error
    _check_signature(bundle, public, payload, signature, hint)
    try:
        signed = _resources(payload)
    except StrictError as error:
        raise _invalid(bundle, f"what is signed is no list of files: {error}") from error
    _require_same(bundle, signed)
    return Signed(_fingerprint(public), bundle.bundle_id)


def statement(bundle: BundleFiles) -> dict[str, Any]:
    """The in-toto statement that is signed: every file of ``bundle`` and its manifest, by digest."""
    resources = [
        {"name": name, "algorithm": "sha256", "digest": digest}
        for name, digest in sorted(_digests(bundle).items(), key=lambda item: PurePosixPath(item[0]))
    ]
    subject = {"name": bundle.path.resolve().name or "bundle", "digest": {"sha256": _root_digest(resources)}}
    ignored = [SIGNATURE_NAME, ".git", ".gitattributes", ".github", ".gitignore"]
    how = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": ignored}
    predicate = {"serialization": how, "resources": resources}
    return {
        "_type": STATEMENT_TYPE, "subject": [subject], "predicateType": PREDICATE_TYPE, "predicate": predicate,
    }  # fmt: skip


def _digests(bundle: BundleFiles) -> dict[str, str]:
    return {MANIFEST_NAME: bundle.bundle_id} | {record.path: record.sha256 for record in bundle.manifest.files}


def _root_digest(resources: list[dict[str, str]]) -> str:
    return hashlib.sha256(b"".join(bytes.fromhex(one["digest"]) for one in resources)).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The document


def _envelope(signed: Mapping[str, Any], hint: str, make: Callable[[bytes], bytes]) -> bytes:
    payload = json.dumps(signed, indent=2).encode()
    document = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(make(_to_be_signed(payload))).decode(), "keyid": ""}],
        },
    }
    return json.dumps(document, indent=1).encode() + b"\n"


def _opened(data: bytes) -> tuple[str | None, bytes, bytes]:
    """Hint of the key, payload and signature of the document ``data``."""
    document = parse_object(data)
    if document.get("mediaType") != MEDIA_TYPE:
        raise StrictError("mediaType", f"{shown(document.get('mediaType'))} is not {MEDIA_TYPE}")
    material = _member(document, "", "verificationMaterial", dict)
    if "publicKey" not in material:
        kinds = ", ".join(shown(name) for name in material if name != "tlogEntries") or "nothing"
        raise StrictError("verificationMaterial", f"has {kinds} and no publicKey; `model_signing verify` knows others")
    key = _member(material, "verificationMaterial", "publicKey", dict)
    hint = key.get("hint")
    envelope = _member(document, "", "dsseEnvelope", dict)
    if envelope.get("payloadType") != PAYLOAD_TYPE:
        raise StrictError("dsseEnvelope.payloadType", f"{shown(envelope.get('payloadType'))} is not {PAYLOAD_TYPE}")
    signatures = _member(envelope, "dsseEnvelope", "signatures", list)
    if len(signatures) != 1 or not isinstance(signatures[0], dict):
        raise StrictError("dsseEnvelope.signatures", f"{len(signatures)} signatures; exactly one is read")
    payload = _base64(_member(envelope, "dsseEnvelope", "payload", str), "dsseEnvelope.payload")
    where = "dsseEnvelope.signatures[0]"
    signature = _base64(_member(signatures[0], where, "sig", str), f"{where}.sig")
    return hint if isinstance(hint, str) else None, payload, signature


def _resources(payload: bytes) -> dict[str, str]:
    """Name → SHA-256 of the files that the statement ``payload`` lists."""
    document = parse_object(payload)
    for name, allowed in (("_type", STATEMENT_TYPE), ("predicateType", PREDICATE_TYPE)):
        if document.get(name) != allowed:
            raise StrictError(name, f"{shown(document.get(name))} is not {allowed}")
    predicate = _member(document, "", "predicate", dict)
    how = _member(predicate, "predicate", "serialization", dict)
    if how.get("method") != "files" or how.get("hash_type") != "sha256":
        where, kind = "predicate.serialization", f"{how.get('method')} by {how.get('hash_type')}"
        raise StrictError(
            where, f"{shown(kind)}: only whole files by sha256 are read; sign without `--hash` and shards"
        )
    found: dict[str, str] = {}
    listed = _member(predicate, "predicate", "resources", list)
    for i, resource in enumerate(listed):
        where = f"predicate.resources[{i}]"
        if not isinstance(resource, dict):
            raise StrictError(where, "is not an object")
        name, digest = (_member(resource, where, key, str) for key in ("name", "digest"))
        if name in found or resource.get("algorithm") != "sha256" or not _is_digest(digest):
            raise StrictError(where, f"{shown(name)} is listed twice or has no SHA-256")
        found[name] = digest
    subjects = _member(document, "", "subject", list)
    digests = [one.get("digest") for one in subjects if isinstance(one, dict)]
    if digests != [{"sha256": _root_digest(listed)}]:
        raise StrictError("subject", "its digest is not that of the files that are listed")
    return found


def _is_digest(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _member(value: Mapping[str, Any], where: str, name: str, kind: type) -> Any:
    found = value.get(name)
    if not isinstance(found, kind):
        raise StrictError(f"{where}.{name}".lstrip("."), f"is not {_KINDS[kind]}")
    return found


def _base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise StrictError(where, "is not base64") from error


def _to_be_signed(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: a payload signed for one type is not taken for another one."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


# ---------------------------------------------------------------------------------------------------------------------
# Findings


def _invalid(bundle: BundleFiles, what: str) -> FindingError:
    return FindingError(
        "CX722", f"the signature of {bundle.path} does not hold: {what}", "do not use the bundle; ask those who sign it"
    )


def _require_same(bundle: BundleFiles, signed: Mapping[str, str]) -> None:
    """CX723 where ``signed`` is not exactly the files of ``bundle``."""
    listed = _digests(bundle)
    wrong = {name for name in listed.keys() & signed.keys() if listed[name] != signed[name]}
    said = [
        f"{what} {shown(min(names))}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for what, names in (
            ("another digest of", wrong),
            ("nothing about", listed.keys() - signed.keys()),
            ("a file that the manifest does not list,", signed.keys() - listed.keys()),
        )
        if names
    ]
    if said:
        raise FindingError(
            "CX723",
            f"the signature is not of {bundle.path} as it is: it has {'; '.join(said)}",
            "a bundle that was finished on a device or changed is signed again: `cosmos-export bundle sign`",
        )


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def _check_signature(
    bundle: BundleFiles, public: EllipticCurvePublicKey, payload: bytes, signature: bytes, hint: str | None
) -> None:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        public.verify(signature, _to_be_signed(payload), ec.ECDSA(_hash(public)))
    except InvalidSignature as error:
        other = hint is not None and hint != _fingerprint(public)
        what = f"it was made with the key {shown(hint)}, not {_fingerprint(public)}" if other else "it was changed"
        raise _invalid(bundle, what) from error


def _signature(private: EllipticCurvePrivateKey, payload: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric import ec

    return private.sign(payload, ec.ECDSA(_hash(private.public_key())))


def _hash(public: EllipticCurvePublicKey) -> HashAlgorithm:
    from cryptography.hazmat.primitives import hashes

    found: HashAlgorithm = getattr(hashes, _CURVES[public.curve.name])()
    return found


def _fingerprint(public: EllipticCurvePublicKey) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _private_key(path: Path, passphrase: bytes | None) -> EllipticCurvePrivateKey:
    data = _key_bytes(path, "private")

    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(data, passphrase)
    except TypeError as error:  # what the library raises where a passphrase is missing, or is one too many
        what = "has a passphrase" if passphrase is None else "has no passphrase, and one is given"
        raise UserError("CX720", f"the key {path} {what}", f"put it into ${PASSPHRASE}, or unset that") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _unusable(path, "a private key", data) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise _unusable(path, "a private key", data)
    return key


def _public_key(path: Path) -> EllipticCurvePublicKey:
    data = _key_bytes(path, "public")

    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _unusable(path, "a public key", data) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise _unusable(path, "a public key", data)
    return key


def _key_bytes(path: Path, kind: str) -> bytes:
    from importlib.util import find_spec

    if find_spec("cryptography") is None:
        hint = "pip install '.[sign]' in the checkout"
        raise UnsupportedError("CX725", "signatures need the package cryptography, which is not installed", hint)
    try:
        return user_files.read_bytes(path, _MAX_KEY_BYTES)
    except (OSError, ValueError) as error:
        said = user_files.reason(error) if isinstance(error, OSError) else str(error)
        raise UserError("CX720", f"the {kind} key {path} cannot be read: {said}", "name a PEM file") from error


def _unusable(path: Path, wanted: str, data: bytes) -> UserError:
    """CX720, with what ``data`` is instead, where that can be told."""
    first = data[:80].decode("ascii", "replace").splitlines()[:1]
    found = shown(first[0].strip("- ")) if first and first[0].startswith("-----BEGIN ") else "no PEM file"
    return UserError(
        "CX720",
        f"{path} is not {wanted} on P-256, P-384 or P-521 (or has another passphrase): it is {found}",
        "make one: `openssl ecparam -name prime256v1 -genkey -noout -out private.pem`, and its public half: "
        "`openssl ec -in private.pem -pubout -out public.pem`",
    )
