"""Known vulnerabilities in what is pinned: `make audit`, a part of `make lint`.

pip-audit asks a database for each package of the requirements files that are given: PyPI's, and
OSV's where PyPI's answers for none. Where neither can be reached, one line says so, and the exit
code is 0: a machine without a network can still lint.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

SERVICES = ("pypi", "osv")
TIMEOUT_S = 180
ACCEPTED = {
    # diskcache unpickles rows, and has no release that does not. The store refuses such rows.
    "CVE-2025-69872",
}
"""Vulnerabilities that do not reach the proxy, each with the reason."""


def main(files: list[str]) -> int:
    """Audit requirements files; return the exit code."""
    for service in SERVICES:
        found = _ask(service, files)
        known = [one for one in found if "vulns" in one]
        if known:
            return _report(service, known, len(found) - len(known))
    print("audit: no database of vulnerabilities can be reached here: nothing was checked")
    return 0


def _ask(service: str, files: Iterable[str]) -> list[dict[str, Any]]:
    """Return what a database says of each package; nothing if it cannot be asked."""
    command = [sys.executable, "-m", "pip_audit", "--vulnerability-service", service]
    command += ["--format", "json", "--progress-spinner", "off"]
    command += ["--require-hashes", "--disable-pip"]
    for file in files:
        command += ["--requirement", file]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError):
        return []
    return packages


def _report(service: str, packages: list[dict[str, Any]], unknown: int) -> int:
    mistakes = sorted(_vulnerabilities(packages))
    for line in mistakes:
        print(f"audit: {line}")
    print(
        f"audit: {service}: {len(packages)} packages checked, {unknown} not in the database,"
        f" {len(mistakes)} vulnerabilities"
    )
    return 1 if mistakes else 0


def _vulnerabilities(packages: Iterable[dict[str, Any]]) -> Iterator[str]:
    for package in packages:
        for one in package["vulns"]:
            names = [one["id"], *one.get("aliases", ())]
            if ACCEPTED.isdisjoint(names):
                fixed = ", ".join(one.get("fix_versions", ())) or "no release"
                yield (
                    f"{package['name']} {package['version']}: {' '.join(names)}; mended in {fixed}"
                )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
