// The live view: /metrics every two seconds while it is open. Figures are of the last minute; shares and times since the
// server began where it had none.

import { getText } from "./api.js";

const PERIOD_MS = 2000;
const WINDOW = 30; // differences of so many samples

// Sums of samples by name, over models and engines; buckets by name and bound, responses by status.
export function parse(text) {
  const sums = new Map();
  for (const line of text.split("\n")) {
    const found = line.match(/^pace:([a-z0-9_]+)(?:\{(.*)\})? (\S+)$/);
    if (!found) continue;
    const [, name, labels = "", value] = found;
    const key = labels.match(/(?:^|,)(?:le|status)="([^"]*)"/)?.[1];
    const full = key === undefined ? name : `${name} ${key}`;
    sums.set(full, (sums.get(full) ?? 0) + Number(value));
  }
  return sums;
}

// The quantile of a histogram's growth between two samples, by linear interpolation in its bucket; of all without growth.
export function quantile(old, now, name, share) {
  const buckets = [...now].filter(([key]) => key.startsWith(`${name}_bucket `))
    .map(([key, value]) => [Number(key.split(" ")[1].replace("+Inf", "Infinity")), value - (old.get(key) ?? 0)])
    .sort((a, b) => a[0] - b[0]);
  const total = buckets.at(-1)?.[1] ?? 0;
  if (total <= 0) return old.size ? quantile(new Map(), now, name, share) : null;
  let [low, below] = [0, 0];
  for (const [bound, count] of buckets) {
    if (count >= share * total) return bound === Infinity ? low : low + ((bound - low) * (share * total - below)) / (count - below);
    [low, below] = [bound, count];
  }
  return low;
}

const seconds = (s) => (s === null ? "–" : s < 1 ? `${(s * 1000).toFixed(s < 0.01 ? 1 : 0)} ms` : `${s.toFixed(1)} s`);
const percent = (share) => (Number.isFinite(share) ? `${(100 * share).toFixed(0)} %` : "–");
const plain = (n) => (!Number.isFinite(n) ? "–" : n >= 100 ? n.toFixed(0) : n.toFixed(1).replace(/\.0$/, ""));

// A tile's number now, its small print, and what its curve shows: from the sample before, the newest and their difference over the window.
const TILES = [
  { name: "Tokens per second", broad: true, curve: (at) => at.rate("generation_tokens_total"),
    value: (at) => plain(at.rate("generation_tokens_total")), detail: (at) => `prompts: ${plain(at.rate("prompt_tokens_total"))} per second` },
  { name: "Sequences", curve: (at) => at.now("num_requests_running"),
    value: (at) => plain(at.now("num_requests_running")), detail: (at) => `${plain(at.now("num_requests_waiting"))} wait` },
  { name: "KV cache", curve: (at) => at.now("kv_cache_usage_perc"),
    value: (at) => percent(at.now("kv_cache_usage_perc") / at.engines), detail: () => "held" },
  { name: "First token", value: (at) => seconds(at.quantile("time_to_first_token_seconds", 0.5)),
    detail: (at) => `95 %: ${seconds(at.quantile("time_to_first_token_seconds", 0.95))}` },
  { name: "Between tokens", value: (at) => seconds(at.quantile("inter_token_latency_seconds", 0.5)),
    detail: (at) => `95 %: ${seconds(at.quantile("inter_token_latency_seconds", 0.95))}` },
  { name: "Drafts accepted", value: (at) => percent(at.ratio("spec_decode_num_accepted_tokens_total", "spec_decode_num_draft_tokens_total")),
    detail: (at) => `${plain(at.ratio("spec_decode_num_accepted_tokens_total", "spec_decode_num_drafts_total"))} a step` },
  { name: "Prefix cache", value: (at) => percent(at.ratio("prefix_cache_hits_total", "prefix_cache_queries_total")), detail: () => "of tokens found" },
  { name: "Rows of a step", value: (at) => plain(at.ratio("engine_step_rows_total", "engine_steps_total")),
    detail: (at) => `${plain(at.perSecond("engine_steps_total"))} steps per second` },
  { name: "Answers, in all", value: (at) => plain(at.responses(200, 399)), detail: (at) => `${plain(at.responses(400, 599))} refused or failed` },
];

class View {
  constructor(samples) {
    this.samples = samples;
    this.newest = samples.at(-1);
    this.oldest = samples[0];
    this.engines = Math.max(1, this.newest.engines);
  }

  now(name) { return this.newest.sums.get(name) ?? 0; }
  grown(name) { return Math.max(0, this.now(name) - (this.oldest.sums.get(name) ?? 0)); }
  perSecond(name) { return this.samples.length > 1 ? this.grown(name) / (this.newest.time - this.oldest.time) : 0; }

  // Two counters that grow together; where the second has not, both since the server began.
  ratio(part, whole) { return this.grown(whole) ? this.grown(part) / this.grown(whole) : this.now(part) / this.now(whole); }
  quantile(name, share) { return quantile(this.oldest.sums, this.newest.sums, name, share); }

  // Of the last two samples.
  rate(name) { return this.samples.length > 1 ? new View(this.samples.slice(-2)).perSecond(name) : 0; }

  responses(from, to) {
    let n = 0;
    for (const key of this.newest.sums.keys()) {
      const [name, status] = key.split(" ");
      if (name === "http_responses_total" && Number(status) >= from && Number(status) <= to) n += this.now(key);
    }
    return n;
  }
}

function tile({ name, broad, curve }) {
  const element = document.createElement("div");
  element.className = broad ? "tile broad" : "tile";
  const parts = { element };
  for (const [part, kind] of [["name", "h3"], ["value", "div"], ["detail", "div"]]) {
    parts[part] = document.createElement(kind);
    parts[part].className = part;
    element.append(parts[part]);
  }
  parts.name.textContent = name;
  if (curve) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 100 36");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    parts.line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    svg.append(parts.line);
    element.append(svg);
  }
  return parts;
}

export class Metrics {
  constructor(parent, note) {
    this.parent = parent;
    this.note = note;
    this.samples = [];
    this.timer = null;
  }

  open() {
    this.tiles ??= TILES.map(tile);
    this.parent.replaceChildren(...this.tiles.map((parts) => parts.element));
    this.samples = [];
    this.timer = setInterval(() => document.hidden || this.sample(), PERIOD_MS);
    this.sample();
  }

  close() {
    clearInterval(this.timer);
  }

  async sample() {
    try {
      const text = await getText("metrics");
      const engines = text.match(/^pace:num_requests_running\{/gm)?.length ?? 1;
      this.samples.push({ time: performance.now() / 1000, sums: parse(text), engines });
      if (this.samples.length > WINDOW + 1) this.samples.shift();
      this.note.textContent = "Of everybody's requests, over the last minute or, where it had none, since the server began.";
      this.draw();
    } catch (error) {
      this.note.textContent = error.message;
    }
  }

  draw() {
    const views = this.samples.map((_, i) => new View(this.samples.slice(0, i + 1)));
    const view = views.at(-1);
    TILES.forEach((one, i) => {
      const parts = this.tiles[i];
      parts.value.textContent = one.value(view);
      parts.detail.textContent = one.detail(view);
      if (!one.curve) return;
      const heights = views.map(one.curve);
      const top = Math.max(...heights, 1e-9);
      const first = WINDOW - heights.length + 1; // the newest at the right edge
      parts.line.setAttribute("points", heights.map((h, x) => `${((first + x) * 100) / WINDOW},${34 - (32 * h) / top}`).join(" "));
    });
  }
}
