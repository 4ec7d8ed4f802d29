"""Tiny data of every kind: clips, pictures, prompts, and LeRobot data sets of both versions."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CAMERA, OTHER_CAMERA = "observation.images.front", "observation.images.wrist"


def write_clip(path: Path, frames: int = 17, fps: int = 24, height: int = 48, width: int = 64, seed: int = 0) -> Path:
    """Moving bars over noise, as mp4."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    base = random.integers(0, 200, (height, width, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=Fraction(fps))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for index in range(frames):
            image = base.copy()
            image[:, (3 * index) % width] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_sounding_clip(path: Path, frames: int = 17, fps: int = 24, rate: int = 44_100) -> Path:
    """As `write_clip`, with a track of sound: silence, and a tone of 440 Hz from the first quarter second on."""
    silent = write_clip(path.with_suffix(".silent.mp4"), frames, fps)
    times = np.arange(int(frames / fps * rate)) / rate
    tone = np.where(times < 0.25, 0.0, 0.5 * np.sin(2 * np.pi * 440 * times)).astype(np.float32)
    with av.open(str(silent)) as source, av.open(str(path), "w") as container:
        stream: Any = container.add_stream_from_template(source.streams.video[0])
        sound: Any = container.add_stream("aac", rate=rate, layout="stereo")
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
        frame = av.AudioFrame.from_ndarray(np.stack([tone, tone]), format="fltp", layout="stereo")
        frame.sample_rate = rate
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    silent.unlink()
    return path


def write_picture(path: Path, seed: int = 0) -> Path:
    from PIL import Image

    random = np.random.default_rng(seed)
    Image.fromarray(random.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
    return path


def actions(rows: int, width: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.cumsum(random.normal(0, 0.1, (rows, width)), axis=0).astype(np.float32)


def write_lerobot(
    root: Path, version: str = "v3.0", episodes: int = 2, length: int = 20, width: int = 10, fps: int = 15
) -> Path:
    """Two cameras are named, one has a clip. In version 3 all episodes share one table and one clip. Statistics are
    those that LeRobot writes since its version 0.4."""
    features = {name: {"dtype": "video", "shape": [48, 64, 3]} for name in (CAMERA, OTHER_CAMERA)}
    features |= {"action": {"dtype": "float32", "shape": [width]}}
    info: dict[str, Any] = {"codebase_version": version, "robot_type": "umi", "fps": fps, "features": features}
    tables = [
        {
            "action": actions(length, width, seed=index).tolist(),
            "episode_index": [index] * length,
            "frame_index": list(range(length)),
        }
        for index in range(episodes)
    ]
    (root / "meta").mkdir(parents=True)
    if version.startswith("v3"):
        info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        whole = {key: [row for table in tables for row in table[key]] for key in tables[0]}
        _table(root / "data/chunk-000/file-000.parquet", whole)
        _table(
            root / "meta/episodes/chunk-000/file-000.parquet",
            {
                "episode_index": list(range(episodes)),
                "length": [length] * episodes,
                "tasks": [[f"task {index}"] for index in range(episodes)],
                "data/chunk_index": [0] * episodes,
                "data/file_index": [0] * episodes,
                f"videos/{CAMERA}/chunk_index": [0] * episodes,
                f"videos/{CAMERA}/file_index": [0] * episodes,
                f"videos/{CAMERA}/from_timestamp": [index * length / fps for index in range(episodes)],
            },
        )
        _table(root / "meta/tasks.parquet", {"task_index": [0], "__index_level_0__": ["do it"]})
        write_clip(root / f"videos/{CAMERA}/chunk-000/file-000.mp4", episodes * length, fps)
    else:
        info["chunks_size"] = 1000
        for index, table in enumerate(tables):
            _table(root / f"data/chunk-000/episode_{index:06d}.parquet", table)
            write_clip(root / f"videos/chunk-000/{CAMERA}/episode_{index:06d}.mp4", length, fps, seed=index)
        lines = [{"episode_index": i, "length": length, "tasks": [f"task {i}"]} for i in range(episodes)]
        (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (root / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "do it"}))
    (root / "meta/info.json").write_text(json.dumps(info))
    whole = np.concatenate([actions(length, width, seed=index) for index in range(episodes)])
    (root / "meta/stats.json").write_text(json.dumps({"action": statistics(whole)}))
    return root


def statistics(values: np.ndarray) -> dict[str, list[float]]:
    """Statistics of a feature [rows, width] as LeRobot writes them."""
    found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    found |= {f"q{p:02d}": np.quantile(values, p / 100, axis=0) for p in (1, 10, 50, 90, 99)}
    return {"count": [len(values)], **{key: value.tolist() for key, value in found.items()}}


def _table(path: Path, columns: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
