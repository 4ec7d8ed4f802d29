"""The graphs of a published geometry as documents, for a machine that has a GPU and torch but not diffusers.

    python benchmarks/geometry.py -o build/geometry [--sizes nano] [--tiny]

Two folders per size: ``SIZE-vision`` (guided and plain steps) and ``SIZE-action`` (guided steps of a policy). A few
megabytes, and no weight in them: `bench --geometry SIZE --graphs FOLDER` fills in random ones.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cosmos_export.bench.geometry import capture_graphs, modalities_of, write_graphs
from cosmos_export.bench.measure import GeometryRequest, geometry_schedule
from cosmos_export.plan import published_subject

WORKLOADS = {"vision": "t2i-720p", "action": "policy-droid"}
"""Workloads that a folder is captured for: images have a guidance interval, so both kinds of steps; shapes are
symbolic."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="nano")
    parser.add_argument("--kinds", default=",".join(WORKLOADS))
    parser.add_argument("--tiny", action="store_true", help="small widths, for dry runs")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    for size in arguments.sizes.split(","):
        geometry = published_subject(size).geometry
        for kind in arguments.kinds.split(","):
            workload, schedule = geometry_schedule(GeometryRequest(size, WORKLOADS[kind]))
            modalities = modalities_of(workload, geometry)
            graphs = capture_graphs(geometry, modalities, schedule, tiny=arguments.tiny)
            for path in write_graphs(graphs, arguments.output / f"{size}-{kind}"):
                print(f"{path}: {path.stat().st_size / 1e6:.2f} MB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
