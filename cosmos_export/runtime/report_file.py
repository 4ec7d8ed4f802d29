"""The report of a quantization against the manifest's record of it."""

from __future__ import annotations

from collections.abc import Iterator

from cosmos_export.bundle import BundleFiles
from cosmos_export.checkpoint.strict_json import parse_object
from cosmos_export.diagnostics import FindingError, shown


def report_problems(files: BundleFiles) -> Iterator[tuple[str, str]]:
    """The report's name and what the manifest says otherwise: the recipe, its changes, and the limit of gate G2."""
    record = files.manifest.precision
    if record is None:
        return
    try:
        document = parse_object(files.read(record.report, "report"))
        limit = document["limits"]["steps"]["median"]
        said = {"recipe": document["recipe"], "overrides": document["overrides"]}
    except FindingError as error:
        yield record.report, error.message
        return
    except (ValueError, KeyError, TypeError) as error:
        yield record.report, f"it is no report of a quantization: {shown(str(error))}"
        return
    for name, wanted in (("recipe", record.recipe), ("overrides", list(record.overrides))):
        if said[name] != wanted:
            yield record.report, f"its {name}: {shown(said[name])}; the manifest says {shown(wanted)}"
    for verdict in files.manifest.evaluation:
        if verdict.stage == "G2" and verdict.threshold != limit:
            yield record.report, f"its limit of gate G2 is {shown(limit)}; the manifest says {verdict.threshold}"
