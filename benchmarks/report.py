"""One self-contained HTML page of all results, which needs no network.

The page is `report_page.html` with its style, its program (`report_page.js`), plotly's, and the
rows as JSON put in. Nothing is drawn here: the program makes charts, filters and tables of the rows
that the reader chooses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from litezoo.models.errors import UsageError, require
from litezoo.models.files import write_whole

from .measure import Measurement
from .report_data import page_data

__all__ = ["write_report"]

_HERE = Path(__file__).parent


def write_report(
    rows: Iterable[Measurement],
    file: Path,
    *,
    folder: Path | None = None,
    devices: Sequence[str] | None = None,
) -> Path:
    """Write the page and return its path; the newest row of each set of conditions counts.

    `folder` (default: benchmarks/results) is where ceilings, guidelines, GPU truth and profiles
    lie; the page says of what is not there how to get it. `devices` (default: all) are those that
    its picker has. UsageError where there is no row or the
    file cannot be written, CheckFailed for a damaged file in `folder`.
    """
    require("plotly", purpose="the report", extra="report")
    from plotly.offline import get_plotlyjs

    data = json.dumps(page_data(rows, folder=folder, devices=devices), separators=(",", ":"))
    parts = {
        "style": _text("css"),
        "plotly": get_plotlyjs(),
        "data": data.replace("<", r"\u003c"),  # no text of a row can end the script or open one
        "program": _text("js"),
    }
    # In one pass: what is put in is not looked at again
    page = re.sub(r"@@(\w+)@@", lambda mark: parts[mark[1]], _text("html"))
    try:
        return write_whole(file, page)
    except OSError as error:
        raise UsageError(
            f"{file} cannot be written ({error.strerror}); name another file: --out FILE"
        ) from error


def _text(kind: str) -> str:
    return (_HERE / f"report_page.{kind}").read_text(encoding="utf-8")
