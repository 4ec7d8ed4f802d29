"""The kind of a file, by its first bytes."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from cosmos_export import files

HEAD_BYTES = 4096
"""Bytes at the beginning of a file that are looked at."""


@dataclass(frozen=True)
class Thing:
    """A thing that was recognised: ``what`` it is, with its article, and the ``hint`` with the next command."""

    what: str
    hint: str
    placeholder: bool = False
    """It stands in the place of a file that was not downloaded, whatever that file was."""
    picture: bool = False
    """It is a picture or a clip."""


def of_file(path: Path) -> Thing | None:
    """The kind of the file ``path``; None where it is not known, or cannot be read."""
    try:
        with files.opened(path) as file:
            return of_bytes(file.read(HEAD_BYTES), path)
    except OSError:
        return None


def placeholder(path: Path) -> Thing | None:
    """The kind of ``path`` where it stands in the place of a file that was not downloaded; None for any other."""
    found = of_file(path)
    return found if found is not None and found.placeholder else None


def of_bytes(data: bytes, path: Path) -> Thing | None:
    """The kind of a file that begins with ``data``; ``path`` is for the hint, and is not opened."""
    return _stand_in(data, path) or _container(data, path) or _text(data, path)


def fetch(path: Path) -> str:
    """The command that downloads ``path`` itself, as exactly as its place tells."""
    folder = path.absolute().parent
    for above in (folder, *list(folder.parents)[:5]):
        if (above / ".git").exists():
            return f"`git -C {shlex.quote(str(above))} lfs pull`"
        cached = re.fullmatch(r"(models|datasets)--(.+?)--(.+)", above.parent.parent.name)
        if above.parent.name == "snapshots" and cached:
            kind = " --repo-type dataset" if cached[1] == "datasets" else ""
            name = shlex.quote(str(path.absolute().relative_to(above)))
            revision = f" --revision {above.name}" if above.name.isalnum() else ""
            return f"`hf download {cached[2]}/{cached[3]} {name}{kind}{revision} --force-download`"
        if (above / ".cache" / "huggingface").is_dir():
            name = shlex.quote(str(path.absolute().relative_to(above)))
            return f"`hf download OWNER/NAME {name} --local-dir {shlex.quote(str(above))}`"
    return f"`git lfs pull` in the clone, or `hf download OWNER/NAME {shlex.quote(path.name)} --local-dir DIR`"


_ERROR = re.compile(
    rb"access to (model|dataset) \S+ is restricted.*|cannot access gated repo.*|invalid credentials in authorization "
    rb"header\.?|invalid username or password\.?|(repository|entry|revision) not found\.?|access ?denied\.?|"
    rb"unauthorized\.?|forbidden\.?|not found\.?|too many requests\.?|(40[0-9]|429|50[0-9])[: ].{0,60}",
    re.DOTALL,
)
"""The whole text of a refusal by a server, in lower case."""
_JSON_ERROR = re.compile(
    rb'\{\s*("(error|errors)"\s*:|"(message|detail)"\s*:\s*"(not found|bad credentials|unauthori|forbidden|requires '
    rb"auth|api rate|access))"
)
_LOGIN = "log in with `hf auth login` and accept the licence on the page of the model, then {fetch}"


def _stand_in(data: bytes, path: Path) -> Thing | None:
    """The kind of what is in the place of a file when its download failed or was left out."""
    if not data:
        return _absent("an empty file", path)
    if not data.strip(b"\0"):
        return _absent("zeros from its first byte on: a copy or a download that did not finish", path)
    start = data.lstrip(b"\xef\xbb\xbf \t\r\n")[:400].lower()
    if start.startswith(b"version https://git-lfs.github.com/spec"):
        size = re.search(rb"\bsize (\d{1,18})\b", start)
        of = f" of a file of {int(size[1]) / 1e6:,.1f} MB" if size else ""
        return _absent(f"a Git LFS pointer{of}, not the file itself", path)
    if start.startswith(b"# xet version"):
        return _absent("a Xet pointer, not the file itself", path)
    if b"annex/objects/" in start and b"\n" not in start.strip():
        return Thing("a git-annex pointer, not the file itself", f"`git annex get {shlex.quote(str(path))}`", True)
    if start.startswith((b"outs:\n", b"md5: ")):
        return Thing("a DVC pointer, not the file itself", f"`dvc pull {shlex.quote(str(path))}`", True)
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return _refused("an HTML page, as a server sends it for a gated or a missing file", path)
    if (start.startswith(b"<?xml") and b"<error>" in start) or start.startswith(b"<error>"):
        return _refused("an XML error message of a server", path)
    if _JSON_ERROR.match(start):
        return _refused("a JSON error message of a server", path)
    if len(data) < 400 and _ERROR.fullmatch(start.strip()):
        return _refused("an error message of a server", path)
    if len(data) < 400 and re.fullmatch(rb"(\.\./)+[\w./-]+", start.strip()):
        what = f"the text of a symbolic link to {start.strip().decode()[:80]}, not the file itself"
        return Thing(what, f"copy the folder with its links resolved (`cp -rL`), or {fetch(path)}", True)
    if data.startswith(b"\0GITCRYPT\0"):
        return Thing("encrypted by git-crypt", "`git-crypt unlock`", True)
    if data.startswith((b"\x00\x05\x16\x07", b"\x00\x05\x16\x00")):
        what = "an AppleDouble file, which macOS writes beside the file itself"
        return Thing(what, f"`find {shlex.quote(str(path.parent))} -name '._*' -delete`", True)
    return None


def _absent(what: str, path: Path) -> Thing:
    return Thing(what, f"download the file itself: {fetch(path)}", True)


def _refused(what: str, path: Path) -> Thing:
    return Thing(what, _LOGIN.format(fetch=fetch(path)), True)


SAFETENSORS = "a safetensors file"
TAR = "a tar archive"
_TORCH = "load it in a trusted place with torch and write it with safetensors.torch.save_file; it is never opened here"
_UNPACK = "unpack it, and give what was in it"
_MEDIA = "pictures are for --image, clips for --video"
_MAGIC: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"GGUF", "a GGUF file, as llama.cpp and ComfyUI read", "GGUF is not read: give the checkpoint in safetensors"),
    (0, b"lmgg", "a GGML file, as llama.cpp read", "GGML is not read: give the checkpoint in safetensors"),
    (0, b"tjgg", "a GGML file, as llama.cpp read", "GGML is not read: give the checkpoint in safetensors"),
    (0, b"\x80\x02", "a pickle, as torch.save wrote", _TORCH),
    (0, b"\x80\x03", "a pickle", _TORCH),
    (0, b"\x80\x04", "a pickle", _TORCH),
    (0, b"\x80\x05", "a pickle", _TORCH),
    (0, b"\x1f\x8b", "compressed with gzip", f"`gunzip` it, or `tar xzf`: {_UNPACK}"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", f"`unzstd` it, or `tar --zstd -xf`: {_UNPACK}"),
    (0, b"\xfd7zXZ\0", "compressed with xz", f"`unxz` it, or `tar xJf`: {_UNPACK}"),
    (0, b"BZh", "compressed with bzip2", f"`bunzip2` it, or `tar xjf`: {_UNPACK}"),
    (0, b"\x04\x22\x4d\x18", "compressed with lz4", f"`unlz4` it: {_UNPACK}"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (0, b"Rar!", "a RAR archive", _UNPACK),
    (257, b"ustar", TAR, f"`tar xf` it: {_UNPACK}"),
    (
        0,
        b"\x89HDF",
        "an HDF5 file",
        "HDF5 is not read: convert it (LeRobot data sets are read, and weights in safetensors)",
    ),
    (0, b"\x93NUMPY", "a NumPy array (.npy)", "write it with safetensors.numpy.save_file"),
    (0, b"PAR1", "a Parquet file", "a LeRobot data set is given as its folder, the one with meta/info.json"),
    (0, b"ARROW1", "an Arrow file", "convert it to Parquet; a LeRobot data set is given as its folder"),
    (0, b"SQLite format 3\0", "an SQLite database", "it is not read"),
    (0, b"%PDF", "a PDF document", "it is not read"),
    (0, b"ftrt", "a TensorRT engine", "engines are made and run as parts of a bundle: `cosmos-export build`"),
    (0, b"ptrt", "a TensorRT engine", "engines are made and run as parts of a bundle: `cosmos-export build`"),
    (0, b"\x7fELF", "a program or a library", "it is not read"),
    (0, b"\x89PNG", "a PNG picture", _MEDIA),
    (0, b"\xff\xd8\xff", "a JPEG picture", _MEDIA),
    (0, b"GIF8", "a GIF", _MEDIA),
    (0, b"BM", "a BMP picture", _MEDIA),
    (8, b"WEBP", "a WebP picture", _MEDIA),
    (8, b"WAVE", "a WAV file", "sound is read from the clip of --video"),
    (8, b"AVI ", "an AVI clip", _MEDIA),
    (4, b"ftypavif", "an AVIF picture", _MEDIA),
    (4, b"ftypheic", "an HEIC picture", "convert it to PNG or JPEG"),
    (4, b"ftyp", "an MP4 clip", _MEDIA),
    (0, b"\x1a\x45\xdf\xa3", "a Matroska or WebM clip", _MEDIA),
    (0, b"OggS", "an Ogg file", "sound is read from the clip of --video"),
    (0, b"ID3", "an MP3 file", "sound is read from the clip of --video"),
    (0, b"fLaC", "a FLAC file", "sound is read from the clip of --video"),
)
"""Offset, bytes there, what they are, what helps."""


def _container(data: bytes, path: Path) -> Thing | None:
    if data.startswith(b"PK\x03\x04"):
        name = data[30 : 30 + int.from_bytes(data[26:28], "little")]
        if name.endswith(b".npy"):
            return Thing("NumPy arrays in a ZIP (.npz)", "write them with safetensors.numpy.save_file")
        if b"data.pkl" in data or name.endswith((b"/version", b"/byteorder", b".format_version")):
            return Thing("a file of torch.save, which may hold pickled objects", _TORCH)
        return Thing("a ZIP archive", f"`unzip` it: {_UNPACK}")
    for offset, magic, what, hint in _MAGIC:
        if data[offset:].startswith(magic) and not (magic == b"BM" and data[:32].isascii()):
            return Thing(what, hint, picture=hint is _MEDIA)
    if re.match(rb"\x08[\x03-\x10][\x12\x1a\x3a]", data):
        return Thing("an ONNX model", "ONNX models are made and run as parts of a bundle: `cosmos-export build`")
    length = int.from_bytes(data[:8], "little")
    if len(data) > 9 and 0 < length < 1 << 30 and data[8:9] == b"{":
        return Thing(SAFETENSORS, "it holds tensors: weights, latents or actions")
    return None


def _text(data: bytes, path: Path) -> Thing | None:
    name = shlex.quote(str(path))
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Thing("text in UTF-16", f"`iconv -f UTF-16 -t UTF-8 {name} > new`, then `mv new {name}`")
    if data.startswith(b"\xef\xbb\xbf"):
        return Thing(
            "text that begins with a byte order mark (BOM)", f"save it without: `sed -i '1s/^\\xEF\\xBB\\xBF//' {name}`"
        )
    return None
