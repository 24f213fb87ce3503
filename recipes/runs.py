"""Where training runs lie: runs/<model>/<time>/ under the working directory."""

from __future__ import annotations

from pathlib import Path

__all__ = ["BEST", "LAST", "RUNS", "last_run"]

RUNS = Path("runs")
BEST, LAST = "best.ckpt", "last.ckpt"


def last_run(model: str = "*") -> Path | None:
    """Return the run folder whose last checkpoint is the newest, None without any run."""
    checkpoints = sorted(RUNS.glob(f"{model}/*/{LAST}"), key=lambda file: file.stat().st_mtime)
    return checkpoints[-1].parent if checkpoints else None
