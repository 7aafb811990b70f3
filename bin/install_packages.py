"""install_packages.py FOLDER PYTHON ARGUMENTS: installs packages for an interpreter by uv, which is put into FOLDER.

uv takes a third of pip's time, and a tenth for releases that it has unpacked before. It reads no settings of pip's, so
that it is given those that say where packages are; what it cannot install with them, pip does.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

UV = "uv==0.13.9"

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]

# Bytecode is made for what is imported, when it is: a good part of the time of installing went into what never is. uv
# makes none unless it is asked to.
INSTALL = ["install", "-qq", "--no-compile"]

VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "constraint": "UV_CONSTRAINT",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
}
"""Settings of pip, and the variables that say the same to uv."""

SECTIONS = ("global", "install", ":env:")
"""Where pip's settings stand; what is said in a later one counts."""


def main(folder: Path, python: str, arguments: list[str]) -> int:
    """Installs, and returns the exit status."""
    uv = folder / "bin" / "uv"
    if not uv.exists():
        subprocess.run([*PIP, *INSTALL, "--target", folder, UV], check=False)
    # The newest release that is allowed, wherever it is, as pip takes it.
    variables = settings() | {"UV_INDEX_STRATEGY": "unsafe-best-match"} | os.environ
    command = [uv, "pip", "install", "--quiet", "--no-config", "--python", python, *arguments]
    if uv.exists() and subprocess.run(command, env=variables, check=False).returncode == 0:
        return 0
    print(f"bin/install_packages.py: uv did not install {' '.join(arguments)}; pip does it", file=sys.stderr)
    return subprocess.run([*PIP, "--python", python, *INSTALL, *arguments], check=False).returncode


def settings() -> dict[str, str]:
    """Settings of pip as variables of uv."""
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=True).stdout
    found = {}
    for section in SECTIONS:
        for line in listed.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(f"{section}.") and (setting := name.removeprefix(f"{section}.")) in VARIABLES:
                found[setting] = ast.literal_eval(value).split()
    if "extra-index-url" in found:
        # Of a release's wheels pip takes the one that suits this Python best, uv one of the first place that has any;
        # the further places, which uv asks first, may not have all.
        found["extra-index-url"] = [*found.get("index-url", ["https://pypi.org/simple"]), *found["extra-index-url"]]
    joined = {name: ("," if name == "find-links" else " ").join(said) for name, said in found.items()}
    return {VARIABLES[name]: said for name, said in joined.items() if said}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
