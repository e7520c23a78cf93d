// Everything that comes from data goes into the page as text, never as HTML.

const POLL_MS = 3000;
const BUNDLES_EVERY = 5; // polls
const WINDOW_S = 600;
const SMOOTH = 5; // intervals that a quantile is taken over
const STAGES = ["receive", "queue", "decode", "encode", "lookup", "run", "serialise", "total"];
const SHOWN_ADS = 100;
const DAY_MS = 86400e3;
const NOT_LIVE = "promoted, not live";

const $ = (id) => document.getElementById(id);
const history = []; // of {at_s, samples}, oldest first
const shown = {}; // what each part shows, so that it is only replaced when it changes
let bundles = null;
let models = null;
let swaps = []; // seen by this page
let nthSample = 0;
let awaySince = null;

// --- building the page

function element(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function drawn(tag, attributes, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) node.setAttribute(name, value);
  node.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

/** Replaces what is in an element, unless `data` is what it shows already. */
function show(id, data, build) {
  const text = JSON.stringify(data);
  if (shown[id] === text) return;
  shown[id] = text;
  $(id).replaceChildren(...[build()].flat());
}

function table(heads, rows, caption) {
  const head = heads.map(([text, kind]) => element("th", { class: kind, scope: "col" }, text));
  const body = rows.map((cells) =>
    element("tr", {}, ...cells.map((cell, i) => element("td", { class: heads[i][1] }, cell))));
  return element("table", caption ? { "aria-label": caption } : {},
    element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body));
}

function bar(share) {
  const inner = element("i");
  inner.style.width = `${(100 * Math.min(Math.max(share, 0), 1)).toFixed(1)}%`;
  return element("div", { class: "bar", "aria-hidden": "true" }, inner);
}

function figure(name, value) {
  return element("span", { class: "soft" }, element("b", {}, value), name);
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const plain = (value) => (isNumber(value) ? value.toLocaleString("en", { maximumSignificantDigits: 3 }) : "–");
const whole = (value) => Math.round(value).toLocaleString("en");
const exact = (value) => (isNumber(value) ? value.toPrecision(4) : "–");
const milliseconds = (value_s) => (isNumber(value_s) ? `${(value_s * 1000).toFixed(value_s < 0.1 ? 2 : 0)} ms` : "–");

function percent(share) {
  if (!isNumber(share)) return "–";
  return `${(100 * share).toFixed(share && Math.abs(share) < 0.1 ? 2 : 1)} %`;
}

function clock(text) {
  const at = new Date(text);
  return Number.isNaN(at.getTime()) ? String(text) : `${at.toISOString().slice(0, 16).replace("T", " ")} UTC`;
}

function ago(text) {
  const minutes = Math.round((Date.now() - new Date(text)) / 60e3);
  if (!(minutes >= 0)) return "";
  if (minutes < 1) return "just now";
  if (minutes < 120) return `${minutes} min ago`;
  return minutes < 2880 ? `${Math.round(minutes / 60)} h ago` : `${Math.round(minutes / 1440)} days ago`;
}

// --- metrics

/** Prometheus' text format as {name: [{labels, value}]}. */
function parseMetrics(text) {
  const samples = {};
  for (const line of text.split("\n")) {
    const found = /^(\w+)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!found) continue;
    const labels = {};
    for (const [, name, value] of (found[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[name] = value.replace(/\\(.)/g, (_, next) => (next === "n" ? "\n" : next));
    }
    (samples[found[1]] ??= []).push({ labels, value: Number(found[3].replace("Inf", "Infinity")) });
  }
  return samples;
}

function total(snapshot, name, wanted = () => true) {
  const found = snapshot?.samples[name] ?? [];
  return found.filter((one) => wanted(one.labels)).reduce((sum, one) => sum + one.value, 0);
}

function grown(from, to, name, wanted) {
  return Math.max(0, total(to, name, wanted) - total(from, name, wanted));
}

/** Seconds below which the share `q` of what came between two snapshots is; linear in a bucket. */
function quantile(from, to, stage, q) {
  const buckets = (to?.samples.ecdctr_stage_seconds_bucket ?? [])
    .filter(({ labels }) => labels.stage === stage)
    .map(({ labels }) => {
      const wanted = (other) => other.stage === stage && other.le === labels.le;
      return [Number(labels.le.replace("+Inf", "Infinity")), grown(from, to, "ecdctr_stage_seconds_bucket", wanted)];
    });
  const rank = q * (buckets.at(-1)?.[1] ?? 0);
  if (!rank) return null;
  let [low, below] = [0, 0];
  for (const [le, num] of buckets) {
    if (num >= rank) return le === Infinity ? low : low + ((le - low) * (rank - below)) / (num - below);
    [low, below] = [le, num];
  }
  return null;
}

const isScore = (labels) => labels.route === "/v1/score";
const isFailed = (labels) => isScore(labels) && labels.status >= "500";
const isRefused = (labels) => isScore(labels) && labels.status >= "400" && labels.status < "500";

function remember(text) {
  const snapshot = { at_s: Date.now() / 1000, samples: parseMetrics(text) };
  const before = history.at(-1);
  const count = (one) => total(one, "ecdctr_requests_total");
  if (before && count(snapshot) < count(before)) history.length = 0; // the service started anew
  history.push(snapshot);
  while (snapshot.at_s - history[0].at_s > WINDOW_S) history.shift();
}

/** A point per interval: what `value(from, to)` gives for it, over `back` intervals. */
function series(value, back = 1) {
  return history.slice(1).map((to, i) => [to.at_s, value(history[Math.max(0, i + 1 - back)], to)]);
}

function rate(name, wanted) {
  return series((from, to) => grown(from, to, name, wanted) / (to.at_s - from.at_s));
}

// --- charts

function chart(id, title, lines, format, note) {
  const place = $(id);
  const [width, height, end_s] = [place.clientWidth, 120, history.at(-1).at_s];
  const minutes = Math.min(WINDOW_S / 60, Math.max(1, Math.ceil((end_s - history[0].at_s) / 60)));
  const most = Math.max(...lines.flatMap(({ points }) => points.map(([, y]) => y ?? 0)), 0) || 1;
  const x = (at_s) => width * (1 - (end_s - at_s) / (60 * minutes));
  const y = (value) => height - 18 - ((height - 34) * value) / most;
  const legend = lines.map(({ name, points }) => figure(name, format(points.at(-1)?.[1])));
  const label = `${title}, last ${minutes} min: ${lines.map((one) => `${one.name} ${format(one.points.at(-1)?.[1])}`).join(", ")}`;
  const paths = lines.flatMap(({ points, kind }, i) => [
    ...(i === 0 ? [drawn("path", { class: "area", d: path(points, x, y, y(0)) })] : []),
    drawn("path", { class: `line ${kind ?? ""}`, d: path(points, x, y) })]);
  place.replaceChildren(
    element("div", { class: "figures" }, ...legend),
    drawn("svg", { height, role: "img", "aria-label": label },
      ...[0, most].map((at) => drawn("line", { class: "grid", x1: 0, x2: width, y1: y(at), y2: y(at) })),
      drawn("text", { x: 0, y: 12 }, format(most)),
      drawn("text", { x: 0, y: height - 2 }, `${minutes} min ago`),
      drawn("text", { x: width, y: height - 2, "text-anchor": "end" }, "now"), ...paths),
    element("figcaption", {}, note));
}

/** Lines through what is there; a null is a gap. With `floor`, closed down to it. */
function path(points, x, y, floor) {
  let [drawing, d, last] = [false, "", 0];
  const close = () => (floor !== undefined && drawing ? `V${floor.toFixed(1)}Z` : "");
  for (const [at_s, value] of points) {
    if (value === null) {
      d += close();
      drawing = false;
      continue;
    }
    last = x(at_s).toFixed(1);
    if (floor !== undefined && !drawing) d += `M${last} ${floor.toFixed(1)}L${last} ${y(value).toFixed(1)}`;
    else d += `${drawing ? "L" : "M"}${last} ${y(value).toFixed(1)}`;
    drawing = true;
  }
  return d + close();
}

function showCharts() {
  const [from, to] = [history[0], history.at(-1)];
  const shed = grown(from, to, "ecdctr_shed_total");
  const num = grown(from, to, "ecdctr_requests_total", isScore);
  const minutes = Math.max(1, Math.round((to.at_s - from.at_s) / 60));
  chart("chart-traffic", "Scoring requests a second", [
    { name: "requests a second", points: rate("ecdctr_requests_total", isScore) },
  ], plain, `${whole(num)} requests, ${whole(grown(from, to, "ecdctr_candidates_sum"))} ads in ${minutes} min`);
  chart("chart-latency", "Latency", [
    { name: "p50", points: series((a, b) => quantile(a, b, "total", 0.5), SMOOTH) },
    { name: "p99", points: series((a, b) => quantile(a, b, "total", 0.99), SMOOTH), kind: "second" },
  ], milliseconds, "whole request, as measured in the service");
  chart("chart-errors", "Errors a second", [
    { name: "5xx a second", points: rate("ecdctr_requests_total", isFailed), kind: "alarm" },
    { name: "4xx a second", points: rate("ecdctr_requests_total", isRefused), kind: "second" },
  ], plain, `${whole(shed)} shed, ${whole(total(to, "ecdctr_score_requests_in_progress"))} in progress`);
}

// --- figures

function showStages() {
  const times = STAGES.map((stage) => [stage, ...[0.5, 0.99].map((q) => quantile(history[0], history.at(-1), stage, q))]);
  const most = Math.max(...times.map(([, , p99]) => p99 ?? 0)) || 1;
  show("stages", times, () => table(
    [["stage"], ["p50", "number"], ["p99", "number"], ["", "bar"]],
    times.map(([stage, p50, p99]) => [stage, milliseconds(p50), milliseconds(p99), bar((p99 ?? 0) / most)]),
    "Time by stage, since the page was opened, at most 10 minutes"));
}

function showStore() {
  const [from, to] = [history[0], history.at(-1)];
  const num = grown(from, to, "ecdctr_requests_total", (one) => isScore(one) && one.status === "200");
  const degraded = (to.samples.ecdctr_degraded_total ?? []).map(({ labels, value }) => {
    const same = (other) => other.what === labels.what && other.reason === labels.reason;
    const share = num ? grown(from, to, "ecdctr_degraded_total", same) / num : 0;
    const what = labels.what === "store" ? "second line instead of the store" : labels.what;
    return [`${what}: ${labels.reason}`, percent(share), whole(value)];
  });
  const rows = (result) => total(to, "ecdctr_item_cache_rows_total", (one) => one.result === result);
  const [hits, misses] = [rows("hit"), rows("miss")];
  const cache = hits + misses
    ? [["item cache, hits", percent(hits / (hits + misses))],
      ["item cache, size", `${plain(total(to, "ecdctr_item_cache_bytes") / 1e6)} MB`]]
    : [["item cache", "not in use"]];
  cache.push(["vectors that are not finite", whole(total(to, "ecdctr_invalid_vectors_total"))]);
  show("store", [degraded, cache], () => [
    degraded.length
      ? table([["degraded: reason"], ["share now", "number"], ["since start", "number"]], degraded)
      : element("p", {}, "No request was degraded."),
    table([["since start"], ["", "number"]], cache)]);
}

function showQuality() {
  const to = history.at(-1);
  const one = (name) => to.samples[name]?.[0]?.value;
  const psi = one("ecdctr_score_psi");
  const missing = (to.samples.ecdctr_missing_share ?? [])
    .filter(({ value }) => value > 0)
    .sort((a, b) => b.value - a.value)
    .slice(0, 6)
    .map(({ labels, value }) => [labels.feature, percent(value)]);
  const feedback = (to.samples.ecdctr_feedback_events ?? []).map(({ labels, value }) => {
    const of = (name) => to.samples[name]?.find((other) => other.labels.model === labels.model)?.value;
    return [labels.model, whole(value), percent(of("ecdctr_feedback_ctr")), plain(of("ecdctr_feedback_pcoc"))];
  });
  const drift = psi === undefined ? "too few scores yet" : `${plain(psi)}${psi > 0.25 ? ", drifted" : ""}`;
  show("quality", [drift, missing, feedback], () => [
    table([["last 10 min"], ["", "number"]], [
      ["score drift (PSI)", element("span", { class: psi > 0.25 ? "bad" : "" }, drift)],
      ...(missing.length ? missing.map(([name, share]) => [`missing: ${name}`, share]) : [["missing inputs", "none"]]),
    ]),
    feedback.length
      ? table([["feedback, last hour", "mono"], ["events", "number"], ["CTR", "number"], ["pred./obs.", "number"]], feedback)
      : table([["feedback, last hour"], ["", "number"]], [["events", "none"]])]);
}

// --- models

function showLive() {
  const live = models.live;
  const serving = (history.at(-1)?.samples.ecdctr_live_model ?? []).filter(({ value }) => value > 0);
  const processes = serving.map(({ labels, value }) => `${value} × ${labels.model}`);
  $("live-id").textContent = live?.id ?? "none";
  const facts = live && [
    ["since", `${clock(live.since)}, ${ago(live.since)}`],
    ["for the day", live.asof],
    ["made", clock(live.created)],
    ["data set", live.dataset],
    ["window", `${live.window.month}-${live.window.build}`],
    ["processes", processes.join(", ") || "–"],
  ];
  const figures = Object.entries(live?.metrics ?? {});
  show("live-metrics", figures, () => figures.map(([name, value]) => figure(name.replaceAll("_", " "), exact(value))));
  show("live-facts", facts, () => (facts ?? []).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
  showLineage(live);
}

function showLineage(live) {
  const width = $("lineage").clientWidth;
  show("lineage", [live?.id, width], () => (live ? lineage(live, width) : []));
}

const date = (text) => Date.parse(`${text}T00:00:00Z`);
const monthEnd = (month) => new Date(Date.UTC(+month.slice(0, 4), +month.slice(5), 1)).getTime();

function lineage({ lineage: from, asof }, width) {
  const months = [...from.tpm_months].sort();
  const tiers = [
    ["TPM", months.map((month) => [date(`${month}-01`), monthEnd(month), month])],
    ["CPM", [[date(from.cpm_from), date(from.cpm_to) + DAY_MS, `${from.cpm_from.slice(5)} to ${from.cpm_to.slice(5)}`]]],
    ["A-CTR", [[date(from.actr_from), date(from.actr_to) + DAY_MS, `${from.actr_from.slice(5)} to ${from.actr_to.slice(5)}`]]],
  ];
  const spans = tiers.flatMap(([, all]) => all);
  const first = Math.min(...spans.map(([start]) => start));
  const last = Math.max(date(asof), ...spans.map(([, end]) => end));
  const x = (at) => 52 + ((width - 54) * (at - first)) / (last - first);
  const label = tiers.map(([name, all]) => `${name} ${all.map(([, , text]) => text).join(", ")}`).join("; ");
  const rows = tiers.flatMap(([name, all], i) => [
    drawn("text", { class: "name", x: 0, y: 21 + 34 * i }, name),
    ...all.flatMap(([start, end, text]) => span(x(start), x(end), 4 + 34 * i, text))]);
  return drawn("svg", { height: 124, role: "img", "aria-label": `Lineage: ${label}; for ${asof}` },
    ...rows, drawn("line", { class: "asof", x1: x(date(asof)), x2: x(date(asof)), y1: 0, y2: 106 }),
    drawn("text", { x: x(date(asof)), y: 120, "text-anchor": "end" }, `for ${asof}`));
}

/** A box with its text inside, or before it where it does not fit. */
function span(left, right, top, text) {
  const fits = right - left > text.length * 7 + 6;
  const at = fits ? { x: (left + right) / 2, "text-anchor": "middle" } : { x: left - 6, "text-anchor": "end" };
  return [drawn("rect", { x: left + 1, y: top, width: Math.max(right - left - 2, 2), height: 25, rx: 2 }),
    drawn("text", { ...at, y: top + 17 }, text)];
}

function showBundles() {
  const { bundles: all, control, num_bundles: num, promoted } = bundles;
  const names = [...new Set(all.flatMap((one) => Object.keys(one.metrics)))].slice(0, 5);
  const heads = [["bundle", "mono"], ["state"], ...names.map((name) => [name.replaceAll("_", " "), "number"])];
  if (control) heads.push(["", "number"]);
  $("control").hidden = !control;
  $("rollback").disabled = !promoted?.previous;
  show("bundles", [all, num, control, models.live?.id, promoted], () => (all.length
    ? [table(heads, all.map((one) => bundleRow(one, names, control, promoted)), "Bundles in the registry"),
      ...(num > all.length ? [element("p", { class: "soft" }, `and ${num - all.length} older ones`)] : [])]
    : [element("p", {}, num === null ? "The registry gives no answer." : "There is no bundle in the registry.")]));
}

function bundleRow(one, names, control, promoted) {
  const isLive = one.id === models.live?.id;
  const state = isLive ? "live" : one.refused.length ? `refused: ${one.refused.join("; ")}`
    : one.id === promoted?.canary?.id ? `canary, ${percent(promoted.canary.share)} of users`
    : one.id === promoted?.shadow?.id ? `shadow, ${percent(promoted.shadow.share)} of users`
    : one.id === promoted?.current ? NOT_LIVE : one.id === promoted?.previous ? "the one before" : "";
  const cells = [one.id, element("span", { class: state.startsWith("refused") || state === NOT_LIVE ? "bad" : "" }, state),
    ...names.map((name) => exact(one.metrics[name]))];
  if (!control) return cells;
  const button = element("button", { type: "button", "aria-label": `Promote ${one.id}` }, "Promote …");
  button.disabled = isLive || one.refused.length > 0;
  button.addEventListener("click", () => ask(`Promote ${one.id}`, "Promote", `v1/models/${encodeURIComponent(one.id)}/promote`));
  return [...cells, button];
}

function showChanges() {
  const { promoted } = bundles ?? {};
  const changes = [
    ...models.refusals.map((one) => [one.at, "Refused", one.bundle ?? "the registry", `${one.kind}: ${one.reason}`]),
    ...swaps.map((one) => [one.at, "Live", one.id, `seen from here; before: ${one.before}`]),
    ...(promoted ? [[promoted.changed_at, "Promoted", promoted.current, promoted.previous ? `before: ${promoted.previous}` : "the first one"]] : []),
  ].sort(([a], [b]) => Date.parse(b) - Date.parse(a));
  show("changes", changes, () => (changes.length
    ? changes.map(([at, what, id, text]) => element("li", {},
      element("span", { class: what === "Refused" ? "bad" : "" }, `${what} `), element("span", { class: "mono" }, id),
      element("div", {}, text), element("div", { class: "soft" }, clock(at))))
    : element("li", {}, "None yet.")));
}

// --- scoring

/** Puts a sample into the form; with `first`, only where nobody has written anything meanwhile. */
async function nextSample(first = false) {
  const answer = await fetch(`console/sample?nth=${nthSample++}`);
  const document_ = await answer.json();
  if (first && $("body").value) return;
  if (answer.ok) $("body").value = pretty(document_.request);
  else showProblem(document_);
}

/** JSON with an object's fields on lines of their own and every list on one. */
function pretty(value, indent = "") {
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  if (Array.isArray(value)) return `[${value.map((one) => pretty(one)).join(", ")}]`;
  const inner = `${indent}  `;
  const fields = Object.entries(value).map(([name, one]) => `${inner}${JSON.stringify(name)}: ${pretty(one, inner)}`);
  return fields.length ? `{\n${fields.join(",\n")}\n${indent}}` : "{}";
}

async function score(event) {
  event.preventDefault();
  let asked;
  try {
    asked = JSON.parse($("body").value);
  } catch (error) {
    showProblem({ title: "The request is not JSON", detail: error.message });
    return;
  }
  try {
    const headers = { "content-type": "application/json" };
    const answer = await fetch("v1/score", { method: "POST", headers, body: $("body").value });
    const document_ = await answer.json();
    if (answer.ok) showScores(asked.candidates.id, document_, answer.headers.get("server-timing") ?? "");
    else showProblem(document_);
  } catch {
    showProblem({ title: "The service does not answer", detail: "" });
  }
}

function showProblem({ title, detail, errors }) {
  const wrong = (errors ?? []).map((one) => element("li", {}, `${one.field}: ${one.value} is not ${one.expected}`));
  $("result").replaceChildren(element("p", { class: "bad" }, title ?? "Failed"),
    wrong.length ? element("ul", {}, ...wrong) : element("p", {}, detail ?? ""));
}

function showScores(ids, { model, scores, degraded, missing }, timing) {
  const ranked = scores.map((value, i) => [ids[i], value]).sort((a, b) => b[1] - a[1]);
  const most = ranked[0]?.[1] || 1;
  const rows = ranked.slice(0, SHOWN_ADS).map(([id, value], i) => [i + 1, id, bar(value / most), percentExact(value)]);
  const lacks = Object.entries(missing).map(([name, num]) => `${name} (${num})`).join(", ") || "nothing";
  const lost = degraded.map((one) => `${one.what} (${one.reason})`).join(", ") || "nothing";
  const stages = [...timing.matchAll(/(\w+);dur=([\d.]+)/g)].map(([, stage, ms]) =>
    element("span", {}, element("span", { class: "soft" }, `${stage} `), `${Number(ms).toFixed(2)} ms`));
  const list = table([["", "number"], ["ad", "mono"], ["", "bar"], ["probability", "number"]], rows, "Ads by score");
  $("result").replaceChildren(
    element("p", {}, `${ids.length} ads scored by `, element("span", { class: "mono" }, model)),
    element("p", {}, element("span", { class: "soft" }, "missing "), lacks),
    element("p", {}, element("span", { class: "soft" }, "degraded "), lost),
    element("p", { class: "stages" }, ...stages),
    element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Ads by score" }, list),
    ...(ranked.length > SHOWN_ADS ? [element("p", { class: "soft" }, `the best ${SHOWN_ADS} of ${ranked.length}`)] : []));
}

const percentExact = (share) => `${(100 * share).toPrecision(3)} %`;

// --- control

function ask(title, verb, address) {
  $("ask-title").textContent = title;
  $("ask-text").textContent = `Live now: ${models?.live?.id ?? "none"}. The token is sent with this request and not kept.`;
  $("confirm").textContent = verb;
  $("answer").textContent = "";
  $("act").dataset.address = address;
  $("ask").showModal();
}

async function act(event) {
  event.preventDefault();
  const headers = { authorization: `Bearer ${$("token").value}` };
  try {
    const answer = await fetch($("act").dataset.address, { method: "POST", headers });
    if (answer.ok) {
      $("ask").close();
      await poll(true);
      return;
    }
    const problem = await answer.json();
    $("answer").textContent = `${problem.title}: ${problem.detail}`;
  } catch {
    $("answer").textContent = "The service does not answer, or the token has signs that no header can carry.";
  }
}

// --- polling

async function json(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`${address}: ${answer.status}`);
  return answer.json();
}

let numPolls = 0;

async function poll(withBundles = numPolls++ % BUNDLES_EVERY === 0) {
  try {
    const [text, now] = await Promise.all([fetch("metrics").then((answer) => answer.text()), json("v1/models")]);
    const before = models?.live?.id;
    models = now;
    const isSwap = before && now.live && now.live.id !== before;
    if (isSwap) swaps = [{ id: now.live.id, before, at: now.live.since }, ...swaps].slice(0, 10);
    if (withBundles || isSwap) bundles = await json("console/bundles");
    remember(text);
    awaySince = null;
  } catch {
    awaySince ??= new Date();
  }
  render();
}

function render() {
  const live = models?.live;
  const state = awaySince ? "away" : live ? "ready" : "empty";
  document.body.dataset.state = state;
  const says = { away: "Service away", ready: "Serving", empty: "Nothing live" }[state];
  if ($("state").textContent !== says) $("state").textContent = says;
  const reason = models?.refusals[0]?.reason;
  const notice = {
    away: `The service has not answered since ${awaySince?.toLocaleTimeString()}. What is shown is from before; trying again.`,
    empty: reason ? `Nothing is live: the current bundle was refused: ${reason}` : "Nothing is live: no bundle has been promoted.",
  }[state] ?? "";
  if ($("notice").textContent !== notice) $("notice").textContent = notice;
  $("notice").hidden = !notice;
  if (!models || !history.length) return;
  showLive();
  showCharts();
  showStages();
  showStore();
  showQuality();
  if (bundles) showBundles();
  showChanges();
}

async function follow() {
  await poll();
  if (models?.live && !$("body").value) await nextSample(true).catch(() => {});
  setTimeout(follow, POLL_MS);
}

$("score").addEventListener("submit", score);
$("sample").addEventListener("click", () => nextSample().catch(() => showProblem({ title: "The service does not answer" })));
$("act").addEventListener("submit", act);
$("cancel").addEventListener("click", () => $("ask").close());
$("ask").addEventListener("close", () => { $("token").value = ""; });
$("rollback").addEventListener("click", () => ask("Roll back", "Roll back", "v1/models/rollback"));
addEventListener("resize", () => { if (history.length) render(); });
follow();
