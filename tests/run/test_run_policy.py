"""A policy as it is published and used: the tensors of what the robot sees and of where it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import droid_observation as droid
import numpy as np
import pytest
import run_samples
from run_samples import MARK, UNIPC, manifest

from cosmos_export import cli
from cosmos_export.bundle import BundleFiles, DimRecord
from cosmos_export.bundle.embodiment import ColumnGroup, Embodiment
from cosmos_export.cli.options import named_files
from cosmos_export.diagnostics import CosmosExportError, UserError
from cosmos_export.embodiments import EMBODIMENTS, policy_embodiment
from cosmos_export.in_memory import InMemory
from cosmos_export.options import GenerateOptions
from cosmos_export.runtime import media
from cosmos_export.runtime.conversion import Conversion, read_state
from cosmos_export.runtime.embodiments import ActionScale
from cosmos_export.runtime.frontend import Prepared, prepare
from cosmos_export.runtime.step_inputs import request_inputs, sizes
from cosmos_export.sampling import CheckpointSampling

DROID = policy_embodiment("droid_lerobot")
NAMES = ("wrist", "left", "right")
PROFILE = {
    "droid": {
        "und_len": DimRecord(1, 132, 4096),
        "frames": DimRecord(9, 9, 9),
        "height": DimRecord(33, 33, 33),
        "width": DimRecord(40, 40, 40),
        "sound_len": DimRecord(0, 0, 0),
        "action_len": DimRecord(32, 33, 33),
    }
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle directory with its tokenizer, and a robot's files beside it."""
    root = run_samples.tokenizer(tmp_path_factory.mktemp("droid"))
    for seed, name in enumerate(NAMES):
        media.write_png(root / f"{name}.png", droid.frame(seed), MARK)
    state = {"joint_position": droid.JOINTS, "gripper_position": [droid.GRIPPER]}
    (root / "state.json").write_text(json.dumps(state))
    return root


def policy_manifest(policy: Embodiment = DROID) -> Any:
    return manifest(PROFILE, sampling=CheckpointSampling(UNIPC, policy=policy.name), policy=policy, mode="policy")


def ask(files: Path, policy: Embodiment = DROID, **options: Any) -> Prepared:
    asked = GenerateOptions(**{"prompt": droid.TASK, "image": cameras(files), "state": files / "state.json", **options})
    return prepare(asked, BundleFiles(files, policy_manifest(policy)))


def cameras(files: Path) -> dict[str, Any]:
    return {name: files / f"{name}.png" for name in NAMES}


def refused(code: str, files: Path, policy: Embodiment = DROID, **options: Any) -> CosmosExportError:
    with pytest.raises(UserError) as caught:
        ask(files, policy, **options)
    assert caught.value.code == code, caught.value
    return caught.value


def agree(prepared: Prepared, files: Path) -> None:
    """The tensors of `droid_observation`, to the bit."""
    request, record = prepared.request, policy_manifest().request
    levels = droid.canvas(*(droid.frame(seed) for seed in range(3)))
    wanted = levels.transpose(2, 0, 1)[None, :, None].astype(np.float32) / np.float32(127.5) - np.float32(1)
    np.testing.assert_array_equal(request.pixels, wanted)
    assert (request.height, request.width, request.frames, request.fps) == (33, 40, 33, 15.0)
    assert request.clean_frames == (0,)
    part = request.action
    assert part is not None
    assert (part.rows, part.domain, part.raw_dim, part.first_position) == (droid.ROWS, droid.DOMAIN, droid.WIDTH, 0)
    assert part.given is not None and part.given.dtype == np.float32
    np.testing.assert_array_equal(part.given, droid.STATE_ROW[None])
    shapes = sizes(request, record)
    inputs = request_inputs(request, record, shapes)
    assert shapes.vision[2:] == (droid.LATENT_FRAMES, droid.LATENT_ROWS, droid.LATENT_COLUMNS)
    np.testing.assert_array_equal(inputs["action_mask"], droid.MASK)
    np.testing.assert_allclose(inputs["action_positions"], droid.POSITIONS, rtol=1e-7)
    assert inputs["action_columns"].tolist() == [1.0] * 8 + [0.0] * 56
    text = run_samples.text_of(request.input_ids)
    assert droid.CAPTION in text


def test_a_recorded_observation_gives_the_published_tensors(files: Path) -> None:
    prepared = ask(files)
    agree(prepared, files)
    assert not prepared.notes
    assert (prepared.request.schedule.steps, prepared.request.schedule.guidance) == (4, 3.0)


def test_the_same_in_memory_and_by_the_names_of_data_sets(files: Path) -> None:
    pictures = {name: InMemory(droid.frame(seed)[None], name) for seed, name in enumerate(DROID.views.cameras)}
    for state in ([*droid.JOINTS, droid.GRIPPER], np.array([[9.0] * 8, [*droid.JOINTS, droid.GRIPPER]])):
        agree(ask(files, image=pictures, state=InMemory(state, "the state")), files)


def test_a_composed_picture_is_not_composed_again(files: Path) -> None:
    whole = droid.canvas(*(droid.frame(seed) for seed in range(3)))[:540, :640]
    agree(ask(files, image=InMemory(whole[None], "it")), files)


def test_one_camera_is_taken_as_the_server_takes_it_and_said(files: Path) -> None:
    """640 × 360 pixels have a place in the profile: they are brought to its size."""
    torch = pytest.importorskip("torch")
    prepared = ask(files, image=files / "wrist.png")
    planes = torch.from_numpy(droid.frame(0)).permute(2, 0, 1)[None].float()
    wanted = torch.nn.functional.interpolate(planes, size=(540, 640), mode="bilinear", align_corners=False)
    levels = wanted[0].permute(1, 2, 0).numpy().astype(np.uint8)
    found = np.round((prepared.request.pixels[0, :, 0, :540, :640] + 1) * 127.5).astype(np.uint8)
    np.testing.assert_array_equal(found.transpose(1, 2, 0), levels)
    (note,) = prepared.notes
    assert "640 × 360" in note and "--image wrist=FILE --image left=FILE --image right=FILE" in note


def test_the_viewpoint_is_the_embodiment_s(files: Path) -> None:
    text = run_samples.text_of(ask(files, viewpoint="wrist_view").request.input_ids)
    assert "wrist-mounted camera." in text and "bottom row" not in text


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([1.0] * 7, "shape [7]"),
        ([], "shape [0]"),
        ({"joint_position": [0.0] * 7}, "it has 'joint_position'"),
        ({"joint_position": [0.0] * 7, "gripper_position": [0.0], "x": [1]}, "'x'"),
        ({"joint_position": [0.0] * 6, "gripper_position": [0.0]}, "`joint_position` has shape [6]"),
        ({"joint_position": [0.0] * 6 + [[0.0]], "gripper_position": [0.0]}, "`joint_position` is no list of numbers"),
        (["1"] * 8, "shape [8]"),
        ([True] * 8, "shape [8]"),
        ([1e39] * 8, "not a finite number"),
        ([float("nan")] * 8, "not a finite number"),
        ("text", "not a list of numbers"),
        ([[1.0] * 8, [1.0]], "not a list of numbers"),
    ],
)
def test_states_that_are_none(files: Path, value: Any, said: str) -> None:
    error = refused("CX619", files, state=InMemory(value, "it"))
    assert said in error.message, error


def test_files_of_states(files: Path, tmp_path: Path) -> None:
    for name, text in (("a.json", "{"), ("a.txt", "[]"), ("missing.json", None), ("b.json", "null")):
        if text is not None:
            (tmp_path / name).write_text(text)
        refused("CX619", files, state=tmp_path / name)
    (tmp_path / "c.json").write_text(json.dumps({"state": [*droid.JOINTS, droid.GRIPPER]}))
    agree(ask(files, state=tmp_path / "c.json"), files)


def test_a_longer_history(files: Path) -> None:
    """Two rows before the actions: the one before now is at frame −1."""
    policy = replace(DROID, history=2)
    shape = PROFILE["droid"] | {"action_len": DimRecord(34, 34, 34)}
    found = manifest({"droid": shape}, sampling=CheckpointSampling(UNIPC, policy="droid_lerobot"), policy=policy)
    rows = np.arange(24.0).reshape(3, 8) / 10
    asked = GenerateOptions("x", mode="policy", image=cameras(files), state=InMemory(rows, "it"))
    part = prepare(asked, BundleFiles(files, found)).request.action
    assert part is not None and part.given is not None
    assert (part.rows, part.first_position, part.given_rows) == (34, -1, 2)
    np.testing.assert_array_equal(part.given[:, :7], rows[1:, :7].astype(np.float32))
    np.testing.assert_array_equal(part.given[:, 7], np.float32(1) - rows[1:, 7].astype(np.float32))
    with pytest.raises(UserError, match="1 rows; this policy is given 2"):
        prepare(replace(asked, state=InMemory(rows[0], "it")), BundleFiles(files, found))


def test_cameras_that_do_not_fit(files: Path) -> None:
    refused("CX640", files, image={"wrist": files / "wrist.png"})
    refused("CX640", files, image={**cameras(files), "wrist_image_left": files / "wrist.png"})
    refused("CX640", files, image={**cameras(files), "depth": files / "wrist.png"})
    error = refused("CX604", files, image=cameras(files), video=files / "clip.mp4")
    assert "--image and --video" in error.message
    refused("CX604", files, mode="i2v")


def test_the_hint_speaks_of_no_size_that_was_not_given(files: Path) -> None:
    plain = replace(policy_embodiment("umi"), chunk=32, fps=15.0)
    error = refused("CX607", files, plain, image=files / "wrist.png", state=None)
    assert "the size follows from the picture" in error.hint
    assert "leave --tier out" in refused("CX607", files, tier=256).hint


def test_files_by_name(tmp_path: Path) -> None:
    assert named_files("--image", ["a.png"]) == Path("a.png")
    assert named_files("--image", ["wrist=a.png"]) == {"wrist": Path("a.png")}
    assert named_files("--image", ["wrist=a=b.png", "left=c"]) == {"wrist": Path("a=b.png"), "left": Path("c")}
    assert named_files("--image", ["./x=a.png"]) == Path("./x=a.png")
    (tmp_path / "w=a.png").touch()
    assert named_files("--image", [str(tmp_path / "w=a.png")]) == tmp_path / "w=a.png"
    for values in (["a.png", "b.png"], ["wrist=a", "b.png"], ["wrist=a", "wrist=b"]):
        with pytest.raises(UserError) as caught:
            named_files("--image", values)
        assert caught.value.code == "CX604"


def test_columns_are_turned_around_inside_the_statistics() -> None:
    """As the published order is: the robot's number is turned around, then scaled; and back."""
    scale = ActionScale("minmax", np.array([0.0, 0.5]), np.array([2.0, 0.5]))
    conversion = Conversion((1,), scale)
    robot = np.array([[1.0, 0.25], [-2.0, 1.0]], np.float32)
    model = conversion.to_model(robot)
    np.testing.assert_array_equal(model, np.array([[0.5, 0.5], [-1.0, -1.0]], np.float32))
    np.testing.assert_array_equal(conversion.to_robot(model), robot)
    assert conversion.units == "raw" and Conversion((1,)).units == "model"
    parts = (ColumnGroup("pose", 9), ColumnGroup("gripper", 1, mirrored=True))
    assert replace(EMBODIMENTS["umi"], parts=parts).mirrored == (9,)
    assert read_state(InMemory([1, 2], "it"), replace(EMBODIMENTS["pusht"]), 2).tolist() == [[1.0, 2.0]]


def test_options_reach_the_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`--image NAME=FILE` and `--state`, from the command line."""
    asked: list[GenerateOptions] = []

    def stop(self: Any, options: GenerateOptions) -> Any:
        asked.append(options)
        raise UserError("CX604", "far enough")

    monkeypatch.setattr("cosmos_export.runtime.model.LoadedModel.prepare", stop)
    monkeypatch.setattr("cosmos_export.bundle.open_bundle", lambda path: BundleFiles(tmp_path, policy_manifest()))
    command = ["run", "b", "-p", "x", "--image", "wrist=a.png", "--image", "left=b.png", "--state", "s.json"]
    monkeypatch.setattr("sys.argv", ["cosmos-export", *command])
    with pytest.raises(SystemExit):
        cli.main()
    assert asked[0].image == {"wrist": Path("a.png"), "left": Path("b.png")}
    assert asked[0].state == Path("s.json")
