"""Runs in an environment with CycloneDX's and in-toto's own packages: are the documents of a bundle valid?"""

import sys
from pathlib import Path

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as Message

for path in map(Path, sys.argv[1:]):
    text = path.read_text("utf-8")
    if path.name.endswith(".cdx.json"):
        error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
        if error is not None:
            raise SystemExit(f"{path}: {error}")
    else:
        message = json_format.Parse(text, Message())  # refuses a field that it does not know
        Statement.copy_from_pb(message).validate()
        predicate = json_format.Parse(json_format.MessageToJson(message.predicate), Provenance())
        if not (predicate.build_definition.build_type and predicate.run_details.builder.id):
            raise SystemExit(f"{path}: no build type or no builder")
    print(path.name, "valid")
