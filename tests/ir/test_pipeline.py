"""The passes together: what falls out, that names and layer counts play no part, that a second run changes nothing."""

from __future__ import annotations

import ast
import inspect
import os
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sketch import ops
from tiny_cosmos import BACKBONES, Case, assert_close, request, stock_forward

import cosmos_export.passes.pipeline
from cosmos_export.diagnostics import InternalError, UserError
from cosmos_export.ir.graph import Node, is_constant, is_input, is_weight
from cosmos_export.ir.interpreter import run_program
from cosmos_export.ir.ops import aten
from cosmos_export.ir.program import Program
from cosmos_export.ir.text import print_program
from cosmos_export.passes.base import CannotApply, Pass, PassResult
from cosmos_export.passes.options import PassOptions
from cosmos_export.passes.pipeline import CAPTURE, ORDER, PHASES, default_passes, in_order, passes_of, run_passes
from cosmos_export.passes.split_towers import memory_bytes_per_token

GOLDEN = Path(__file__).parent / "golden"


# -- every pass -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", default_passes(), ids=lambda p: p.name)
def test_a_second_run_changes_nothing(compiled: Any, step: Any) -> None:
    program = compiled.stages[step.name].copy()
    before = print_program(program)
    assert not step.run(program).modified
    assert print_program(program) == before


# All but `resolve_packing`: of the rows of positions that `shift_rope` takes apart it would move slices further up.
@pytest.mark.parametrize("step", [p for p in default_passes() if p.name != "resolve_packing"], ids=lambda p: p.name)
def test_no_pass_finds_work_in_the_final_program(compiled: Any, step: Any) -> None:
    program = compiled.final.copy()
    before = print_program(program)
    assert not step.run(program).modified
    assert print_program(program) == before


def test_nothing_is_declined_in_the_published_model(compiled: Any) -> None:
    """A fusion that is expected of this model and does not happen would show here."""
    declined = {name: r.result.declined for name, r in compiled.reports.items() if r.result.declined}
    assert declined == {}


@pytest.mark.parametrize("kind", [kind for phase in PHASES for kind in phase.passes], ids=lambda kind: kind.name)
def test_every_pass_says_what_it_does_when_not_and_what_it_costs(kind: Any) -> None:
    text = inspect.getdoc(kind) or ""
    assert "Numerical effect:" in text
    assert kind.name.replace("_", "") == kind.__name__.lower()


def test_the_list_of_passes_in_the_docs_is_that_of_the_code() -> None:
    """To accept a change: UPDATE_DOCS=1 pytest tests/ir/test_pipeline.py -k docs."""
    page = Path(cosmos_export.passes.pipeline.__file__).parents[1] / "docs/passes.md"
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(" -->\n")
    _, end, tail = rest.partition("<!-- end of passes -->")
    rows = "\n".join(
        f"**{phase.name}**: {phase.purpose}.\n\n| pass | law | numerical effect |\n|---|---|---|\n"
        + "".join(f"| `{kind.name}` | {kind.law} | {numerical_effect(kind)} |\n" for kind in phase.passes)
        for phase in PHASES
    )
    wanted = f"{head} -->\n\n{rows}\n{end}{tail}"
    if os.environ.get("UPDATE_DOCS"):
        page.write_text(wanted, encoding="utf-8")
    assert page.read_text(encoding="utf-8") == wanted


def numerical_effect(kind: type[Pass]) -> str:
    """The sentence of the docstring, which may have several lines."""
    text = " ".join((inspect.getdoc(kind) or "").split())
    return text.partition("Numerical effect: ")[2].partition(". ")[0].removesuffix(".")


def test_passes_run_in_order_and_leave_their_name(compiled: Any) -> None:
    names = [CAPTURE, *(one.name for one in default_passes())]
    assert compiled.final.history == names == list(compiled.stages) == list(ORDER[: len(names)])
    assert all(report.seconds >= 0 for report in compiled.reports.values())


def test_stopping_early(compiled: Any) -> None:
    program = compiled.captured
    assert run_passes(program, default_passes(), until="capture") == []
    reports = run_passes(program, default_passes(), until="shift_rope")
    assert [r.name for r in reports] == ["normalize", "resolve_packing", "shift_rope"]
    assert structure(program) == structure(compiled.stages["shift_rope"])


def test_an_unknown_pass_is_named_with_those_there_are(compiled: Any) -> None:
    with pytest.raises(UserError) as refused:
        run_passes(compiled.captured, default_passes(), until="lower")
    listed = ", ".join(ORDER)
    assert str(refused.value) == f"CX222: there is no pass `lower` (hint: passes, in order: {listed})"


class Demanding(Pass):
    """Needs, and promises, what the test says."""

    name = "demanding"

    def __init__(self, seen: list[str], *, requires: bool = True, ensures: bool = True) -> None:
        self._seen, self._requires, self._ensures = seen, requires, ensures

    def requires(self, program: Program) -> None:
        self._seen.append("requires")
        if not self._requires:
            raise CannotApply(self.name, program.graphs[program.loop.body].calls()[0], "is not what it needs")

    def run(self, program: Program) -> PassResult:
        self._seen.append("run")
        return PassResult()

    def ensures(self, program: Program) -> None:
        self._seen.append("ensures")
        if not self._ensures:
            raise InternalError("CX201", "it broke its promise")


def test_conditions_are_checked_by_the_frame(compiled: Any) -> None:
    seen: list[str] = []
    run_passes(compiled.final.copy(), [Demanding(seen)])
    assert seen == ["requires", "run", "ensures"]
    seen.clear()
    with pytest.raises(UserError, match=r"CX220: demanding: .* is not what it needs"):
        run_passes(compiled.final.copy(), [Demanding(seen, requires=False)])
    assert seen == ["requires"]
    with pytest.raises(InternalError, match="it broke its promise"):
        run_passes(compiled.final.copy(), [Demanding(seen, ensures=False)])


def test_nothing_else_runs_a_pass() -> None:
    """Passes are made by `pipeline` and run by `run_passes`, in the product and in its benchmarks."""
    kinds = {kind.__name__ for phase in PHASES for kind in phase.passes}
    root = Path(cosmos_export.passes.pipeline.__file__).parents[1]
    folders = ("cosmos_export", "passes", "targets", "calibration", "kernels", "benchmarks")
    files = [file for folder in folders for file in (root / folder).rglob("*.py")]
    assert len(files) > 200
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        made = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)} & kinds
        assert not made or file.name == "pipeline.py", f"{file} makes {', '.join(sorted(made))}"


def passes_named(**neighbours: dict[str, tuple[str, ...]]) -> list[type[Pass]]:
    return [type(name, (Demanding,), {"name": name, **given}) for name, given in neighbours.items()]


def test_a_pass_is_placed_by_what_it_says_of_its_neighbours() -> None:
    """Between two that follow each other it names both: the order is never that of files or of names."""
    given = passes_named(
        first={}, third={"after": ("first",)}, second={"after": ("first",), "before": ("third",)},
        fourth={"after": ("third",)},
    )  # fmt: skip
    for kinds in (given, given[::-1]):
        assert [kind.name for kind in in_order(kinds)] == ["first", "second", "third", "fourth"]


@pytest.mark.parametrize(
    ("neighbours", "said"),
    [
        ({"a": {}, "b": {}}, "`after` and `before` leave a and b in any order"),
        ({"a": {}, "b": {"after": ("a",)}, "c": {"after": ("a",)}}, "leave b and c in any order"),
        ({"a": {"after": ("b",)}, "b": {"after": ("a",)}}, "leave a circle of a, b"),
        ({"a": {}, "b": {"before": ("c",)}}, "there is no pass c in this phase"),
        ({"a": {"after": ("z",)}}, "there is no pass z in this phase"),
    ],
)
def test_passes_that_leave_several_orders_are_refused(neighbours: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        in_order(passes_named(**neighbours))


def test_what_has_nothing_to_do_does_not_run() -> None:
    assert [one.name for one in passes_of(PassOptions())] == [one.name for one in default_passes()]
    assert passes_of(PassOptions(), "sites", "loop", "numbers", "cut") == []
    with pytest.raises(ValueError, match="there is no phase lower"):
        passes_of(PassOptions(), "lower")


def test_what_a_pass_must_remove_is_illegal_after_it(compiled: Any) -> None:
    """A norm that is not recognised stops the compilation and is named; it does not reach an engine as primitives."""
    program = compiled.captured
    graph = program.graphs["joint"]
    power = graph.calls(aten.pow.Tensor_Scalar)[0]
    power.args = (power.args[0], 3)
    with pytest.raises(UserError, match=r"normalize: `\w+` of module `.*`: `aten.\w+.* is not known in this place"):
        run_passes(program, default_passes())


# -- what falls out ---------------------------------------------------------------------------------------------------


def modules(program: Program, graph: str, *kinds: Any) -> list[str]:
    return [n.meta["module"] for n in program.graphs[graph].calls(*kinds)]


def keys(program: Program, graph: str) -> set[str]:
    return {key for n in program.graphs[graph].weights.values() for key in n.meta["weight"].keys}


def test_the_last_reasoner_layer_has_keys_and_values_only(compiled: Any) -> None:
    """Neither query, nor norm of it, attention, output, nor MLP."""
    last = f"layers.{compiled.config['num_hidden_layers'] - 1}."
    mine = {k.removeprefix(last) for k in keys(compiled.final, "reasoner") if k.startswith(last)}
    extra = "k_norm_und_for_gen" if compiled.config["use_und_k_norm_for_gen"] else "norm_k"
    assert mine == {f"self_attn.{n}.weight" for n in ("to_k", "to_v", extra)} | {"input_layernorm.weight"}
    assert modules(compiled.final, "reasoner", ops.ATTENTION) == ["layers.0.self_attn"]


def test_what_the_prompt_alone_would_need_is_unread_and_says_why(compiled: Any) -> None:
    unused = compiled.final.unused_keys
    assert unused["lm_head.weight"] == "the denoising step does not read it"
    assert unused["norm.weight"] == "no output follows from it (resolve_packing)"
    last = f"layers.{compiled.config['num_hidden_layers'] - 1}."
    assert unused[f"{last}mlp.down_proj.weight"] == "no output follows from it (resolve_packing)"
    assert not set(unused) & compiled.final.bound_keys()


def test_every_parameter_is_read_or_accounted_for(compiled: Any) -> None:
    names = {name for name, _ in compiled.model.named_parameters()}
    for stage, program in compiled.stages.items():
        assert program.bound_keys() | set(program.unused_keys) == names, stage


def test_the_generator_knows_no_token(compiled: Any) -> None:
    program = compiled.final
    assert "input_ids" not in program.graphs["generator"].inputs
    assert "timestep" not in program.graphs["generator"].inputs
    assert list(program.graphs["reasoner"].inputs) == ["input_ids"]
    assert list(program.graphs["schedule"].inputs) == ["timestep"]
    assert not any("int64" in str(n.meta["spec"]) for n in program.graphs["generator"].inputs.values())
    assert not {k.split(".")[0] for k in keys(program, "generator")} & {"embed_tokens", "time_embedder"}


def test_the_towers_share_no_weight(compiled: Any) -> None:
    assert not keys(compiled.final, "reasoner") & keys(compiled.final, "generator")


def test_all_values_that_enter_the_loop_come_from_the_graphs_before_it(compiled: Any) -> None:
    program = compiled.final
    carried = {name for name, rate in program.rates.items() if rate.name == "CARRIED"}
    free = set(program.free_inputs("generator"))
    assert carried <= free
    assert all(name.endswith("_mask") for name in free - carried)


GEOMETRIES = [
    ("omni", {"layers": 1}),
    ("omni", {}),
    ("omni", {"layers": 4, "heads": 8, "kv_heads": 1, "head_dim": 16}),
    ("edge", {"layers": 1}),
    ("edge", {}),
    ("edge", {"layers": 4, "heads": 3, "kv_heads": 3, "head_dim": 24}),
]


@pytest.mark.parametrize(("backbone", "changes"), GEOMETRIES, ids=lambda v: str(v))
def test_counts_come_from_the_graph(compile_tiny: Any, backbone: str, changes: dict[str, int]) -> None:
    """One key and one value a layer, for any number of layers, any grouping of heads and any head size."""
    compiled = compile_tiny(backbone, **changes)
    config, program = compiled.config, compiled.final
    layers = config["num_hidden_layers"]
    memory = [f"{kind}_{i}" for i in range(layers) for kind in ("key", "value")]
    assert list(program.graphs["reasoner"].outputs) == memory
    for node in program.graphs["reasoner"].outputs.values():
        assert node.meta["spec"].shape[1:] == (config["num_key_value_heads"], config["head_dim"])
    assert memory_bytes_per_token(program) == 2 * layers * config["num_key_value_heads"] * config["head_dim"] * 4
    assert len(program.graphs["generator"].calls(ops.JOINT_ATTENTION)) == layers
    assert len(program.graphs["reasoner"].calls(ops.ATTENTION)) == layers - 1
    inputs = request(config, Case("policy", 5, 5, 6, 33, clean=(0,), actions=6))
    assert_close(run_program(program, inputs, compiled.weights), stock_forward(compiled.model, inputs), 1e-5)


# -- names play no part -----------------------------------------------------------------------------------------------


def structure(program: Program) -> list[Any]:
    """The program without a name: operations and edges by position."""
    order = list(program.graphs)
    found: list[Any] = []
    for graph in program.graphs.values():
        index: dict[Node, int] = {}
        lines = []
        for node in graph.nodes:
            index[node] = len(index)

            def plain(value: Any, at: dict[Node, int] = index) -> Any:
                if isinstance(value, Node):
                    return f"%{at[value]}"
                return [plain(v, at) for v in value] if isinstance(value, (list, tuple)) else str(value)

            kind: Any = str(node.target), plain(node.args), plain(list(node.kwargs.values()))
            if is_weight(node):
                binding = node.meta["weight"]
                kind = "weight", binding.transform, [s.shape for s in binding.sources]
            elif is_input(node) or is_constant(node):
                kind = "input" if is_input(node) else "constant"
            lines.append((kind, str(node.meta["spec"])))
        found.append((lines, [index[n] for n in graph.outputs.values()]))
    edges = [
        (
            order.index(e.source),
            list(program.graphs[e.source].outputs).index(e.output),
            order.index(e.target),
            list(program.graphs[e.target].inputs).index(e.input),
        )
        for e in program.edges
    ]
    return [found, edges]


def with_other_names(program: Program) -> Program:
    """Every weight, key, operation and module under a random name; nothing else changed."""
    dice = random.Random(7)
    taken: set[str] = set()

    def name() -> str:
        while True:
            candidate = "".join(dice.choices("bcdfghjklm", k=12))
            if candidate not in taken:
                taken.add(candidate)
                return candidate

    program = program.copy()
    paths: dict[str, str] = {"": ""}
    for graph in program.graphs.values():
        for node in graph.nodes:
            if not is_input(node):
                node.name = name()
            node.meta["module"] = paths.setdefault(node.meta["module"], name())
            if is_weight(node):
                binding = node.meta["weight"]
                sources = tuple(replace(s, key=name(), file=Path(name())) for s in binding.sources)
                node.meta["weight"] = replace(binding, sources=sources)
    return program


def test_no_name_decides(compiled: Any) -> None:
    original, renamed = compiled.captured, with_other_names(compiled.captured)
    assert not original.bound_keys() & renamed.bound_keys()
    assert structure(original) == structure(renamed)
    expected = run_passes(original, default_passes())
    found = run_passes(renamed, default_passes())
    assert [r.result.changes for r in found] == [r.result.changes for r in expected]
    assert structure(renamed) == structure(original)


def strings(source: str) -> Iterator[str]:
    """String constants of a module, without its docstrings."""
    tree = ast.parse(source)
    documentation = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value


def test_no_pass_holds_a_checkpoint_key(compile_tiny: Any) -> None:
    """Parts of parameter names that are not also words of the domain; layer counts likewise appear nowhere."""
    names = {part for b in BACKBONES for n, _ in compile_tiny(b).model.named_parameters() for part in n.split(".")}
    # `mlp.down` and the like are places of a recipe, which says them to the user.
    words = {"weight", "bias", "norm", "fc", "mlp"} | {n for n in names if n.isdigit()}
    folder = Path(cosmos_export.passes.pipeline.__file__).parent
    files = sorted(folder.glob("*.py"))
    assert len(files) >= 12
    for file in files:
        for text in strings(file.read_text()):
            found = {part for part in names - words if part in text.replace(".", " ").split() or f"{part}." in text}
            assert not found, f"{file.name} holds {text!r}, which has {sorted(found)}"


# -- the text of it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_final_program_is_the_golden_one(compile_tiny: Any, backbone: str) -> None:
    """Every operation of a compiled tiny model. To accept a change: UPDATE_GOLDEN=1 pytest tests/ir -k golden."""
    # Digests of computed constants follow the processor's last bit.
    text = re.sub(r"sha256:\w+", "sha256", print_program(compile_tiny(backbone).final))
    path = GOLDEN / f"tiny_{backbone}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text


def test_the_text_is_deterministic(omni: Any) -> None:
    once, again = (omni.captured for _ in range(2))
    run_passes(once, default_passes())
    run_passes(again, default_passes())
    assert print_program(once) == print_program(again) == print_program(once.copy())
