"""Files that people take for a checkpoint: what each of them is, by its first bytes, and what to do about it."""

import json
import string
import zipfile
from pathlib import Path

# The beginning of files that torch.save wrote before torch 1.6
_TORCH_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")
_BINARY = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"%PDF": "a PDF",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file, as Keras writes it",
    b"\x1f\x8b": "compressed (gzip); unpack it first, and name the file in it",
    b"BZh": "compressed (bzip2); unpack it first, and name the file in it",
    b"\xfd7zXZ": "compressed (xz); unpack it first, and name the file in it",
    b"(\xb5/\xfd": "compressed (zstd); unpack it first, and name the file in it",
    b"7z\xbc\xaf": "an archive (7z); unpack it first, and name the file in it",
    b"Rar!": "an archive (rar); unpack it first, and name the file in it",
}
_OTHERWISE = "name a .pth or .safetensors file of weights"
_NOTHING = "it is nothing that torch.save or safetensors writes, or its beginning is damaged; use another"


def reason(path: Path) -> str:
    """Why no weights can be read from a file, and the cure; '' if nothing is wrong with its first bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
    if not head:
        return "it is empty; copy or download it again"
    for magic, kind in _BINARY.items():
        if head.startswith(magic):
            return f"it is {kind}" if ";" in kind else f"it is {kind}; {_OTHERWISE}"
    if head[257:262] == b"ustar":
        return "it is an archive (tar); unpack it first, and name the file in it"
    if head.startswith(b"PK"):
        return _zip_reason(path)
    if is_safetensors(path):
        return _safetensors_reason(path, size)
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and head[2:3] == b"\x12"):  # format's version, writer's name
        return f"it is an ONNX model, a graph for other programs; {_OTHERWISE} that it was made from"
    if head.startswith(b"\x80"):
        return "" if _TORCH_MAGIC in head[:64] else f"it is a pickle that torch.save did not write; {_OTHERWISE}"
    return _text_reason(path, head)


def folder_reason(path: Path) -> str:
    """What a folder is that was named instead of a file, and which file to name."""
    if (path / ".metadata").is_file():
        cure = "make one file of it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
        return f"it is a folder of shares of a checkpoint (torch.distributed.checkpoint); {cure}"
    held = [path / name for name in ("best.pth", "last.pth", "model.safetensors") if (path / name).is_file()]
    return f"it is a folder; name a file in it, such as {held[0] if held else 'best.pth'}"


def is_safetensors(path: Path) -> bool:
    """Whether a file, whatever its name, begins with the length of a header and the header's brace."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 100 * 2**20


def _safetensors_reason(path: Path, size: int) -> str:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    cut = f"it is cut short: a safetensors file of {size} bytes that lacks its end; copy or download it again"
    if len(header) < length:
        return cut
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, LookupError, TypeError):
        return "its header, of a safetensors file, cannot be read; copy or download it again"
    return cut if 8 + length + max(ends, default=0) > size else ""


def _zip_reason(path: Path) -> str:
    if not zipfile.is_zipfile(path):
        return "it is cut short: its end is missing; copy or download it again"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return "its list of contents is damaged; copy or download it again"
    inner = [name.partition("/")[2] for name in names]
    if "constants.pkl" in inner and any(name.startswith("code/") for name in inner):
        return (
            "it is a TorchScript program, which carries code; save its weights alone where you trust it: "
            "torch.save(torch.jit.load(PATH).state_dict(), 'weights.pth')"
        )
    if "archive_format" in inner:
        return f"it is a program of torch.export; {_OTHERWISE} that it was made from"
    if "data.pkl" in inner:
        return ""
    if names and all(name.endswith(".npy") for name in names):
        return f"it holds NumPy arrays (.npz); {_OTHERWISE}"
    shown = f" such as {names[0]!r}" if names else ""
    return f"it is a zip archive of {len(names)} files{shown}; unpack it first, and name the file of weights in it"


def _text_reason(path: Path, head: bytes) -> str:
    try:
        text = head.decode().lstrip("\ufeff \r\n\t")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # else the last letter is only cut off where reading stopped
            return _NOTHING
        text = head[: error.start].decode()
    if "\0" in text:
        return _NOTHING
    if text.startswith("version https://git-lfs"):
        return "it is a Git LFS pointer, which stands for the file; fetch the file itself with git lfs pull"
    if text[:15].lower().startswith(("<!doctype html", "<html")):
        return "it is a web page, often an error or the page about the file; download the file itself"
    named = text[66:].partition("\n")[0].strip()
    if set(text[:64]) <= set(string.hexdigits) and text[64:66] in ("  ", " *") and named:
        return f"it is a checksum; name the file that it is of, {str(path.parent / named)!r}"
    if text.startswith(("{", "[")):
        return f"it is JSON text, such as a config.json; {_OTHERWISE}"
    return f"it is text, beginning {text[:24].splitlines()[0] if text else ''!r}; {_OTHERWISE}"
