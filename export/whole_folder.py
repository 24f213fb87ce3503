"""A folder that appears whole or not at all: two writers do not mix, a killed one leaves none."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from litezoo.models.errors import CheckFailed, MissingError, UsageError

from .artifact import MANIFEST

__all__ = ["check_replaceable", "whole_folder"]


def check_replaceable(out: Path) -> None:
    """Refuse to replace what is not an artifact."""
    if out.is_file():
        raise UsageError(f"{out} is a file; give a folder with --out")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise UsageError(f"{out} holds other files; give an empty or new folder with --out")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes `out` at the end, or vanishes on an error.

    A lock keeps a second export into the same folder out; what a killed one left goes first.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.parent / f".{out.name}.lock", blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise UsageError(
            f"another export is writing {out}; wait for it, or give another folder with --out"
        ) from error
    try:
        for left in out.parent.glob(f".{out.name}.*"):
            if left.is_dir():
                if left.suffix == ".old" and not out.exists():
                    os.replace(left, out)
                shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        scratch.chmod(0o755)
        old = scratch.with_name(scratch.name + ".old")
        try:
            yield scratch
            if out.exists():
                os.replace(out, old)
            os.replace(scratch, out)
        except BaseException as error:
            if old.exists() and not out.exists():
                os.replace(old, out)
            shutil.rmtree(scratch, ignore_errors=True)
            if isinstance(error, CheckFailed):
                error.args = (f"{error}; nothing was written",)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise MissingError(
                    f"the disk of {out.parent} is full; nothing was written"
                ) from error
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        with suppress(OSError):  # filelock refuses a lock on a file that is gone
            Path(lock.lock_file).unlink()
        lock.release()
