"use strict";
/* The page: reads the state, then live events; asks for the key where one is needed. */

const $ = (id) => document.getElementById(id);
const API = new URL("v1", new URL(".", document.baseURI)).href;
const HOUR = 3600, DAY = 86400;
const SPAN_WORDS = { day: "the last 24 hours", week: "the last 7 days", month: "the last 31 days", year: "the last 13 months" };

/* Numbers, as the command line shows them (proxy/cli/formatting.py). */

/* Like toFixed, but a tie goes to the even digit. */
function fixed(value, digits) {
  const exact = value.toFixed(Math.min(100, digits + 40));
  const end = exact.length - (Math.min(100, digits + 40) - digits);
  if (!/^50*$/.test(exact.slice(end))) return value.toFixed(digits);
  const low = exact.slice(0, end);
  return Number(low.at(-1)) % 2 ? value.toFixed(digits) : low;
}

function grouped(digits) {
  return digits.replace(/\B(?=(\d{3})+$)/g, ",");
}

function money(usd) {
  const sign = usd < 0 ? "-" : "";
  usd = Math.abs(usd);
  let digits = 2;
  if (usd > 0 && usd < 0.1) digits = Math.max(2, 1 - Math.floor(Math.log10(usd)));
  const [whole, part] = fixed(usd, digits).split(".");
  return `${sign}$${grouped(whole)}.${part.slice(0, 2)}${part.slice(2).replace(/0+$/, "")}`;
}

function share(part, whole) {
  if (!whole) return "";
  let percent = (100 * part) / whole;
  if (percent > 0 && percent < 100) percent = Math.min(Math.max(percent, 0.1), 99.9);
  return `${fixed(percent, 1)}%`;
}

const count = (number) => grouped(String(Math.round(number)));
const counted = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

function size(bytes) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (bytes < 1000) return unit === "B" ? `${bytes} B` : `${fixed(bytes, 1)} ${unit}`;
    bytes /= 1000;
  }
  return `${fixed(bytes, 1)} TB`;
}

function age(seconds) {
  for (const [unit, length] of [["d", DAY], ["h", HOUR], ["min", 60]]) {
    if (seconds >= 2 * length) return `${Math.round(seconds / length)} ${unit}`;
  }
  return `${Math.max(0, Math.round(seconds))} s`;
}

function compact(number) {
  for (const [unit, length] of [["B", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (number >= length) return `${Number((number / length).toPrecision(3))}${unit}`;
  }
  return String(Number(number.toPrecision(3)));
}

function duration(ms) {
  if (ms === null || ms === undefined) return "–";
  return ms >= 1000 ? `${Number((ms / 1000).toPrecision(3))} s` : `${Number(ms.toPrecision(2))} ms`;
}

const date = (seconds, options) => new Date(seconds * 1000).toLocaleDateString("en-GB", { timeZone: "UTC", ...options });
const clock = (seconds) => new Date(seconds * 1000).toISOString().slice(11, 16);

/* The document. */

function write(id, text) {
  const node = $(id);
  if (node.textContent !== text) node.textContent = text;
}

function show(id, isShown) {
  $(id).hidden = !isShown;
}

function element(name, className, text, ...children) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined && text !== null) node.textContent = text;
  node.append(...children);
  return node;
}

function bar(part, className = "bar") {
  const inside = element("span");
  inside.style.width = `${Math.max(0, Math.min(100, 100 * part))}%`;
  return element("span", className, null, inside);
}

/* Replaces what is in a node only where something has changed, so that focus and selection stay. */
function fill(node, ...children) {
  const next = node.cloneNode(false);
  next.append(...children);
  if (next.innerHTML !== node.innerHTML) node.replaceChildren(...next.childNodes);
}

function legend(id, time, entries) {
  const parts = entries.map(([kind, label, value]) => {
    const one = element("span");
    one.append(element("i", kind), `${label} `, element("b", "", value));
    return one;
  });
  fill($(id), element("time", "", time), ...parts);
}

/* What is told. */

let state = null;
let samples = [];
let history = null;

function renderSaved() {
  const { today, month, ever, since } = state.saved;
  const inUSD = ever.usd_saved > 0 || ever.usd_billed > 0;
  const isEmpty = ever.hits + ever.joins + ever.misses + ever.duplicates === 0;
  show("start", isEmpty);
  for (const id of ["hero", "tiles", "history"]) show(id, !isEmpty);
  if (isEmpty) return renderStart();
  write("hero-label", `Saved since ${date(since, { day: "numeric", month: "long", year: "numeric" })}`);
  const [saved, spent] = inUSD ? [ever.usd_saved, ever.usd_billed] : [ever.tokens_saved, ever.tokens_billed];
  write("hero-figure", inUSD ? money(saved) : `${count(saved)} tokens`);
  $("hero-split").firstElementChild.style.width = `${(100 * saved) / (saved + spent || 1)}%`;
  const without = share(saved, saved + spent) || "0.0%";
  write("hero-hint", inUSD
    ? `${without} of what these texts would have cost without the cache. ${money(spent)} was spent.`
    : `${without} of all tokens. ${count(spent)} were bought.`);
  document.title = `${$("hero-figure").textContent} saved – embedding-proxy`;
  for (const [name, sums] of Object.entries({ today, month, ever })) {
    write(`${name}-usd`, money(sums.usd_saved));
    write(`${name}-tokens`, `${count(sums.tokens_saved)} tokens saved`);
    write(`${name}-rate`, hitRate(sums) ? `${hitRate(sums)} hit rate` : "no requests");
  }
}

function hitRate(sums) {
  const inputs = sums.hits + sums.joins + sums.misses + sums.duplicates;
  return share(inputs - sums.misses, inputs);
}

function renderStart() {
  const key = state.is_open ? "any" : "a-key-of-this-proxy";
  write("code-env", `export OPENAI_BASE_URL=${API}\nexport OPENAI_API_KEY=${key}`);
  write("code-python", `from openai import OpenAI\n\nclient = OpenAI(base_url="${API}", api_key="${key}")\nclient.embeddings.create(model="text-embedding-3-small", input="hello")`);
  write("code-curl", `curl ${API}/embeddings -H "Authorization: Bearer ${key}" -H "Content-Type: application/json" \\\n  -d '{"model": "text-embedding-3-small", "input": "hello"}'`);
}

function renderWarnings() {
  show("warnings", state.warnings.length > 0);
  fill($("warnings-list"), ...state.warnings.map((text) => {
    // What stands between backquotes is code.
    const parts = text.split("`").map((part, i) => (i % 2 ? element("code", "", part) : part));
    return element("li", "", null, ...parts);
  }));
}

function renderNames(id, lines, unnamed) {
  const isShown = lines.some((line) => line.name) && (id === "models" || lines.length > 1 || lines[0].name !== "");
  show(id, isShown);
  if (!isShown) return;
  const inUSD = lines.some((line) => line.ever.usd_saved > 0);
  const worth = (sums) => (inUSD ? sums.usd_saved : sums.tokens_saved);
  const shown = (sums) => (inUSD ? money(sums.usd_saved) : count(sums.tokens_saved));
  const most = Math.max(...lines.map((line) => worth(line.ever)), 1e-12);
  const cell = (text, className) => element("td", className, text);
  fill($(id).querySelector("tbody"), ...lines.map((line) => {
    const name = line.name === null ? `${count(line.names)} others` : line.name || unnamed;
    const head = element("th", "", name, bar(worth(line.ever) / most, "part"));
    head.scope = "row";
    return element("tr", "", null, head, cell(shown(line.ever)), cell(shown(line.month), "more"),
      cell(shown(line.today), "more"), cell(hitRate(line.ever) || "–"), cell(count(line.ever.tokens_saved), "more"));
  }));
}

const STATES = { closed: "up", half_open: "probing", open: "down" };

function renderProviders() {
  show("providers", state.providers.length > 0);
  fill($("providers-list"), ...state.providers.map((one) => {
    const failed = Object.values(one.failures).reduce((sum, number) => sum + number, 0);
    const isResting = one.state === "closed" && one.cooldown_s > 0;
    const word = isResting ? `resting ${age(one.cooldown_s)}` : STATES[one.state];
    const most = Object.entries(one.failures).sort((a, b) => b[1] - a[1])[0];
    const told = failed
      ? `${counted(one.attempts, "call")}, ${share(failed, one.attempts)} failed, mostly ${most[0].replaceAll("_", " ")}`
      : `${counted(one.attempts, "call")}, none failed`;
    return element("li", "", null, element("span", `badge ${isResting ? "rest" : one.state}`, word),
      element("b", "", one.name), element("span", "hint", told));
  }));
  renderTimeline();
}

function renderTimeline() {
  const told = state.failovers;
  show("timeline", told !== null);
  if (told === null) return;
  const lanes = [];
  const names = new Set([...Object.keys(told.failures), ...Object.keys(told.openings)]);
  for (const name of names) {
    const failures = told.failures[name] || [], openings = told.openings[name] || [];
    const sum = total(failures), opened = total(openings);
    const words = `${count(sum)} failed${opened ? `, opened ${count(opened)} ×` : ""}`;
    lanes.push(lane(name, words, told, { failures, openings }));
  }
  for (const [name, counts] of Object.entries(told.failovers)) {
    lanes.push(lane(name, counted(total(counts), "failover"), told, { failovers: counts }));
  }
  const axis = element("p", "axis", null, ...["24 h ago", "12 h ago", "now"].map((text) => element("span", "", text)));
  fill($("lanes"), ...lanes, element("div", "lane", null, axis));
}

const total = (counts) => counts.reduce((sum, number) => sum + number, 0);

function lane(name, words, told, kinds) {
  const SVG = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(SVG, "svg");
  const slots = DAY / told.slot_s;
  svg.setAttribute("viewBox", `0 0 ${slots} 28`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  const happened = [];
  const most = Math.max(...Object.entries(kinds).flatMap(([kind, counts]) => (kind === "openings" ? [] : counts)), 1);
  for (const [kind, counts] of Object.entries(kinds)) {
    counts.forEach((number, slot) => {
      if (!number) return;
      const rect = document.createElementNS(SVG, "rect");
      const height = kind === "openings" ? 28 : 5 + 19 * Math.sqrt(number / most);
      const attributes = { x: slot + (kind === "openings" ? 0 : 0.1), y: 28 - height, width: kind === "openings" ? 0.35 : 0.8, height, class: kind };
      for (const [key, value] of Object.entries(attributes)) rect.setAttribute(key, value);
      const when = clock(told.start + slot * told.slot_s);
      const text = `${when} UTC: ${count(number)} ${kind === "openings" ? "times the circuit opened" : kind}`;
      const title = document.createElementNS(SVG, "title");
      title.textContent = text;
      rect.append(title);
      svg.append(rect);
      happened.push(when);
    });
  }
  svg.setAttribute("aria-label", `${name}: ${words}${happened.length ? `, last at ${happened.sort().at(-1)} UTC` : ""}`);
  return element("div", "lane", null, element("span", "name", name), element("span", "total", words), svg);
}

const PERIODS = { day: "today", month: "this month", ever: "in all" };

function renderBudgets() {
  show("budgets", state.budgets.length > 0);
  fill($("budgets-list"), ...state.budgets.map((one) => {
    const part = one.usd_billed / (one.usd || 1);
    const level = part >= 1 ? "bar over" : part >= 0.8 ? "bar near" : "bar";
    return element("li", "", null, element("b", "", one.client),
      element("span", "hint", `${money(one.usd_billed)} of ${money(one.usd)} ${PERIODS[one.period]}`), bar(part, level));
  }));
}

function facts(id, pairs) {
  fill($(id), ...pairs.flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value)]));
}

function renderStore() {
  const store = state.store, now = Date.now() / 1000;
  show("store", store !== null);
  if (store === null) return;
  const part = store.file_bytes / store.limit_bytes;
  $("store-bar").firstElementChild.style.width = `${Math.min(100, 100 * part)}%`;
  facts("store-facts", [
    ["On disk", `${size(store.file_bytes)} of ${size(store.limit_bytes)}`],
    ["Entries", count(store.entries)],
    ...(store.oldest ? [["Oldest entry", age(now - store.oldest)], ["Longest unused", age(now - store.least_used)]] : []),
    ["Evicted so far", count(store.evictions)],
    ...(store.unwritten ? [["Waiting for the disk", count(store.unwritten)]] : []),
  ]);
}

function renderIndex() {
  const index = state.index;
  show("index", index !== null);
  if (index === null) return;
  facts("index-facts", [
    ["Points that wait", count(index.backlog_points)],
    ["Their size", size(index.backlog_bytes)],
    ["The first has waited", age(index.backlog_age_s)],
    ["Refused by Qdrant", count(index.refused_points)],
  ]);
}

function renderFilters() {
  for (const [id, lines, all] of [["model", state.models, "all models"], ["client", state.clients, "all clients"]]) {
    const names = lines.map((line) => line.name).filter((name) => name);
    const select = $(id);
    const chosen = select.value;
    show(`filter-${id}`, names.length > 1);
    const options = [["", all], ...names.map((name) => [name, name])].map(([value, text]) => {
      const option = element("option", "", text);
      option.value = value;
      return option;
    });
    const known = [...select.options].map((one) => one.value).join("\n");
    if (known !== options.map((one) => one.value).join("\n")) {
      select.replaceChildren(...options);
      select.value = names.includes(chosen) ? chosen : "";
    }
  }
}

function render() {
  show("board", true);
  show("login", false);
  show("foot", true);
  write("version", `embedding-proxy ${state.version}`);
  if (state.saved === null) {
    state.warnings.unshift("The ledger cannot be read now; see the proxy's log");
  } else {
    renderSaved();
    renderNames("models", state.models, "(not known)");
    renderNames("clients", state.clients, "(without a key)");
    $("names").classList.toggle("one", $("models").hidden || $("clients").hidden);
    renderFilters();
    renderBudgets();
  }
  renderWarnings();
  renderProviders();
  renderStore();
  renderIndex();
  if (!charts && !$("history").hidden) makeHistoryChart();
  if (!liveCharts) makeLiveCharts();
}

/* History. */

const FIGURES = {
  usd: {
    entries: [["saved", "saved", "saved"], ["spent", "spent", "billed"]],
    value: (sums, name) => sums[`usd_${name}`] || 0,
    format: money,
    tick: (value) => (value >= 1000 ? `$${compact(value)}` : money(value)),
  },
  tokens: {
    entries: [["saved", "saved", "saved"], ["spent", "bought", "billed"]],
    value: (sums, name) => sums[`tokens_${name}`] || 0,
    format: count,
    tick: compact,
  },
  rate: {
    entries: [["saved", "hit rate", "rate"]],
    value: (sums) => {
      const inputs = sums ? sums.hits + sums.joins + sums.misses + sums.duplicates : 0;
      return inputs ? (100 * (inputs - sums.misses)) / inputs : null;
    },
    format: (value) => (value === null ? "–" : `${fixed(value, 1)}%`),
    tick: (value) => `${value}%`,
  },
};

let charts = null;
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;

function historyRows() {
  const unit = history.unit === "hour" ? HOUR : DAY;
  const sums = new Map(history.points.map((point) => [point[history.unit], point]));
  const rows = [];
  for (let place = history.start; place <= history.end; place++) rows.push([place * unit, sums.get(place) || {}]);
  return rows;
}

function historyWhen(seconds) {
  const day = date(seconds, { weekday: "short", day: "numeric", month: "short" });
  return history.unit === "hour" ? `${day}, ${clock(seconds)}` : day;
}

function makeHistoryChart() {
  charts = { what: null, chart: null };
  if (history) drawHistory();
}

function historyReadout(place) {
  const figure = FIGURES[charts.what];
  const rows = historyRows();
  const all = rows.map(([, sums]) => sums);
  const told = figure.entries.map(([kind, label, name]) => {
    if (place !== null && place < rows.length) return [kind, label, figure.format(figure.value(rows[place][1], name))];
    if (name !== "rate") return [kind, label, figure.format(total(all.map((sums) => figure.value(sums, name))))];
    const sum = {};
    for (const key of ["hits", "joins", "misses", "duplicates"]) sum[key] = total(all.map((sums) => sums[key] || 0));
    return [kind, label, figure.format(figure.value(sum, name))];
  });
  legend("history-legend", place !== null && place < rows.length ? historyWhen(rows[place][0]) : SPAN_WORDS[chosen("span")], told);
  return told;
}

function drawHistory() {
  if (!charts || !history) return;
  const what = chosen("what"), figure = FIGURES[what];
  if (charts.what !== what) {
    if (charts.chart) charts.chart.plot.destroy();
    charts.what = what;
    const bars = what === "rate"
      ? [{ label: "hit rate", color: "saved" }]
      : [{ label: "spent", color: "spent", isBar: true, isFilled: true }, { label: "saved", color: "saved", isBar: true, isFilled: true }];
    charts.chart = Charts.make($("history-chart"), {
      series: bars,
      x: (u, min, max) => {
        const unit = history.unit === "hour" ? HOUR : DAY;
        return min === null ? [0, 1] : [min - unit / 2, max + unit / 2];
      },
      range: what === "rate" ? () => [0, 100] : (u, min, max) => [0, max > 0 ? max * 1.08 : 1],
      y: { format: figure.tick, size: 64 },
      readout: (place) => history && historyReadout(place),
      describe: () => `${$("history-title").textContent}: ${historyReadout(null).map(([, label, value]) => `${label} ${value}`).join(", ")}, ${SPAN_WORDS[chosen("span")]}. Arrow keys read each bar.`,
    });
  }
  const rows = historyRows(), times = rows.map(([seconds]) => seconds);
  const column = (name) => rows.map(([, sums]) => figure.value(sums, name));
  if (what === "rate") {
    charts.chart.set([times, column("rate")]);
  } else {
    const saved = column("saved"), spent = column("billed");
    charts.chart.set([times, saved.map((value, i) => value + spent[i]), saved]);
  }
}

function historyQuery() {
  const query = new URLSearchParams({ span: chosen("span") });
  for (const name of ["model", "client"]) if ($(name).value) query.set(name, $(name).value);
  return query;
}

let historyAsked = 0;

async function loadHistory() {
  const number = ++historyAsked, query = historyQuery();
  $("csv").href = `dashboard/history.csv?${query}`;
  const response = await fetch(`dashboard/history?${query}`);
  if (!response.ok || number !== historyAsked) return;
  history = await response.json();
  drawHistory();
}

/* Live. */

let liveCharts = null;

function makeLiveCharts() {
  const now = () => (samples.length ? samples.at(-1).t : Date.now() / 1000);
  const x = () => [now() - 300, now()];
  const at = (place) => samples[place === null ? samples.length - 1 : place];
  const when = (place) => (place === null ? "now" : samples[place] ? new Date(samples[place].t * 1000).toISOString().slice(11, 19) : "");
  const rateOf = (sample, name) => (sample ? compact(sample[name]) : "–");
  const rateEntries = (place) => {
    const failures = samples.some((sample) => sample.failures_a_s > 0);
    return [["hit", "hits", rateOf(at(place), "hits_a_s")], ["miss", "misses", rateOf(at(place), "misses_a_s")],
      ...(failures ? [["bad", "errors", rateOf(at(place), "failures_a_s")]] : [])];
  };
  const latencyEntries = (place) => {
    const pair = (name) => {
      const ms = at(place) ? at(place)[name] : [null, null];
      return `${duration(ms[0])} · ${duration(ms[1])}`;
    };
    return [["hit", "hit", pair("hit_ms")], ["miss", "miss", pair("miss_ms")]];
  };
  const words = (entries) => entries.map(([, label, value]) => `${label} ${value}`).join(", ");
  liveCharts = {
    rate: Charts.make($("rate-chart"), {
      series: [{ label: "hits", color: "hit" }, { label: "misses", color: "miss" }, { label: "errors", color: "bad" }],
      x,
      range: (u, min, max) => [0, Math.max(1, (max || 0) * 1.1)],
      y: { format: compact, size: 44 },
      readout: (place) => legend("rate-legend", when(place), rateEntries(place)),
      describe: () => `Requests a second: ${words(rateEntries(null))}`,
    }),
    latency: Charts.make($("latency-chart"), {
      series: [{ label: "hit", color: "hit" }, { label: "hit p95", color: "hit", dash: [4, 4] },
        { label: "miss", color: "miss" }, { label: "miss p95", color: "miss", dash: [4, 4] }],
      x,
      range: (u, min, max) => (min === null ? [0.1, 1000] : [Math.min(0.1, 10 ** Math.floor(Math.log10(min))), Math.max(1000, 10 ** Math.ceil(Math.log10(max)))]),
      y: { format: duration, size: 56, scale: { distr: 3 } },
      readout: (place) => legend("latency-legend", when(place), latencyEntries(place)),
      describe: () => `Latency: ${words(latencyEntries(null))}`,
    }),
  };
  drawLive();
}

function drawLive() {
  if (!liveCharts) return;
  const times = samples.map((sample) => sample.t);
  const column = (read) => samples.map(read);
  const positive = (ms) => (ms ? ms : null);
  liveCharts.rate.set([times, column((one) => one.hits_a_s), column((one) => one.misses_a_s),
    column((one) => (one.failures_a_s ? one.failures_a_s : null))]);
  liveCharts.latency.set([times, ...["hit_ms", "miss_ms"].flatMap((name) => [0, 1].map((i) => column((one) => positive(one[name][i]))))]);
}

/* Where it all comes from. */

let source = null;
let historyAt = 0;

function setLive(isOn, text) {
  $("live").classList.toggle("on", isOn);
  write("live", text);
}

function listen() {
  source = new EventSource("dashboard/events");
  source.addEventListener("open", () => setLive(true, "live"));
  source.addEventListener("state", (event) => {
    state = JSON.parse(event.data);
    render();
    if (Date.now() - historyAt > 4000) {
      historyAt = Date.now();
      loadHistory();
    }
  });
  source.addEventListener("samples", (event) => {
    // After a new connection the first ones may be known.
    const newest = samples.length ? samples.at(-1).t : 0;
    samples = samples.concat(JSON.parse(event.data).filter((one) => one.t > newest)).slice(-300);
    drawLive();
  });
  source.addEventListener("error", () => {
    setLive(false, "connecting");
    if (source.readyState === EventSource.CLOSED) setTimeout(begin, 2000);
  });
}

async function begin() {
  let response;
  try {
    response = await fetch("dashboard/state");
  } catch {
    setLive(false, "the proxy does not answer");
    setTimeout(begin, 2000);
    return;
  }
  if (response.status === 401 || response.status === 403) {
    setLive(false, "");
    show("board", false);
    show("foot", false);
    show("logout", false);
    show("login", true);
    $("key").focus();
    return;
  }
  if (!response.ok) {
    setTimeout(begin, 2000);
    return;
  }
  state = await response.json();
  show("logout", state.has_session);
  historyAt = Date.now();
  await loadHistory();
  render();
  listen();
}

$("login-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  write("login-error", "");
  let message = "The proxy does not answer.";
  try {
    const headers = { "Content-Type": "application/json" };
    const response = await fetch("dashboard/login", { method: "POST", headers, body: JSON.stringify({ key: $("key").value }) });
    if (response.ok) {
      $("key").value = "";
      await begin();
      return;
    }
    message = (await response.json()).error.message;
  } catch { /* The message stays. */ }
  write("login-error", message);
  $("key").select();
});

$("logout").addEventListener("click", async () => {
  if (source) source.close();
  await fetch("dashboard/logout", { method: "POST" });
  location.reload();
});

for (const id of ["span", "model", "client"]) $(id).addEventListener("change", loadHistory);
$("what").addEventListener("change", drawHistory);

$("png").addEventListener("click", () => {
  const told = historyReadout(null);
  const names = ["model", "client"].map((id) => $(id).value).filter((name) => name);
  Charts.savePNG(charts.chart, {
    title: charts.what === "rate" ? `${told[0][2]} hit rate` : `${told[0][2]}${charts.what === "tokens" ? " tokens" : ""} saved`,
    subtitle: ["embedding-proxy", SPAN_WORDS[chosen("span")], ...names].join(" · "),
    legend: told.map(([kind, label]) => ({ label, color: kind })),
    name: `embedding-proxy-${chosen("span")}.png`,
  });
});

for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const text = $(button.dataset.copy).textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Without TLS there is no clipboard: what is selected can be copied by hand.
      getSelection().selectAllChildren($(button.dataset.copy));
      return;
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

begin();
