"""Run the README's commands as a new user would: python tests/run_readme.py README.md.

Bash blocks run whole, Python blocks too; of the plain blocks only `make demo` runs (`make test` is
another part of `make check`, and the other lines need a data set or a device). The hub is a local
one that has the pretrained backbone of the README, with random weights made by timm.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
from hub_server import HubServer
from safetensors.torch import save

from litezoo.models.catalogue import get_spec

BACKBONE = "mobilenetv4_conv_small"


def local_hub() -> HubServer:
    weights = get_spec(BACKBONE).get_weights()
    content = save(timm.create_model(BACKBONE).state_dict())
    return HubServer({f"/{weights.source}/resolve/main/{weights.filename}": content})


def main(readme: str) -> int:
    with tempfile.TemporaryDirectory(prefix="litezoo-readme-") as cache:
        return run_all(readme, cache)


def run_all(readme: str, cache: str) -> int:
    """Run the blocks with this folder as the hub's cache; return the exit status."""
    text = Path(readme).read_text(encoding="utf-8")
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "HF_ENDPOINT": local_hub().endpoint,
        "HF_HOME": cache,
    }
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    commands: list[list[str]] = []
    for language, code in blocks:
        if language == "bash":
            commands.append(["bash", "-euo", "pipefail", "-c", code])
        elif language == "python":
            commands.append([sys.executable, "-c", code])
        elif "make demo" in code:
            commands.append(["make", "demo"])
    if len(commands) < 3:
        print(f"{readme}: found {len(commands)} blocks to run, expected three or more")
        return 1
    for command in commands:
        print(f"$ {command[-1]}", flush=True)
        status = subprocess.run(command, env=environment).returncode
        if status:
            print(f"{readme}: exit status {status} of: {command[-1]}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
