"""Build the wheel, install it into a fresh environment, and use it from outside the checkout.

It lists models, trains on the digits, exports, verifies, loads the engine and measures it, and
draws the results it came with, all in a scratch folder; nothing of the checkout may be imported
there.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import litezoo, litezoo.models, numpy, sys
assert "site-packages" in litezoo.__file__, litezoo.__file__
assert "site-packages" in litezoo.models.__path__[0], litezoo.models.__path__
engine = litezoo.load("artifact")
assert engine(numpy.zeros((3, 1, 32, 32), numpy.float32)).shape == (3, 10)
assert "torch" not in sys.modules
"""


def run(*command: str, cwd: Path) -> None:
    print("$", *command, flush=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run(command, cwd=cwd, env=environment, check=True)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="litezoo-wheel-") as scratch:
        folder = Path(scratch)
        run(sys.executable, "-m", "build", "--wheel", "--outdir", scratch, str(ROOT), cwd=folder)
        (wheel,) = folder.glob("litezoo-*.whl")
        run(sys.executable, "-m", "venv", "venv", cwd=folder)
        pip = [str(folder / "venv/bin/python"), "-m", "pip", "--disable-pip-version-check"]
        run(*pip, "install", "--quiet", f"{wheel}[train,cpu,report]", cwd=folder)
        zoo = str(folder / "venv/bin/litezoo")
        work = folder / "work"
        work.mkdir()
        run(zoo, "list", cwd=work)
        run(zoo, "devices", cwd=work)
        run(zoo, "train", "repvgg_a0", "--trainer.max_epochs", "1", cwd=work)
        words = ("--precision", "fp32", "--out", "artifact")
        run(zoo, "export", "--device", "cpu", *words, cwd=work)
        run(zoo, "verify", "artifact", cwd=work)
        run(zoo, "bench", "artifact", "--batch", "1", "--keep-disturbed", cwd=work)
        (results,) = folder.glob("venv/lib/*/site-packages/litezoo/benchmarks/results/cpu.jsonl")
        run(zoo, "report", str(results), cwd=work)
        run(str(folder / "venv/bin/python"), "-c", SCRIPT, cwd=work)
    print("the wheel works outside the checkout")
    return 0


if __name__ == "__main__":
    sys.exit(main())
