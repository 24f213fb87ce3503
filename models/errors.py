"""Errors a user can meet. Each says in one sentence what is wrong and what to do.

::

    LitezooError (ValueError)
    ├── UsageError      exit status 2: what was asked for cannot be (unknown name, wrong layout)
    ├── CheckFailed     exit status 3: a check found a difference (parity, hash, accuracy)
    └── MissingError    exit status 4: something needed is not on this machine
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType


class LitezooError(ValueError):
    """Base of every error that litezoo raises for its user; `exit_status` is the program's."""

    exit_status = 2


class UsageError(LitezooError):
    """What was asked for is wrong in itself: an unknown name, a bad shape, a wrong layout."""


class CheckFailed(LitezooError):
    """A check ran and found a difference; nothing was written."""

    exit_status = 3


class MissingError(LitezooError):
    """Something that this step needs is not on this machine; the message says what to type."""

    exit_status = 4


def unknown_name(
    kind: str, name: str, known: Iterable[str], *, see: str | None = None
) -> UsageError:
    """Return the error for a name that is not in `known`, with the nearest name that is.

    The known names are listed, or where they are many the command `see` that lists them is named.

    >>> str(unknown_name("device", "t44", ["cpu", "t4"]))
    "unknown device 't44'; did you mean 't4'? (known: cpu, t4)"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    where = f"known: {', '.join(names)}" if see is None else f"see: {see}"
    return UsageError(f"unknown {kind} {name!r}{guess} ({where})")


def first_line(error: Exception) -> str:
    r"""Return the first line of what an error says, "" where it says nothing.

    >>> first_line(ValueError("no such host\nsee the log"))
    'no such host'
    """
    return str(error).strip().partition("\n")[0]


def wrong_words(message: str, known_options: Iterable[str]) -> UsageError:
    """Return a command line parser's complaint in one line, with the nearest option it knows.

    >>> str(wrong_words("unrecognized arguments: --bach 3", ["--batch", "--json"]))
    "unrecognized arguments: --bach 3; did you mean '--batch'?"
    """
    line = " ".join(message.split())
    _, found, rest = line.partition("unrecognized arguments: ")
    option = rest.partition(" ")[0].partition("=")[0]
    near = difflib.get_close_matches(option, list(known_options), n=1) if found else []
    return UsageError(line + (f"; did you mean {near[0]!r}?" if near else ""))


def require(module: str, *, purpose: str, extra: str) -> ModuleType:
    """Import a dependency that only one part of litezoo needs.

    >>> require("no_such_package", purpose="training", extra="train")
    Traceback (most recent call last):
    litezoo.models.errors.MissingError: training needs no_such_package: pip install 'litezoo[train]'
    """
    try:
        return import_module(module)
    except ImportError as error:
        absent = error.name or module
        raise MissingError(
            f"{purpose} needs {absent.split('.')[0]}: pip install 'litezoo[{extra}]'"
        ) from error
