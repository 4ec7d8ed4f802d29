"""One recipe of each backbone at true width, held to what `benchmarks/recipes.py` holds every recipe to."""

from __future__ import annotations

import sys
from pathlib import Path

import build_harness as harness
import pytest

sys.path.insert(0, str(harness.ROOT / "benchmarks"))
import recipes

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("builds")]


@pytest.mark.parametrize(("size", "recipe", "layers"), [("edge", "memory", 2), ("nano", "fp8", 1)])
def test_engines_of_true_width_contain_what_the_recipe_says(
    tmp_path: Path, size: str, recipe: str, layers: int
) -> None:
    checkpoint, scales = recipes.prepare(size, layers, tmp_path)
    found = recipes.row(size, checkpoint, scales, "rtx-pro-6000", recipe, tmp_path)
    assert found["problems"] == []
    assert {engine["graph"] for engine in found["engines"]} >= {"reasoner", "generator", "generator_2"}


def test_a_recipe_that_is_not_run_is_refused_and_misses_are_named(tmp_path: Path) -> None:
    engine = {
        "graph": "generator", "gemms": {"bf16": 2, "fp8-weight": 8}, "narrow_share": 0.98, "attention": 2,
        "fused_attention": 1, "attention_types": ["bf16"], "dequantize_kernels": ["cast"],
        "check": {"passed": False, "found": "something else"},
    }  # fmt: skip
    said = list(recipes.problems("fp8-attention", [engine]))
    for words in ("products in fp8-weight, not fp8", "98.0%", "widened by cast", "1 of 2", "in bf16, not fp8", "else"):
        assert any(words in line for line in said), words
