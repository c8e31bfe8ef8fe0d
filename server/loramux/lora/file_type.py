"""What lies in the place of an adapter's file, told by its first bytes, and the way out. Imports no torch."""

from __future__ import annotations

import codecs
import re

from loramux.lora.roots import WEIGHTS_FILE

SIGNATURE_BYTES = 512  # of the file's beginning are enough

_CLONE = "it holds the file's address only: run `git lfs pull` in the clone, or download the file itself"
_DOWNLOAD = "the download did not get the file: look at its address and whether it asks for a token, and fetch it again"
_UNPACK = "unpack it, and put the files themselves into the folder"
_PEFT_FOLDER = "load the folder that PEFT's save_pretrained wrote"

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", f"is a Git LFS pointer; {_CLONE}"),
    (b"version https://hawser", f"is a Git LFS pointer; {_CLONE}"),
    (b"# xet version", f"is a Xet pointer; {_CLONE.replace('git lfs', 'git xet')}"),
    (b"/annex/objects/", "is a git-annex pointer; it holds the file's address only: run `git annex get` in the clone"),
    (b"GGUF", f"is a GGUF file, llama.cpp's format; {_PEFT_FOLDER}, from which it was made"),
    (b"\x93NUMPY", f"is a NumPy array; {_PEFT_FOLDER}"),
    (b"\x89HDF\r\n\x1a\n", f"is an HDF5 file (Keras); {_PEFT_FOLDER}"),
    (b"\x1f\x8b", f"is compressed by gzip; {_UNPACK}"),
    (b"BZh", f"is compressed by bzip2; {_UNPACK}"),
    (b"\xfd7zXZ\x00", f"is compressed by xz; {_UNPACK}"),
    (b"\x28\xb5\x2f\xfd", f"is compressed by zstd; {_UNPACK}"),
    (b"7z\xbc\xaf\x27\x1c", f"is a 7z archive; {_UNPACK}"),
    (b"Rar!", f"is a RAR archive; {_UNPACK}"),
    (b"%PDF", f"is a PDF; {_DOWNLOAD}"),
    (b"\x7fELF", "is a program"),
)
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_TAR_MAGIC = slice(257, 262)
_ONNX = re.compile(rb"\x08[\x01-\x20]\x12[\x01-\x40](pytorch|onnx|tf2onnx|skl2onnx|torch)", re.IGNORECASE)
_HTML = re.compile(rb"\s*(<!--.{0,200}-->\s*)?<(!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL)


def conversion(source: str) -> str:
    """The command that makes adapter_model.safetensors of the pickle `source` in the folder it is run in.

    It opens no code (weights_only), copies what shares memory, and makes contiguous what is not: safetensors refuses
    both.
    """
    opened = f"open('{source}', 'rb')" if source == WEIGHTS_FILE else f"'{source}'"  # torch goes by the ending
    return (
        f'python -c "import torch, safetensors.torch; safetensors.torch.save_file({{k: '
        f"v.detach().clone(memory_format=torch.contiguous_format) for k, v in torch.load({opened}, "
        f"map_location='cpu', weights_only=True).items()}}, '{WEIGHTS_FILE}')\""
    )


def describe(start: bytes) -> str | None:
    """What a file that begins with `start` is and what to do, as the rest of a sentence; None if it is not known."""
    if not start:
        return "is empty: it was never written, or the disk was full; copy or save it again"
    for magic, what in _MAGIC:
        if start.startswith(magic):
            return what
    if start.startswith(b"PK\x03\x04") or _PICKLE.match(start):
        what = "a zip archive: a pickle of torch.save, or packed files" if start.startswith(b"PK") else "a pickle"
        return (
            f"is {what}; pickles can run code and are never opened. Convert it in its folder, where you trust it: "
            f"{conversion(WEIGHTS_FILE)}"
        )
    if start[_TAR_MAGIC] == b"ustar":
        return f"is a tar archive; {_UNPACK}"
    if _ONNX.match(start):
        return f"is an ONNX model; {_PEFT_FOLDER}"
    if _HTML.match(start):
        return f"is a web page (HTML); {_DOWNLOAD}"
    if len(start) >= 16 and not start.strip(b"\0"):
        return "begins with zero bytes only: a copy or a download of it did not end; fetch it again"
    return _describe_text(start)


def _describe_text(start: bytes) -> str | None:
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "is text in UTF-16; write it as UTF-8"
    if start.startswith(codecs.BOM_UTF8):
        return "begins with a byte order mark; write it as UTF-8 without one"
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 4:  # else a character was cut
            return None
        text = start[: error.start].decode("utf-8")
    if len(text) < 8 or not all(c.isprintable() or c.isspace() for c in text):
        return None
    if text.lstrip().startswith("<?xml"):
        return f"is XML; {_DOWNLOAD}"
    if text.lstrip()[:1] in ("{", "["):
        return "is JSON, not weights; were the two files exchanged?"
    return f"is text that begins with {text.split(chr(10))[0][:60]!r}; {_DOWNLOAD}"
