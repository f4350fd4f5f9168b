// The chat: conversations in localStorage, answers streamed from /v1/chat/completions.

import { render } from "./markdown.js";
import { events, failure, headers } from "./sse.js";

const $ = (id) => document.getElementById(id);
const SLIDERS = [
  // name, label, min, max, step, default
  ["temperature", "Temperature", 0, 2, 0.05, 0.8],
  ["top_p", "Top-p", 0.05, 1, 0.01, 0.95],
  ["top_k", "Top-k (0 is off)", 0, 200, 1, 40],
  ["min_p", "Min-p", 0, 0.5, 0.01, 0.05],
  ["repeat_penalty", "Repeat penalty", 1, 1.5, 0.01, 1],
  ["max_tokens", "Most tokens", 16, 4096, 16, 512],
];

function load(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem("airjax." + name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function save(name, value) {
  try {
    localStorage.setItem("airjax." + name, JSON.stringify(value));
  } catch {
    showStatus("the browser's storage is full: delete a conversation", "bad");
  }
}

let conversations = load("conversations", []);
let current = conversations[0] ?? null;
let running = null;
const settings = { system: "", ...Object.fromEntries(SLIDERS.map(([name, , , , , value]) => [name, value])), ...load("settings", {}) };

function showStatus(text, kind) {
  $("status").textContent = text;
  $("status").className = "pill " + (kind ?? "");
}

function turnNode(turn) {
  const node = document.createElement("div");
  node.className = "turn " + turn.role + (turn.error ? " error" : "");
  const text = document.createElement("div");
  text.className = "text";
  if (turn.role === "user") text.textContent = turn.content;
  else text.append(...render(turn.content));
  node.append(text);
  if (turn.note) {
    const note = document.createElement("div");
    note.className = "note";
    note.textContent = turn.note;
    node.append(note);
  }
  return node;
}

function atEnd() {
  const log = $("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < 60;
}

function scrollDown() {
  $("log").scrollTop = $("log").scrollHeight;
}

function drawLog() {
  $("log").replaceChildren(...(current?.turns ?? []).map(turnNode));
  scrollDown();
}

function drawConversations() {
  $("conversations").replaceChildren(
    ...conversations.map((conversation) => {
      const item = document.createElement("li");
      const open = document.createElement("button");
      open.type = "button";
      open.className = "open";
      open.textContent = conversation.title;
      open.setAttribute("aria-current", String(conversation === current));
      open.addEventListener("click", () => select(conversation));
      const remove = document.createElement("button");
      remove.type = "button";
      remove.className = "delete";
      remove.textContent = "×";
      remove.setAttribute("aria-label", "Delete " + conversation.title);
      remove.addEventListener("click", () => {
        if (conversation === current) running?.abort();
        conversations = conversations.filter((each) => each !== conversation);
        save("conversations", conversations);
        if (conversation === current) current = conversations[0] ?? null;
        drawConversations();
        drawLog();
      });
      item.append(open, remove);
      return item;
    }),
  );
}

function select(conversation) {
  running?.abort();
  current = conversation;
  drawConversations();
  drawLog();
  $("input").focus();
}

function setRunning(controller) {
  running = controller;
  $("send").hidden = controller !== null;
  $("stop").hidden = controller === null;
}

function request(turns) {
  const messages = turns.filter((turn) => !turn.error).map(({ role, content }) => ({ role, content }));
  if (settings.system.trim()) messages.unshift({ role: "system", content: settings.system });
  const fields = Object.fromEntries(SLIDERS.map(([name]) => [name, settings[name]]));
  return { messages, stream: true, stream_options: { include_usage: true }, ...fields };
}

async function answer(conversation) {
  const controller = new AbortController();
  setRunning(controller);
  const turn = { role: "assistant", content: "" };
  const body = JSON.stringify(request(conversation.turns));
  conversation.turns.push(turn);
  const node = turnNode(turn);
  node.classList.add("waiting");
  $("log").append(node);
  scrollDown();
  const start = performance.now();
  let first = null;
  let usage = null;
  let finish = "";
  let drawn = 0;
  const text = node.querySelector(".text");
  const draw = () => {
    drawn = 0;
    const follow = atEnd();
    text.replaceChildren(...render(turn.content));
    if (follow) scrollDown();
  };
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json", ...headers() },
      body,
      signal: controller.signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices[0];
      if (choice?.delta.content) {
        first ??= performance.now();
        turn.content += choice.delta.content;
        drawn ||= requestAnimationFrame(draw); // many tokens of one frame are drawn once
      }
      finish = choice?.finish_reason ?? finish;
      usage = chunk.usage ?? usage;
    }
    const seconds = (performance.now() - (first ?? start)) / 1000;
    if (usage) {
      turn.note = `${usage.completion_tokens} tokens, ${(usage.completion_tokens / Math.max(seconds, 0.001)).toFixed(1)} per second`;
      if (first) turn.note += `, first after ${((first - start) / 1000).toFixed(2)} s`;
      if (finish === "length") turn.note += " (cut off at the most tokens)";
    }
  } catch (error) {
    if (error.name === "AbortError") turn.note = "stopped";
    else if (turn.content) turn.note = error.message;
    else Object.assign(turn, { content: error.message, error: true });
  }
  cancelAnimationFrame(drawn);
  if (running === controller) setRunning(null);
  if (!turn.content) conversation.turns.splice(conversation.turns.indexOf(turn), 1);
  if (conversations.includes(conversation)) save("conversations", conversations);
  if (conversation === current) {
    const follow = atEnd();
    if (turn.content) node.replaceWith(turnNode(turn));
    else node.remove();
    if (follow) scrollDown();
  }
}

async function send() {
  const content = $("input").value.trim();
  if (!content || running) return;
  if (!current) {
    current = { title: content.slice(0, 60), turns: [] };
    conversations.unshift(current);
  }
  $("input").value = "";
  grow();
  current.turns.push({ role: "user", content });
  save("conversations", conversations);
  drawConversations();
  drawLog();
  await answer(current);
}

function grow() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = input.scrollHeight + 2 + "px";
}

function drawSliders() {
  $("sliders").replaceChildren(
    ...SLIDERS.map(([name, label, min, max, step]) => {
      const row = document.createElement("label");
      const line = document.createElement("span");
      const output = document.createElement("output");
      const input = document.createElement("input");
      Object.assign(input, { type: "range", id: name, min, max, step, value: settings[name] });
      output.textContent = settings[name];
      input.addEventListener("input", () => {
        settings[name] = Number(input.value);
        output.textContent = input.value;
        save("settings", settings);
      });
      line.append(label, output);
      row.append(line, input);
      return row;
    }),
  );
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
setTheme(load("theme", null) ?? (prefersDark.matches ? "dark" : "light"));
prefersDark.addEventListener("change", () => load("theme", null) ?? setTheme(prefersDark.matches ? "dark" : "light"));
$("theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  save("theme", theme);
  setTheme(theme);
});

$("settings-toggle").addEventListener("click", () => {
  const open = $("settings").hidden;
  $("settings").hidden = !open;
  $("settings-toggle").setAttribute("aria-expanded", String(open));
});
$("system").value = settings.system;
$("system").addEventListener("input", () => {
  settings.system = $("system").value;
  save("settings", settings);
});
$("key").value = localStorage.getItem("airjax.key") ?? "";
$("key").addEventListener("change", () => {
  localStorage.setItem("airjax.key", $("key").value.trim());
  dispatchEvent(new Event("airjax-key"));
});
$("reset").addEventListener("click", () => {
  for (const [name, , , , , value] of SLIDERS) settings[name] = value;
  save("settings", settings);
  drawSliders();
});
$("new").addEventListener("click", () => select(null));
$("stop").addEventListener("click", () => running?.abort());
$("form").addEventListener("submit", (submit) => {
  submit.preventDefault();
  send();
});
$("input").addEventListener("input", grow);
$("input").addEventListener("keydown", (key) => {
  if (key.key === "Enter" && !key.shiftKey && !key.isComposing) {
    key.preventDefault();
    send();
  }
});
addEventListener("keydown", (key) => {
  if (key.key === "Escape" && running) running.abort();
});
addEventListener("airjax-status", (status) => showStatus(status.detail.text, status.detail.kind));

drawSliders();
drawConversations();
drawLog();
$("input").focus();
