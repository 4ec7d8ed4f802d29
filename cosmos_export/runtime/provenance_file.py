"""The provenance in a bundle against its manifest: the files it speaks of, who built them, and what was asked for."""

from __future__ import annotations

from collections.abc import Iterator

from cosmos_export.bundle import BundleFiles
from cosmos_export.bundle.provenance import BOM_FILE, ENGINES_FILE, PROVENANCE_FILE, builder_of
from cosmos_export.bundle.strict import StrictError, encode, parse_object
from cosmos_export.bundle.writer import DESCRIPTION_ROLE
from cosmos_export.diagnostics import FindingError

_DOCUMENTS = (PROVENANCE_FILE, BOM_FILE, ENGINES_FILE)


def provenance_problems(files: BundleFiles) -> Iterator[tuple[str, str]]:
    """Name of each document that is not of this bundle, and why."""
    manifest = files.manifest
    for record in manifest.files:
        if (record.path in _DOCUMENTS) != (record.role == DESCRIPTION_ROLE):
            yield record.path, f"has the role {record.role!r}"
            return
    digests = {file.path: file.sha256 for file in manifest.files if file.path not in _DOCUMENTS}
    engines = {file.path for file in manifest.files if file.role == "engine"}
    later = ENGINES_FILE in {file.path for file in manifest.files}
    first = {name: digest for name, digest in digests.items() if not (later and name in engines)}
    parameters = {"recipe": manifest.recipe, "options": encode(manifest.options)}
    yield from _problems(files, PROVENANCE_FILE, first, parameters)
    if later:
        yield from _problems(files, ENGINES_FILE, {name: digests[name] for name in engines}, None)


def _problems(
    files: BundleFiles, name: str, digests: dict[str, str], parameters: dict[str, object] | None
) -> Iterator[tuple[str, str]]:
    if name not in {file.path for file in files.manifest.files}:
        return
    try:
        document = parse_object(files.read(name, DESCRIPTION_ROLE))
        subject = {one["name"]: one["digest"]["sha256"] for one in document["subject"]}
        definition = document["predicate"]["buildDefinition"]["externalParameters"]
        builder = document["predicate"]["runDetails"]["builder"]["id"]
    except FindingError as error:
        yield name, error.message
    except (StrictError, KeyError, TypeError) as error:
        yield name, f"it is no provenance: {type(error).__name__}"
    else:
        if subject != digests:
            yield name, "it is of other files than the manifest lists"
        elif parameters is not None and {key: definition.get(key) for key in parameters} != parameters:
            yield name, "it is of a build with another recipe or other options than the manifest says"
        elif parameters is not None and builder != builder_of(files.manifest):
            yield name, "it names another builder than the manifest"
