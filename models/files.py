"""Files are written whole (temporary name, fsync, rename) and known by their sha256."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import zipfile
from pathlib import Path

__all__ = ["file_sha256", "open_checkpoint", "write_whole"]


def file_sha256(file: Path) -> str:
    """Return a file's sha256 as hexadecimal text."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_checkpoint(file: Path) -> io.BufferedReader | io.BytesIO:
    """Open a file for reading; of a .zip (pytorchcv's releases) the only .pth in it."""
    if file.suffix != ".zip":
        return file.open("rb")
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith(".pth")]
        if len(names) != 1:
            raise zipfile.BadZipFile(f"{file} has {len(names)} .pth files, one is wanted")
        return io.BytesIO(archive.read(names[0]))


def write_whole(file: Path, content: bytes | str) -> Path:
    """Write `content` so that `file` is either the old one or the new one, never half of it."""
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return file
