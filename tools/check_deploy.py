"""Show the files of deploy/ to the tools that read them: `make deploy-check`.

Each tool is run where the machine has it, and is named where it has not. Nothing is started, and no
network is asked. `tests/test_deploy.py` holds what needs no tool.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
CHART = str(DEPLOY / "helm" / "embedding-proxy")
MONITORING = DEPLOY / "monitoring"
UNIT = "embedding-proxy.service"
KUBERNETES = "1.34.0"
MAX_EXPOSURE = 20
"""Of the unit, by `systemd-analyze security`: tenths of its points, of 100."""


class Check(NamedTuple):
    """A tool and what it is given; `{scratch}` is a folder of its own."""

    tool: str
    arguments: str


CHECKS = (
    Check("hadolint", f"{DEPLOY}/docker/Dockerfile"),
    *(
        check
        for name in ("compose.yaml", "nodes.yaml")
        for check in (
            Check("docker", f"compose -f {DEPLOY}/compose/{name} config --quiet"),
            Check("docker-compose", f"-f {DEPLOY}/compose/{name} config --quiet"),
        )
    ),
    Check("helm", f"lint --strict {CHART}"),
    Check("helm", f"template r {CHART} --kube-version {KUBERNETES}"),
    Check(
        "helm",
        f"template r {CHART} --kube-version {KUBERNETES} --set"
        " serviceMonitor.enabled=true,prometheusRule.enabled=true,dashboard.enabled=true",
    ),
    Check(
        "helm",
        f"template r {CHART} --kube-version {KUBERNETES} --values {CHART}/values-nodes.yaml",
    ),
    Check("promtool", f"check rules {MONITORING}/alerts.yml"),
    Check("promtool", f"test rules {MONITORING}/alerts_test.yml"),
    Check("promtool", f"check config --syntax-only {MONITORING}/prometheus.yml"),
    Check("caddy", f"validate --adapter caddyfile --config {DEPLOY}/caddy/Caddyfile"),
    Check("nginx", "-t -q -c {scratch}/nginx.conf"),
    Check("nginx", "-t -q -c {scratch}/nodes.conf"),
    Check("systemd-analyze", f"verify {{scratch}}/{UNIT}"),
    Check(
        "systemd-analyze",
        f"security --offline=true --threshold={MAX_EXPOSURE} {{scratch}}/{UNIT}",
    ),
)
VARIABLES = (
    "CLIENT_KEY",
    "METRICS_KEY",
    "QDRANT_API_KEY",
    "GRAFANA_PASSWORD",
    "VALKEY_PASSWORD",
)
"""Which the files for Compose ask for."""


def main() -> int:
    """Run all checks; return the exit code."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        prepare(scratch)
        for check in CHECKS:
            why = run(check, scratch)
            failed += bool(why)
            told = "not here" if why is None else why or "ok"
            print(f"{check.tool}: {told}")
    return 1 if failed else 0


def run(check: Check, scratch: Path) -> str | None:
    """Return what a tool has against its file, empty if it has nothing; None without the tool."""
    tool = shutil.which(check.tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if tool is None or (check.tool == "docker" and not _has_compose(tool)):
        return None
    command = [tool, *check.arguments.format(scratch=scratch).split()]
    environ = {**os.environ, **dict.fromkeys(VARIABLES, "x"), "HOME": str(scratch)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    # systemd only warns of a key that it does not know.
    is_refused = done.returncode or f"/{UNIT}:" in done.stderr
    return f"exit code {done.returncode}\n{done.stdout}{done.stderr}" if is_refused else ""


def _has_compose(docker: str) -> bool:
    asked = [docker, "compose", "version"]
    return subprocess.run(asked, capture_output=True, check=False).returncode == 0


def prepare(scratch: Path) -> None:
    """Write what stands around a snippet: nginx's own file, a certificate, the unit's command."""
    certificate = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x"]
    certificate += ["-keyout", f"{scratch}/key.pem", "-out", f"{scratch}/cert.pem"]
    if shutil.which("openssl"):
        subprocess.run(certificate, capture_output=True, check=True)
    site = (DEPLOY / "nginx" / "embedding-proxy.conf").read_text(encoding="utf-8")
    for name, file in (("embedding-proxy.crt", "cert.pem"), ("embedding-proxy.key", "key.pem")):
        site = site.replace(f"/etc/nginx/tls/{name}", f"{scratch}/{file}")
    (scratch / "site.conf").write_text(site, encoding="utf-8")
    places = "".join(
        f"{name}_temp_path {scratch}/{name}; "
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (scratch / "nginx.conf").write_text(
        f"pid {scratch}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; {places} include {scratch}/site.conf; }}\n",
        encoding="utf-8",
    )
    # The names of nodes are known inside Compose alone.
    balancer = (DEPLOY / "compose" / "nodes-nginx.conf").read_text(encoding="utf-8")
    balancer = re.sub(r"proxy-\d:", "127.0.0.1:", balancer).replace(" /tmp/", f" {scratch}/")
    (scratch / "nodes.conf").write_text(balancer, encoding="utf-8")
    # `verify` wants the command to be there.
    unit = (DEPLOY / "systemd" / UNIT).read_text(encoding="utf-8")
    unit = unit.replace("/opt/embedding-proxy/bin/embedding-proxy", sys.executable)
    (scratch / UNIT).write_text(unit, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
