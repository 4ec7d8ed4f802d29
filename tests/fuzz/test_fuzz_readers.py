"""A few cases of every reader."""

from __future__ import annotations

from pathlib import Path

import fuzz_campaign
from fuzz_readers import BY_NAME, READERS

CASES, FLIPS = 4, 40


def test_no_reader_breaks(tmp_path: Path) -> None:
    """Always the same ones; `python tests/fuzz` runs any number."""
    readers = [one for one in READERS if not one.slow]
    fuzz_campaign.make_seeds(tmp_path, readers)
    rows = fuzz_campaign.campaign(tmp_path, readers, CASES, seed=0)
    flipped = fuzz_campaign.flips(tmp_path, BY_NAME["verify"], "x.bundle/manifest.json", FLIPS, seed=0)
    found = [fuzz_campaign.describe(finding) for row in rows for finding in row.findings]
    assert not found, "\n".join(found)
    assert flipped.kinds == {"refused": FLIPS}
    assert all(row.tried for row in rows)
    # The worker requires that each reader accepts its files as they are; some changes leave them good as well.
    assert sum(row.kinds["accepted"] for row in rows) > len(rows) // 2
