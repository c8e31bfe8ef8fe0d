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

_ANNEX = "is a git-annex pointer; it holds the file's address only: run `git annex get` in the clone"
_TEXTS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE | re.DOTALL), what)
    for pattern, what in (
        (r"version https?://(git-lfs|hawser|git-media)", f"is a Git LFS pointer; {_CLONE}"),
        (r"# xet version", f"is a Xet pointer; {_CLONE.replace('git lfs', 'git xet')}"),
        (r"(\.\./|\./)*(\.git)?/annex/objects/", _ANNEX),
        (
            r"(\.\./)+\S+\s*$",
            "is the text of a symbolic link that was lost (Git with core.symlinks=false, or a copy of a cache): put "
            "the file that it leads to in its place",
        ),
        (
            r"<!--|(<\?xml[^>]*>\s*)?"
            r"<(!doctype\s+html|html|head|body|title|meta|script|style|link|div|p|h[1-6]|center|span|br)\b",
            f"is a web page (HTML); {_DOWNLOAD}",
        ),
        (r"<(\?xml|[a-z])", f"is XML; {_DOWNLOAD}"),
    )
)
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", f"is a GGUF file, llama.cpp's format; {_PEFT_FOLDER}, from which it was made"),
    (b"algg", f"is a LoRA in llama.cpp's former format; {_PEFT_FOLDER}, from which it was made"),
    (b"\x93NUMPY", f"is a NumPy array; {_PEFT_FOLDER}"),
    (b"\x89HDF\r\n\x1a\n", f"is an HDF5 file (Keras); {_PEFT_FOLDER}"),
    (b"\x1f\x8b", f"is compressed by gzip; {_UNPACK}"),
    (b"BZh", f"is compressed by bzip2; {_UNPACK}"),
    (b"\xfd7zXZ\x00", f"is compressed by xz; {_UNPACK}"),
    (b"\x28\xb5\x2f\xfd", f"is compressed by zstd; {_UNPACK}"),
    (b"\x04\x22\x4d\x18", f"is compressed by lz4; {_UNPACK}"),
    (b"\x5d\x00\x00\x80\x00", f"is compressed by lzma; {_UNPACK}"),
    (b"7z\xbc\xaf\x27\x1c", f"is a 7z archive; {_UNPACK}"),
    (b"Rar!", f"is a RAR archive; {_UNPACK}"),
    (b"%PDF", f"is a PDF; {_DOWNLOAD}"),
    (b"\x7fELF", "is a program"),
)
_PICKLE = re.compile(
    rb"\x80[\x02-\x05]|[}\](]q\x00|\([dl]p0?\n|c(__builtin__|builtins|collections|copy_reg|torch)"
)  # of every protocol
_TAR_MAGIC = slice(257, 262)
_ONNX = re.compile(rb"\x08[\x01-\x20](\x12[\x01-\x40][\w. -]|\x3a)")


def conversion(source: str) -> str:
    """The command that makes adapter_model.safetensors of the pickle `source` in the folder it is run in.

    It opens no code (weights_only), copies what shares memory, and makes contiguous what is not: safetensors refuses
    both.
    """
    opened = f"open('{source}', 'rb')" if source == WEIGHTS_FILE else f"'{source}'"  # torch goes by the ending
    return (
        f'python -c "import torch, safetensors.torch; safetensors.torch.save_file({{k: '
        f"v.detach().clone(memory_format=torch.contiguous_format) for k, v in torch.load({opened}, "
        f"map_location='cpu', weights_only=True).items() if hasattr(v, 'detach')}}, '{WEIGHTS_FILE}')\""
    )


def describe(start: bytes, file: str = WEIGHTS_FILE) -> str | None:
    """What a file that begins with `start` and lies in the place of `file` is and what to do, as the rest of a
    sentence; None if it is not known."""
    if not start:
        return "is empty: it was never written, or the disk was full; copy or save it again"
    for magic, what in _MAGIC:
        if start.startswith(magic):
            return what
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")) or _PICKLE.match(start):
        what = "a zip archive: a pickle of torch.save, or packed files" if start.startswith(b"PK") else "a pickle"
        if file != WEIGHTS_FILE:
            return f"is {what}; {_PEFT_FOLDER}"
        return (
            f"is {what}; pickles can run code and are never opened. Convert it in its folder, where you trust it: "
            f"{conversion(WEIGHTS_FILE)}"
        )
    if start[_TAR_MAGIC] == b"ustar":
        return f"is a tar archive; {_UNPACK}"
    if _ONNX.match(start):
        return f"is an ONNX model; {_PEFT_FOLDER}"
    if len(start) >= 8 and not start.strip(b"\0"):
        return "begins with zero bytes only: a copy or a download of it did not end; fetch it again"
    return _describe_text(start, file)


def _describe_text(start: bytes, file: str) -> str | None:
    text, encoding = _decoded(start)
    if text is None:
        return None
    plain = text.lstrip("\ufeff \t\r\n")
    for pattern, what in _TEXTS:
        if pattern.match(plain):
            return what
    if file == WEIGHTS_FILE and plain[:1] in ("{", "["):
        return "is JSON, not weights; were the two files exchanged, or is it a server's answer to a download?"
    if encoding is not None:
        return encoding
    if len(text) < 8 or not _is_text(text):
        return None
    if not plain:
        return "holds blanks only; copy or save it again"
    wanted = "" if file == WEIGHTS_FILE else ", not JSON"
    return f"is text that begins with {plain.splitlines()[0][:60]!r}{wanted}. If it was downloaded, {_DOWNLOAD}"


def _decoded(start: bytes) -> tuple[str | None, str | None]:
    """The text, None if it is none; and what is wrong with its encoding, if something is."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return start.decode("utf-16", "ignore"), "is text in UTF-16; write it as UTF-8"
    for order, zeros in (("le", start[1::2]), ("be", start[::2])):
        if not zeros.strip(b"\0") and _is_text(text := start.decode(f"utf-16-{order}", "ignore")):
            return text, "is text in UTF-16; write it as UTF-8"
    wrong = None
    if start.startswith(codecs.BOM_UTF8):
        wrong = "begins with a byte order mark; write it as UTF-8 without one"
    try:
        return start.decode("utf-8"), wrong
    except UnicodeDecodeError as error:
        if error.start < len(start) - 4:  # else a character was cut
            return None, None
        return start[: error.start].decode("utf-8"), wrong


def _is_text(text: str) -> bool:
    return bool(text) and all(c.isprintable() or c.isspace() for c in text)
