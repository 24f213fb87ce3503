"""The store of results: JSON-lines files, one line for each row, of every kind of row alike.

A row is a frozen dataclass with a `machine`, a `date` and a `schema`; a line is read by the types
of its fields, so that a damaged or hand-edited one is refused with its file and number.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError

from litezoo.models.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["STRICT", "Store", "newest", "read_record", "results_folder", "why_invalid"]

#: What a row's dataclass sets as `__pydantic_config__`: no other fields, no NaN.
STRICT = {"extra": "forbid", "allow_inf_nan": False}


class _Dated(Protocol):
    @property
    def date(self) -> str: ...


_Row = TypeVar("_Row", bound="DataclassInstance")
_DatedRow = TypeVar("_DatedRow", bound=_Dated)


def results_folder() -> Path:
    """Return benchmarks/results of the checkout, or ./benchmarks/results elsewhere."""
    return Path("benchmarks/results")


def why_invalid(error: ValidationError) -> str:
    """Return the first of pydantic's findings in one line, e.g. "p50_ms: field required"."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]


def read_record(file: Path, record: type[_Row], *, name: str, command: str) -> _Row:
    """Read a JSON file that is one dataclass; a damaged one is a CheckFailed with `command`."""
    try:
        return TypeAdapter(record).validate_json(file.read_bytes(), strict=True)
    except ValidationError as error:
        raise CheckFailed(
            f"{file} holds no {name} ({why_invalid(error)}); make it again: {command}"
        ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Store(Generic[_Row]):
    """One kind of row: its dataclass, what a message calls it and its file, and what measures it.

    Rows of `schemas` are read; the newest is what is written.
    """

    row: type[_Row]
    name: str
    file_name: str
    command: str
    schemas: tuple[int, ...]

    @cached_property
    def _adapter(self) -> TypeAdapter[_Row]:
        return TypeAdapter(self.row)

    def append(self, rows: Sequence[_Row], file: Path) -> Path:
        """Append rows to a file, each line whole; return the file."""
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(dataclasses.asdict(row), default=dict) + "\n" for row in rows]
        with file.open("a", encoding="utf-8") as stream:
            stream.write("".join(lines))
            stream.flush()
            os.fsync(stream.fileno())
        return file

    def append_by_device(self, rows: Sequence[_Row], folder: Path) -> list[Path]:
        """Append rows to `folder`/<device>.jsonl of each one's device; return the files."""
        devices = dict.fromkeys(str(getattr(row, "device")) for row in rows)  # noqa: B009
        return [
            self.append(
                [row for row in rows if getattr(row, "device") == device],  # noqa: B009
                folder / f"{device}.jsonl",
            )
            for device in devices
        ]

    def read(self, files: Iterable[Path]) -> list[_Row]:
        """Read files; a damaged line is a CheckFailed with file and line number."""
        return [row for file in files for row in self._read(file)]

    def _read(self, file: Path) -> list[_Row]:
        if not file.is_file():
            raise UsageError(f"no {self.file_name} {file}; measure first: {self.command}")
        rows = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                rows.append(self.parse(line))
            except ValueError as error:
                raise CheckFailed(f"{file}:{number} is not a {self.name}: {error}") from error
        return rows

    def parse(self, line: str) -> _Row:
        """Read one line; ValueError with the reason for one that is no such row."""
        values = json.loads(line)
        if not isinstance(values, dict) or values.get("schema") not in self.schemas:
            found = values.get("schema") if isinstance(values, dict) else None
            raise ValueError(f"schema {found} is not {' or '.join(map(str, self.schemas))}")
        try:
            return self._adapter.validate_json(line, strict=True)
        except ValidationError as error:
            raise ValueError(why_invalid(error)) from error


def newest(
    rows: Iterable[_DatedRow], conditions: Callable[[_DatedRow], Hashable]
) -> list[_DatedRow]:
    """Keep the newest row (by date) of each set of conditions, in order of first appearance."""
    kept: dict[Hashable, _DatedRow] = {}
    for row in rows:
        key = conditions(row)
        if key not in kept or row.date >= kept[key].date:
            kept[key] = row
    return list(kept.values())
