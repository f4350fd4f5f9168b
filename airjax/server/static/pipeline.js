// The live pipeline: replays, a moment later, what the engine measured. Nothing here is invented.

import { events, failure, headers } from "./sse.js";

const $ = (id) => document.getElementById(id);
const DELAY_S = 0.3; // events arrive at the end of a beat, so the picture runs behind by more than one
const SHORTEST_S = 0.05; // what is shorter is shown for so long

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const status = (text, kind) => dispatchEvent(new CustomEvent("airjax-status", { detail: { text, kind } }));

let plan = null;
let layers = []; // of each layer: its cell, and its newest events { link, compute } as [start, end]
let slots = [];
let coming = []; // events whose time to be shown has not come
let offset = null; // the page's clock minus the server's, once known
let looked = null;

function build() {
  const streamed = new Set(plan.streamed);
  layers = plan.layer_bytes.map((bytes, number) => {
    const cell = document.createElement("div");
    cell.className = "cell" + (streamed.has(number) ? "" : " resident");
    cell.textContent = number;
    cell.addEventListener("pointerenter", () => (looked = number));
    cell.addEventListener("pointerleave", () => (looked = null));
    return { cell, bytes, streamed: streamed.has(number), state: "", link: null, compute: null };
  });
  $("layers").replaceChildren(...layers.map((layer) => layer.cell));
  $("layers").setAttribute("aria-label", `${plan.layers} layers, ${plan.streamed.length} of them streamed`);
  slots = Array.from({ length: plan.stream_depth }, () => {
    const cell = document.createElement("div");
    cell.className = "cell slot";
    return { cell, state: "" };
  });
  $("slots").replaceChildren(...slots.map((slot) => slot.cell));
  if (!slots.length) $("slots").textContent = "none: every layer is resident";
  $("link-name").textContent = plan.backend === "cpu" ? "read in place GB/s" : "link GB/s";
  const gigabytes = (plan.bytes_per_sweep / 1e9).toFixed(2);
  $("facts").textContent = plan.streamed.length
    ? `${plan.streamed.length} of ${plan.layers} layers pass through ${plan.stream_depth} slots (${plan.tier}), ${gigabytes} GB a sweep.`
    : `All ${plan.layers} layers stay on the device.`;
  coming = [];
  offset = null;
}

function beat(value) {
  const now = performance.now() / 1000 - value.now_s;
  // The quickest delivery tells the clocks' distance best; slowly it may grow, for clocks drift.
  offset = Math.min((offset ?? now) + 0.001, now);
  coming.push(...value.events);
  $("tokens-per-s").textContent = value.tokens_per_s.toFixed(1);
  $("link").textContent = value.link_gb_per_s.toFixed(value.link_gb_per_s < 10 ? 2 : 1);
  $("batch").textContent = value.running + (value.waiting ? ` +${value.waiting}` : "");
  $("batch").title = `${value.running} of ${plan.max_batch} in the sweep, ${value.waiting} waiting`;
  $("sweeps-per-s").textContent = value.sweeps_per_s.toFixed(1);
}

function stateOf(layer, now) {
  const within = (span) => span && now >= span[0] && now < Math.max(span[1], span[0] + SHORTEST_S);
  if (within(layer.compute)) return "computing";
  if (!layer.streamed) return "resident";
  if (within(layer.link)) return "on-link";
  // Arrived, and not computed since then: it lies in its slot, also between requests.
  if (layer.link && now >= layer.link[1] && !(layer.compute && layer.compute[0] >= layer.link[0])) return "in-slot";
  return "";
}

function frame() {
  requestAnimationFrame(frame);
  if (offset === null) return;
  const now = performance.now() / 1000 - offset - DELAY_S;
  const later = [];
  for (const happened of coming) {
    const [lane, first, last, start, end] = happened;
    if (start > now) later.push(happened);
    else for (let number = first; number <= last; number += 1) layers[number][lane] = [start, end];
  }
  coming = later;
  const taken = new Map();
  for (const [number, layer] of layers.entries()) {
    const state = stateOf(layer, now);
    if (state !== layer.state) {
      layer.cell.className = "cell " + state;
      layer.state = state;
    }
    if (layer.streamed && state && slots.length) {
      const slot = plan.streamed.indexOf(number) % slots.length;
      const newest = Math.max(layer.link?.[0] ?? 0, layer.compute?.[0] ?? 0);
      if (newest >= (taken.get(slot)?.newest ?? 0)) taken.set(slot, { number, state, newest });
    }
  }
  slots.forEach((slot, at) => {
    const held = taken.get(at);
    slot.cell.className = "cell slot " + (held?.state ?? "");
    slot.cell.textContent = held ? "layer " + held.number : "";
  });
  describe();
}

const ms = (span) => (span ? Number(((span[1] - span[0]) * 1000).toPrecision(3)) + "\u00a0ms" : "–");

function mean(lane) {
  const spans = layers.map((layer) => layer[lane]).filter(Boolean);
  if (!spans.length) return null;
  return [0, spans.reduce((sum, [start, end]) => sum + end - start, 0) / spans.length];
}

function describe() {
  const layer = looked === null ? null : layers[looked];
  const name = layer ? `Layer ${looked}` : "Mean of a layer";
  const link = layer ? layer.link : mean("link");
  const compute = layer ? layer.compute : mean("compute");
  const size = layer ? `, ${(layer.bytes / 1e6).toFixed(1)} MB` : "";
  const text = link || compute ? `${name}: link ${ms(link)}, compute ${ms(compute)}${size}` : "";
  if ($("detail").textContent !== text) $("detail").textContent = text;
}

async function follow() {
  const answer = await fetch("/v1/pipeline", { headers: headers() });
  if (answer.status === 503) {
    const health = await (await fetch("/health")).json();
    status(health.stage ? `${health.stage}, ${health.elapsed_s} s` : "loading");
    return;
  }
  if (!answer.ok) {
    status(answer.status === 401 ? "needs an API key: Settings" : await failure(answer), "bad");
    return;
  }
  for await (const value of events(answer)) {
    if (value.type === "plan") {
      plan = value;
      build();
      status("ready", "ready");
      $("model").textContent = plan.model;
      document.title = plan.model + " – airjax";
    } else beat(value);
  }
  status("disconnected", "bad");
}

async function run() {
  for (;;) {
    try {
      await follow();
    } catch {
      status("not reachable", "bad");
    }
    await Promise.race([pause(2000), new Promise((resolve) => addEventListener("airjax-key", resolve, { once: true }))]);
  }
}

requestAnimationFrame(frame);
run();
