# make demo and make test are all a newcomer needs: both set up .venv by themselves.
PYTHON ?= python3
BIN = .venv/bin
RELEASE = build/release
SIDE_BY_SIDE = -n auto --maxprocesses 8 --dist worksteal

# Where Python is told to keep nothing compiled, each of the many processes compiles everything.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo quick test mypy picture slow cover serve lint bench bench-10m profile torture damage pages full outage oracle fuzz index flow slow-clients dashboard reloads leases shared kills mutations paths clients pins client-pins audit sbom release deploy-check clean

demo: .venv/demo
	$(BIN)/embedding-proxy demo

# The part of the suite that takes less than a minute on two cores: what is slow is named in
# tests/conftest.py.
quick: .venv/test
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow"

test: .venv/test
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

# The same at a quarter of the speed: beside each worker, three loops that do nothing.
CORES = $(shell getconf _NPROCESSORS_ONLN)
slow: .venv/test
	@for loop in $$(seq $$((3 * $(CORES)))); do (while :; do :; done) & loops="$$loops $$!"; done; \
		trap "kill $$loops" EXIT; \
		$(BIN)/python -m pytest -n $(CORES) --dist worksteal

# The part of it that speaks HTTP, without the fast path, and on the loop that the proxy runs on.
paths: .venv/test
	TEST_FAST_PATH=off $(BIN)/python -m pytest $(SIDE_BY_SIDE) tests/proxy tests/security
	TEST_LOOP=uvloop $(BIN)/python -m pytest $(SIDE_BY_SIDE) tests/proxy tests/security

# The suite, and which lines were never run: it takes about twice as long.
cover: .venv/test
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --cov

serve: .venv/demo
	$(BIN)/embedding-proxy serve

lint: mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory audit

# Known vulnerabilities in what is pinned. Where nothing can be installed or asked, it says so and passes.
audit:
	@$(MAKE) --silent $(RELEASE)/done >/dev/null 2>&1 || \
		echo "audit: pip-audit cannot be installed here: nothing was checked"
	@[ ! -e $(RELEASE)/done ] || \
		$(RELEASE)/bin/python tools/audit.py requirements/test.txt requirements/release.txt

# What the image holds, as CycloneDX; and what is released, in dist/. docs/deploy.md tells of both.
sbom: $(RELEASE)/done
	$(RELEASE)/bin/python tools/release.py sbom build/sbom.cdx.json

release: $(RELEASE)/done
	$(RELEASE)/bin/python tools/release.py release

# The files of deploy/, by the tools that read them, as far as the machine has these.
deploy-check:
	$(PYTHON) tools/check_deploy.py

# mypy knows no `__path__`: it is shown the packages inside embedding_proxy/, by links.
mypy: .venv/test
	mkdir -p build/types/embedding_proxy
	ln -sfn $(foreach name,__init__.py __main__.py py.typed,$(CURDIR)/embedding_proxy/$(name)) \
		$(foreach name,proxy index cache providers,$(CURDIR)/$(name)) build/types/embedding_proxy/
	$(BIN)/mypy

# docs/architecture.svg, from the imports.
picture:
	$(PYTHON) tools/draw_architecture.py

# Faults planted in a copy of the tree, one at a time: the tests of each must notice it. FAULTS names some.
FAULTS ?=
mutations: .venv/test
	PYTHONPATH=.:tests:tests/trials $(BIN)/python tests/trials/mutations.py $(FAULTS)

# kill -9 amid writes of two processes, ROUNDS times; the suite runs a few of them.
ROUNDS ?= 2000
SEED ?= 1
torture: .venv/test
	PYTHONPATH=.:tests:tests/trials $(BIN)/python tests/trials/torture.py $(ROUNDS) $(SEED)

# Bits flipped and files cut, in copies of a small store.
FLIPS ?= 10000
CUTS ?= 1000
damage: .venv/test
	PYTHONPATH=.:tests:tests/trials $(BIN)/python tests/trials/damage.py $(FLIPS) $(CUTS) $(SEED)

# One page of the database damaged under two processes, ROUNDS times: what lay on it is lost, no more.
# A round that failed names its seed: make pages ROUNDS=1 SEED=that.
pages: ROUNDS = 1000
pages: .venv/test
	PYTHONPATH=.:tests:tests/trials $(BIN)/python tests/trials/page_damage.py $(ROUNDS) $(SEED)

# A store of SIZE_MIB at its limit, 30 % of it pinned, under a mixed load of two workers for SECONDS,
# beside one that has room: some twelve minutes, and 4 GiB on disk (in BENCH_DIR, if that is set).
SECONDS ?= 600
SIZE_MIB ?= 1024
full: .venv/test
	PYTHONPATH=.:tests:tests/trials $(BIN)/python tests/trials/full_store.py $(SECONDS) $(SIZE_MIB) $(SEED)

# The first provider killed and revived KILLS times under load; then both dead, three ways.
KILLS ?= 100
outage: .venv/test
	PYTHONPATH=.:tests:tests/trials $(BIN)/python tests/trials/outage.py flap $(KILLS)
	PYTHONPATH=.:tests:tests/trials $(BIN)/python tests/trials/outage.py dead 15

# Mixed requests of every form by many clients at once, against an oracle.
REQUESTS ?= 100000
oracle: .venv/test
	PYTHONPATH=.:tests:tests/trials $(BIN)/python tests/trials/oracle.py $(REQUESTS) $(SEED)

# Malformed requests, at the proxy with its fast path and without it: both answer alike, with errors in
# OpenAI's shape.
fuzz: .venv/test
	PYTHONPATH=.:tests:tests/trials $(BIN)/python tests/trials/fuzz.py $(REQUESTS) $(SEED)

# kill -9 amid a migration, MIGRATE_KILLS times, and the same command again; the suite does a few.
MIGRATE_KILLS ?= 20
kills: .venv/test
	PYTHONPATH=.:tests:tests/trials $(BIN)/python tests/trials/migrate_kills.py $(MIGRATE_KILLS) $(SEED)

# Texts indexed while Qdrant is away for a while and the proxy is killed twice; with QDRANT_URL, there.
TEXTS ?= 5000
index: .venv/test
	PYTHONPATH=.:tests:tests/trials $(BIN)/python tests/trials/index_trial.py $(TEXTS)

# Reloads and hand-overs of the port under fifty clients, with two workers: no request may fail.
RELOADS ?= 100
HAND_OVERS ?= 20
reloads: .venv/test
	PYTHONPATH=.:tests:tests/trials $(BIN)/python tests/trials/reload_trial.py \
		--reloads $(RELOADS) --hand-overs $(HAND_OVERS)

# LEASE_TEXTS asked of three nodes that share a Redis, five times each (needs redis-server). Then equal requests
# at once at two and at four workers, LEASE_ROUNDS times with new texts, with LEASE_KILLS of those who buy, and
# at processes of the library. Each text is bought once. Some ten minutes.
LEASE_TEXTS ?= 10000
LEASE_ROUNDS ?= 200
LEASE_KILLS ?= 20
leases: .venv/test
	PYTHONPATH=.:tests:tests/trials $(BIN)/python tests/trials/lease_trial.py \
		--texts $(LEASE_TEXTS) --rounds $(LEASE_ROUNDS) --kills $(LEASE_KILLS)

# Redis under a proxy: CANCELLATIONS of exchanges behind a delaying relay, and every fault for FAULT_SECONDS.
# Needs redis-server.
CANCELLATIONS ?= 10000
FAULT_SECONDS ?= 10
shared: .venv/test
	PYTHONPATH=.:tests:tests/trials $(BIN)/python tests/trials/shared_trial.py cancel $(CANCELLATIONS) $(SEED)
	PYTHONPATH=.:tests:tests/trials $(BIN)/python tests/trials/shared_trial.py faults $(FAULT_SECONDS)

# MEGABYTES passed through the proxy, up and down: how fast, and in how much memory.
MEGABYTES ?= 100
flow: .venv/test
	PYTHONPATH=.:tests:tests/trials $(BIN)/python tests/trials/flow.py $(MEGABYTES)

# CONNECTIONS that send a head or a body one byte a second, or do not read their reply: when each is closed,
# what a healthy client notices, and the memory they take: some three minutes.
CONNECTIONS ?= 1000
slow-clients: .venv/test
	$(BIN)/python -m bench.slow_clients --connections $(CONNECTIONS)

# The dashboard in Chromium, with thirteen months of figures and two workers under a load; axe-core, from npm,
# looks at it. PICTURES is a folder for what is seen; docs/ shows them.
AXE = build/axe/package/axe.min.js
PICTURES ?=
dashboard: .venv/test $(AXE)
	PYTHONPATH=.:tests:tests/trials $(BIN)/python tests/trials/dashboard_trial.py --axe $(AXE) \
		$(if $(PICTURES),--pictures $(PICTURES))

$(AXE):
	mkdir -p build/axe
	cd build/axe && npm pack --silent axe-core@4.14.1 && tar xzf axe-core-4.14.1.tgz

# The libraries that people use, each in an environment of its own, at the upstream and at the proxy: what
# they get, and then how they give up: some ten minutes. Needs go, java and mvn; CLIENTS="node openai-3" tries
# only these.
CLIENTS ?=
clients: .venv/test
	PYTHONPATH=.:tests:tests/trials $(BIN)/python tests/trials/client_trial.py $(CLIENTS)
	PYTHONPATH=.:tests:tests/trials $(BIN)/python tests/trials/client_failures.py $(CLIENTS)

# The figures of this machine against their targets: all of them, or ONLY=T1,T3. ROUNDS=3 is quick and
# rough, PEERS=litellm measures LiteLLM too, RECORD=yes puts a whole run onto the pages.
bench: ROUNDS = 7
bench: .venv/test
	$(BIN)/python -m bench --rounds $(ROUNDS) --only "$(ONLY)" --peers "$(PEERS)" $(if $(RECORD),--record)

# A store of TEN_M small vectors: start, hits, stats, verify, backup, purge and expiry, each with its time
# and memory. RECORD as above.
TEN_M ?= 10000000
bench-10m: .venv/test
	$(BIN)/python -m bench.ten_million $(TEN_M) $(if $(RECORD),--record)

# What 10^6 to 10^9 texts cost on one node and on three, by a simulation of half a minute. SCALE has options, as
# SCALE="--texts 1e8 --nodes 5"; docs/scale.md tells of them. And real nodes beside it, with a Redis: NODES likewise.
.PHONY: scale nodes
scale: .venv/test
	$(BIN)/python -m bench.scale_simulation $(SCALE)
nodes: .venv/test
	$(BIN)/python -m bench.nodes $(NODES)

# Where a hit's processor time goes, part by part; ONLY and RECORD as above.
profile: .venv/test
	$(BIN)/python -m bench.profile --only "$(ONLY)" $(if $(RECORD),--record)

# A .venv that does not run, is too old or not of the PYTHON that was asked for is made anew.
IS_NEW_ENOUGH = -c 'import sys; sys.exit(sys.version_info < (3, 11))'
VERSION = -c 'import platform; print(*platform.python_version_tuple()[:2], sep=".")'
ifneq ($(wildcard .venv),)
STALE := $(shell $(BIN)/python $(IS_NEW_ENOUGH) 2>/dev/null || echo yes)
ifneq ($(origin PYTHON),file)
ifneq ($(shell $(PYTHON) $(VERSION) 2>&1),$(shell $(BIN)/python $(VERSION) 2>&1))
STALE = yes
endif
endif
endif
ifneq ($(STALE),)
.PHONY: .venv/demo
endif

# The checkout is installed as it stands (editable), at the pinned versions, hashes checked.
.venv/demo: requirements/pip.txt requirements/demo.txt pyproject.toml
	@$(PYTHON) $(IS_NEW_ENOUGH) 2>/dev/null || { echo "embedding-proxy needs Python 3.11 or newer," \
		"and $(PYTHON) is $$($(PYTHON) -V 2>&1); try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(if $(STALE),--clear) .venv
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/pip.txt
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/demo.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

.venv/test: requirements/test.txt .venv/demo
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/test.txt
	touch $@

# What audits and releases, in an environment of its own.
$(RELEASE)/done: requirements/pip.txt requirements/release.txt
	$(PYTHON) -m venv --clear $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --require-hashes -r requirements/pip.txt
	$(RELEASE)/bin/python -m pip install --quiet --require-hashes -r requirements/release.txt
	touch $@

# Brings the pins up to date with pyproject.toml and the newest releases; needs uv.
PIN = uv pip compile --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --upgrade \
	--custom-compile-command "make pins" --quiet
pins:
	$(PIN) pyproject.toml --extra all --extra test --extra lint --group build -o requirements/test.txt
	$(PIN) pyproject.toml --extra demo --group build -c requirements/test.txt -o requirements/demo.txt
	$(PIN) --group installer -o requirements/pip.txt
	$(PIN) pyproject.toml --extra local --extra qdrant --extra otel --extra redis -c requirements/test.txt -o requirements/image.txt
	$(PIN) --group build -c requirements/test.txt -o requirements/build.txt
	$(PIN) --group build --group release -c requirements/test.txt -o requirements/release.txt

# The same for the clients that are tried; needs uv, npm, go and mvn. What CI installs has its hashes; go.sum
# and package-lock.json have their own, and for Java every version stands in pom.xml.
CLIENT_PIN = uv pip compile --universal --python-version 3.11 --no-annotate \
	--no-emit-index-url --no-emit-find-links --upgrade \
	--custom-compile-command "make client-pins" --quiet
client-pins:
	cd tests/clients/pins && for name in chroma haystack langchain llama-index; do \
		$(CLIENT_PIN) $$name.in -o $$name.txt || exit 1; done
	cd tests/clients/pins && for name in tools openai-1 openai-2; do \
		$(CLIENT_PIN) --generate-hashes $$name.in -o $$name.txt || exit 1; done
	cd tests/clients/node && npm install --save-exact --ignore-scripts openai@latest ai@latest \
		@langchain/core@latest @langchain/openai@latest \
		@ai-sdk/openai@latest @ai-sdk/openai-compatible@latest
	cd tests/clients/go && go get github.com/openai/openai-go/v3@latest && go mod tidy
	mvn --quiet --batch-mode --file tests/clients/java/pom.xml \
		org.codehaus.mojo:versions-maven-plugin:2.18.0:use-latest-releases \
		-DgenerateBackupPoms=false

clean:
	rm -rf .bench .clients tests/clients/node/node_modules .venv dist build .mypy_cache .pytest_cache \
		.ruff_cache .hypothesis .coverage
