"""What the Python bindings of TensorRT have, read without TensorRT: names of every class, and signatures.

    pip download --no-deps tensorrt-cu13-bindings==11.4.0.106 && unzip -d DIR tensorrt_cu13_bindings-*.whl
    cd tests/targets; python read_tensorrt_api.py DIR/tensorrt_bindings/tensorrt.so 11.4.0.106 > tensorrt_11_api.json

The wheel of the bindings is 1 MB; the libraries behind it are gigabytes. The handful of functions that the extension
wants of them is given by a library of stubs, made with the C compiler: it loads, and every class has its documentation.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_STUBS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
_LIBRARIES = ("libnvonnxparser.so.11", "libnvinfer_plugin.so.11", "libnvinfer.so.11")


def load(extension: Path) -> Any:
    """The extension module with stubs in place of the libraries."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "stubs.c"
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in _STUBS))
        for name in _LIBRARIES:
            path = Path(folder) / name
            command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(path), str(source)]
            subprocess.run(command, check=True)
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # found by its name when the extension asks for it
        spec = importlib.util.spec_from_file_location("tensorrt", extension)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def api(module: Any) -> dict[str, Any]:
    """Class → member → parameters of each overload of a method, or null for what is none."""
    found: dict[str, Any] = {}
    for name in sorted(dir(module)):
        value = getattr(module, name)
        if isinstance(value, type):
            members = sorted(m for m in dir(value) if not m.startswith("_") or m == "__init__")
            found[name] = {member: _signatures(getattr(value, member, None), member) for member in members}
        elif not name.startswith("_"):
            found[name] = _signatures(value, name)
    return found


def _signatures(value: Any, name: str) -> list[list[str]] | None:
    """Parameter names of each overload, without ``self``; a ``=`` behind one that has a default."""
    text = getattr(value, "__doc__", None) if callable(value) else None
    if not text:
        return None
    found = []
    for line in text.splitlines():
        match = re.match(rf"(?:\d+\. )?{re.escape(name)}\((.*)\) -> ", line.strip())
        if match:
            found.append([p for p in map(_parameter, _split(match[1])) if p != "self"])
    return found or None


def _split(text: str) -> list[str]:
    """Parameters at the commas that are in no bracket and no string."""
    parts, depth, quoted, start = [], 0, "", 0
    for i, character in enumerate(text):
        if quoted:
            quoted = "" if character == quoted else quoted
        elif character in "'\"":
            quoted = character
        elif character in "([{<":
            depth += 1
        elif character in ")]}>":
            depth -= 1
        elif character == "," and not depth:
            parts.append(text[start:i])
            start = i + 1
    return [part for part in (*parts, text[start:]) if part.strip()]


def _parameter(text: str) -> str:
    name = text.split(":")[0].split("=")[0].strip()
    return name + ("=" if "=" in re.sub(r"\[[^\]]*\]|<[^>]*>", "", text) else "")


def document(extension: Path, version: str) -> str:
    """One class a line."""
    lines = [
        f"{json.dumps(name)}:{json.dumps(value, separators=(',', ':'))}" for name, value in api(load(extension)).items()
    ]
    return f'{{"version":"{version}","api":{{\n' + ",\n".join(lines) + "\n}}\n"


if __name__ == "__main__":
    print(document(Path(sys.argv[1]), sys.argv[2]), end="")
