"""deploy/: what can be held without the tools that read it (`make deploy-check` runs those)."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from embedding_proxy.proxy.config.loader import load
from fault_server import status
from pages import ROOT
from qdrant_server import QdrantServer

sys.path.insert(0, str(ROOT / "tools"))
import audit
import release

sys.path.remove(str(ROOT / "tools"))

DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "embedding-proxy"
MONITORING = DEPLOY / "monitoring"
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file() and path.name != ".env")
CONFIGURATIONS = (
    "docker/config.yaml",
    "compose/config.yaml",
    "compose/nodes-config.yaml",
    "systemd/config.yaml",
)
KEYS = {
    "CLIENT_KEY": "client-key",
    "METRICS_KEY": "metrics-key",
    "QDRANT_API_KEY": "qdrant-key",
    "VALKEY_PASSWORD": "valkey-password",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCKERFILE = (DEPLOY / "docker" / "Dockerfile").read_text(encoding="utf-8")
UNIT = (DEPLOY / "systemd" / "embedding-proxy.service").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text(encoding="utf-8"))
NODES = yaml.safe_load((DEPLOY / "compose" / "nodes.yaml").read_text(encoding="utf-8"))
BALANCER = (DEPLOY / "compose" / "nodes-nginx.conf").read_text(encoding="utf-8")
SERVICES = {**COMPOSE["services"], **NODES["services"]}
VALUES = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
VALUES_OF_NODES = yaml.safe_load((CHART / "values-nodes.yaml").read_text(encoding="utf-8"))
STATEFUL_SET = (CHART / "templates" / "statefulset.yaml").read_text(encoding="utf-8")
RULES = yaml.safe_load((MONITORING / "alerts.yml").read_text(encoding="utf-8"))
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))
METRIC = re.compile(r"\bembedding_proxy_(\w+)")
STORAGE = (ROOT / "docs" / "storage.md").read_text(encoding="utf-8")
PATIENCE_S = int(re.search(r"supervisor should wait\s+(\d+)\s+seconds", STORAGE)[1])
MODEL = {"space": "s/m", "dimensions": 8, "routes": [{"provider": "openai", "model": "m"}]}


@pytest.fixture(autouse=True)
def _variables(monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


def _settings(name, tmp_path):
    """Return the settings of a configuration of deploy/, as the product's own loader reads them."""
    if not name.startswith("helm"):
        return load(DEPLOY / name)
    values = VALUES if name == "helm" else _merge(VALUES, VALUES_OF_NODES)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values["config"]))
    return load(file)


def _merge(below, above):
    """Lay values over others, as helm does."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {name: _merge(below.get(name), value) for name, value in above.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(DEPLOY).as_posix())
def test_yaml_and_json_are_read_and_nothing_is_said_that_is_not_for_all(path):
    """No host of a registry, no key, no folder of a user."""
    text = path.read_text(encoding="utf-8")
    if path.suffix in {".yaml", ".yml"} and path.parent.name != "templates":
        assert yaml.safe_load(text)
    if path.suffix == ".json":
        assert json.loads(text)
    hosts = r"docker\.io|ghcr\.io|gcr\.io|quay\.io|pypi|npmjs|registry\.|/home/|/root|/tmp/w"
    assert re.findall(hosts, text) == []
    assert re.findall(r"\bsk-\w+|BEGIN [A-Z ]*PRIVATE KEY", text) == []
    for name, value in re.findall(r"^([A-Z_]*(?:KEY|PASSWORD))=(.*)$", text, re.MULTILINE):
        assert value == "", name


def test_every_image_is_pinned():
    """By a tag that is no moving one; our own is that of the version."""
    images = [entry["image"] for entry in SERVICES.values()]
    images += re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert len(images) > 7
    assert [image for image in images if not re.search(r":v?\d+\.\d+[\w.-]*$", image)] == []
    version = PROJECT["version"]
    assert f"embedding-proxy:{version}" in images
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == version
    assert f"embedding_proxy-{version}-py3-none-any.whl" in PAGE


@pytest.mark.parametrize("name", [*CONFIGURATIONS, "helm", "helm of nodes"])
def test_every_configuration_loads_and_fits_what_is_around_it(name, tmp_path):
    """The product's loader takes it: folder, port, keys of clients and of Prometheus."""
    settings = _settings(name, tmp_path)
    assert [(one.key, one.admin) for one in settings.server.keys] == [
        (KEYS["CLIENT_KEY"], False),
        (KEYS["METRICS_KEY"], True),
    ]
    # A folder of the proxy's own below the volume, which others may make and own.
    assert settings.cache.directory == Path("/var/lib/embedding-proxy/cache")
    assert settings.server.port == 8080
    in_container = name != "systemd/config.yaml"
    assert settings.server.host == ("0.0.0.0" if in_container else "127.0.0.1")


@pytest.mark.parametrize("name", ["compose/nodes-config.yaml", "helm of nodes"])
def test_nodes_share_one_tier_behind_one_address(name, tmp_path):
    """All have the same tier, whose password stands in no file, and take all clients from one."""
    settings = _settings(name, tmp_path)
    shared = settings.cache.shared
    assert (shared.url, shared.password_env) == ("redis://valkey:6379", "VALKEY_PASSWORD")
    assert settings.server.max_connections_per_address == settings.server.max_connections
    assert settings.server.drain_s > 0


def test_three_nodes_differ_by_their_disk_alone():
    """Each has a volume of its own, is one of the balancer's servers, and stops in good order."""
    services = NODES["services"]
    nodes = {name: one for name, one in services.items() if name.startswith("proxy-")}
    assert len(nodes) == VALUES_OF_NODES["replicas"] == 3
    assert re.findall(r"server (proxy-\d):8080 max_fails=1", BALANCER) == list(nodes)
    assert services["nginx"]["depends_on"] == list(nodes)
    for name, node in nodes.items():
        volume, config = node["volumes"]
        assert volume == f"{name}:/var/lib/embedding-proxy"
        assert config.startswith("./nodes-config.yaml:")
        assert "ports" not in node
        same = {key: value for key, value in node.items() if key not in ("hostname", "volumes")}
        assert same == NODES["x-proxy"]
    assert NODES["volumes"].keys() == nodes.keys()
    # A cache that is full drops what was used longest ago; by default it would refuse to write.
    command = services["valkey"]["command"][-1]
    assert "--maxmemory-policy allkeys-lru" in command
    assert '--save "" --appendonly no' in command
    # In the place of the shell, which would keep SIGTERM to itself; the password is no argument.
    assert command.startswith("exec valkey-server - ")
    assert command.splitlines()[1:] == ["requirepass $$VALKEY_PASSWORD", "END"]


def test_the_balancer_sends_nothing_twice():
    """It hands on what a reverse proxy does, but tries the next node where none has heard it."""
    site = (DEPLOY / "nginx" / "embedding-proxy.conf").read_text(encoding="utf-8")

    def directives(text):
        kept = re.sub(r"^ *#.*\n", "", text, flags=re.MULTILINE)
        return {" ".join(one.split()) for one in re.findall(r"proxy_[a-z_]+ +[^;{}]+;", kept)}

    changed = {"proxy_connect_timeout 5s;", "proxy_next_upstream off;"}
    assert changed < directives(site)
    assert directives(site) - changed <= directives(BALANCER)
    assert "proxy_next_upstream error;" in directives(BALANCER)
    assert "non_idempotent;" not in BALANCER


def test_ports_agree():
    """Who listens, who publishes, who calls, who probes."""
    services = COMPOSE["services"]
    assert NODES["services"]["nginx"]["ports"] == ["127.0.0.1:8080:8080"]
    assert "listen 8080;" in BALANCER
    assert services["proxy"]["ports"] == ["127.0.0.1:8080:8080"]
    scraped = yaml.safe_load((MONITORING / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = scraped["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["proxy:8080"]}]
    assert "EXPOSE 8080\n" in DOCKERFILE
    assert "('127.0.0.1', 8080, timeout=4)" in DOCKERFILE
    for name in ("nginx/embedding-proxy.conf", "caddy/Caddyfile"):
        assert "127.0.0.1:8080" in (DEPLOY / name).read_text(encoding="utf-8")
    source = yaml.safe_load((MONITORING / "grafana-datasource.yml").read_text(encoding="utf-8"))
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    qdrant = load(DEPLOY / "compose" / "config.yaml").index.qdrant
    assert qdrant.url == "http://qdrant:6333"
    assert "containerPort: {{ .Values.config.server.port }}" in STATEFUL_SET
    assert all(
        port.startswith("127.0.0.1:") for one in SERVICES.values() for port in one.get("ports", ())
    )


def test_nothing_is_killed_before_its_time_is_up():
    """Each supervisor waits for longer than the proxy takes to stop."""
    waits = {
        "systemd": int(re.search(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)[1]),
        "compose": int(COMPOSE["services"]["proxy"]["stop_grace_period"].removesuffix("s")),
        "nodes": int(NODES["x-proxy"]["stop_grace_period"].removesuffix("s")),
        "docker": int(re.search(r"--stop-timeout (\d+)", PAGE)[1]),
        "helm": VALUES["terminationGracePeriodSeconds"] - VALUES["preStopSeconds"],
    }
    assert {name: wait for name, wait in waits.items() if wait < PATIENCE_S} == {}


def test_a_reverse_proxy_is_more_patient_than_the_proxy(tmp_path):
    """Who gives up first is the proxy, which says why; and it sees bodies that are too large."""
    settings = _settings("systemd/config.yaml", tmp_path)
    longest = max(settings.server.request_timeout_s, settings.passthrough_idle_timeout_s)
    for name in ("nginx/embedding-proxy.conf", "caddy/Caddyfile", "compose/nodes-nginx.conf"):
        text = (DEPLOY / name).read_text(encoding="utf-8")
        assert int(re.search(r"read_timeout\s+(\d+)s", text)[1]) > longest
        size = int(re.search(r"(?:client_max_body_size|max_size)\s+(\d+)", text)[1])
        assert size > settings.server.max_body_mib
    assert settings.server.max_connections_per_address == settings.server.max_connections


def test_there_is_room_for_the_cache():
    """The volume holds a damaged file beside the one that takes its place."""
    size = int(VALUES["persistence"]["size"].removesuffix("Gi"))
    assert size > 2 * VALUES["config"]["cache"]["size_limit_gib"]


def test_the_container_may_do_little():
    """User, root, capabilities: alike in the image, in compose and in the chart."""
    for proxy in (COMPOSE["services"]["proxy"], NODES["x-proxy"]):
        assert (proxy["read_only"], proxy["cap_drop"]) == (True, ["ALL"])
    assert "\nUSER 10001:10001\n" in DOCKERFILE
    for line in (
        "runAsUser: 10001",
        "readOnlyRootFilesystem: true",
        "capabilities: {drop: [ALL]}",
        "allowPrivilegeEscalation: false",
        "automountServiceAccountToken: false",
    ):
        assert line in STATEFUL_SET
    # Without a folder for temporary files SQLite cannot write, and all is bought again.
    assert "SQLITE_TMPDIR=/var/lib/embedding-proxy " in DOCKERFILE
    assert "VOLUME /var/lib/embedding-proxy\n" in DOCKERFILE
    for service in SERVICES.values():
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]


def test_the_image_holds_what_the_package_needs():
    """requirements/image.txt pins each dependency, at the version that the tests run with."""

    def pinned(name):
        text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
        return set(re.findall(r"^([a-z0-9.-]+)==(\S+)", text, re.MULTILINE))

    extras = PROJECT["optional-dependencies"]
    needed = [*PROJECT["dependencies"], *extras["local"], *extras["qdrant"], *extras["redis"]]
    names = {re.match(r"[A-Za-z0-9.-]+", one)[0].lower() for one in needed}
    assert names <= {name for name, _ in pinned("image.txt")}
    assert pinned("image.txt") <= pinned("test.txt")


def test_the_context_of_the_image_has_what_is_copied():
    """What the Dockerfile copies is there, and .dockerignore lets it through."""
    ignore = (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text(encoding="utf-8")
    lines = re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
    copied = [name for line in lines for name in line.split()[:-1]]
    assert len(copied) > 10
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}\n" in ignore or name.startswith("requirements/")


def _queries():
    for group in RULES["groups"]:
        yield from (rule["expr"] for rule in group["rules"])
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (one["query"]["query"] for one in DASHBOARD["templating"]["list"][1:])


async def test_every_metric_that_is_asked_for_is_exported(upstream, start_proxy):
    """Alerts and dashboard name metrics and labels of /metrics, which docs/metrics.md tells."""
    upstream.widths = {"m": 8}
    upstream.always = upstream.altered(lambda reply: reply.update(model="another"))
    async with QdrantServer() as qdrant:
        sections = {"models": {"m": MODEL}, "index": {"qdrant": {"url": qdrant.url}}}
        proxy = await start_proxy(openai=upstream, **sections)
        for text, found in (("a", 200), ("b", 402)):
            assert (await proxy.post({"model": "m", "input": text})).status == found
            upstream.script.append(status(402))
        await proxy.service.drift_check.check()
        async with proxy.http.get(proxy.url.removesuffix("/v1") + "/metrics") as response:
            exported = await response.text()
        await start_proxy.stop()
    types = set(re.findall(r"# TYPE embedding_proxy_(\w+) ", exported))
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| \w+ \| (.*?) \|", page, re.MULTILINE))
    of_prometheus = {"job", "instance", "le", "worker"}
    asked = set()
    for query in _queries():
        for name, matchers in re.findall(r"embedding_proxy_(\w+)(?:\{(.*?)\})?", query):
            base = name if name in rows else re.sub(r"_(bucket|sum|count)$", "", name)
            asked.add(base)
            labels = set(re.findall(r"(\w+)\s*(?:=~?|!=)", matchers))
            assert labels <= {*re.findall(r"\w+", rows[base]), *of_prometheus}, query
    assert len(asked) > 15
    assert asked <= types
    assert asked <= rows.keys()


def test_the_dashboard_stands_where_it_is_provisioned():
    """Panels have ids of their own, do not overlap, and ask the datasource that is chosen."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert all(panel["targets"] for panel in panels if panel["type"] != "row")
    volumes = "\n".join(COMPOSE["services"]["grafana"]["volumes"])
    provided = yaml.safe_load((MONITORING / "grafana-dashboards.yml").read_text(encoding="utf-8"))
    assert f":{provided['providers'][0]['options']['path']}/embedding-proxy.json:ro" in volumes
    for entry in SERVICES.values():
        for volume in entry.get("volumes", ()):
            if volume.startswith("."):
                assert (DEPLOY / "compose" / volume.partition(":")[0]).exists()


def test_every_alert_is_told_with_a_remedy_and_tested():
    """docs/deploy.md has each, and the tests of promtool raise each."""
    alerts = [rule["alert"] for group in RULES["groups"] for rule in group["rules"]]
    raised = (MONITORING / "alerts_test.yml").read_text(encoding="utf-8")
    assert len(alerts) == len(set(alerts)) > 8
    assert [name for name in alerts if f"`{name}`" not in PAGE] == []
    assert [name for name in alerts if name not in raised] == []


def test_the_chart_has_the_same_alerts_and_dashboard():
    """They are links, which helm follows: there is one of each."""
    for name in ("alerts.yml", "dashboard.json"):
        assert (CHART / "files" / name).resolve() == MONITORING / name


def test_every_value_of_the_chart_is_in_its_schema_and_used():
    """A value that no template reads would do nothing, and one that the schema lacks is refused."""
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    assert schema["properties"].keys() - {"global"} == VALUES.keys()
    templates = "".join(
        file.read_text(encoding="utf-8") for file in (CHART / "templates").iterdir()
    )
    for name, value in VALUES.items():
        below = schema["properties"][name].get("properties", {})
        if schema["properties"][name].get("additionalProperties") is False:
            assert below.keys() == value.keys()
            assert all(f".Values.{name}.{key}" in templates for key in value)
        else:
            assert f".Values.{name}" in templates


def test_the_page_tells_of_every_folder():
    """Each folder of deploy/ has its row."""
    folders = {path.relative_to(DEPLOY).parts[0] for path in FILES}
    assert [name for name in folders if f"`deploy/{name}" not in PAGE] == []


def _pip_audit(monkeypatch, **replies):
    """Let pip-audit say this of each database; one that is not named cannot be reached."""
    asked = []

    def run(command, **_):
        service = command[command.index("--vulnerability-service") + 1]
        asked.append(service)
        packages = replies.get(service)
        out = "" if packages is None else json.dumps({"dependencies": packages, "fixes": []})
        return SimpleNamespace(stdout=out, returncode=1)

    monkeypatch.setattr(audit.subprocess, "run", run)
    return asked


CLEAN = {"name": "a", "version": "1", "vulns": []}
UNKNOWN = {"name": "b", "skip_reason": "Dependency not found on PyPI"}


def _vulnerable(number, *aliases):
    one = {"id": number, "aliases": [*aliases], "fix_versions": ["2"], "description": ""}
    return {"name": "c", "version": "1", "vulns": [one]}


def test_the_audit_fails_for_a_vulnerability_alone(monkeypatch, capsys):
    """The line names package, number and the release that mends it."""
    _pip_audit(monkeypatch, pypi=[CLEAN, _vulnerable("PYSEC-1", "CVE-1")])
    assert audit.main(["r.txt"]) == 1
    assert "audit: c 1: PYSEC-1 CVE-1; mended in 2" in capsys.readouterr().out


def test_the_audit_accepts_what_does_not_reach_the_proxy(monkeypatch, capsys):
    """By number or by alias; SECURITY.md says why."""
    security = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for number in audit.ACCEPTED:
        assert number in security
        _pip_audit(monkeypatch, pypi=[_vulnerable("PYSEC-2", number), UNKNOWN])
        assert audit.main(["r.txt"]) == 0
    assert "1 packages checked, 1 not in the database" in capsys.readouterr().out


def test_an_audit_that_asked_nobody_says_so(monkeypatch, capsys):
    """A database that knows nothing of any package is none; the next one is asked."""
    asked = _pip_audit(monkeypatch, pypi=[UNKNOWN])
    assert audit.main(["r.txt"]) == 0
    assert asked == ["pypi", "osv"]
    assert "nothing was checked" in capsys.readouterr().out
    _pip_audit(monkeypatch, pypi=[UNKNOWN], osv=[_vulnerable("GHSA-1")])
    assert audit.main(["r.txt"]) == 1


def test_the_statement_of_provenance_holds_the_digests(tmp_path):
    """What a signer attests: the files as sha256sum sees them, and the commit."""
    file = tmp_path / "a.whl"
    file.write_bytes(b"wheel")
    statement = release.provenance(ROOT, [file], "0" * 40)
    summed = subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True)
    assert statement["subject"] == [
        {"name": "a.whl", "digest": {"sha256": summed.stdout.split()[0]}}
    ]
    sources = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert sources[0]["digest"] == {"gitCommit": "0" * 40}
    assert {source["name"] for source in sources} > {"requirements/image.txt"}
