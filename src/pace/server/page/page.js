// The conversation: what is asked, the answer as it comes, and the keys.

import { ApiError, chat as askChat, getJson, key } from "./api.js";
import { Prose, copyText } from "./markdown.js";
import { Metrics } from "./metrics.js";
import { parameters, resetFields, showFields, systemPrompt } from "./settings.js";
import { deleteChat, loadChats, newChat, saveChat, titleOf } from "./store.js";

const $ = (id) => document.getElementById(id);
const SAVE_MS = 1000; // how often a growing answer is kept
const HEALTH_MS = 5000;

let model = "";
let chats = loadChats();
let chat = chats[0] ?? newChat();
let running = null; // the AbortController of the answer that is being written
const metrics = new Metrics($("tiles"), $("metrics-note"));

// ---- messages --------------------------------------------------------------------------------------------

function make(name, className, ...children) {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

function action(text, title, run) {
  const button = make("button", "", text);
  button.type = "button";
  button.title = title;
  button.addEventListener("click", () => run(button));
  return button;
}

function statsOf({ stats, finish }) {
  if (!stats) return finish === "stopped" ? "stopped" : "";
  const words = [`${stats.tokens} token${stats.tokens === 1 ? "" : "s"}`];
  if (stats.seconds > 0 && stats.tokens > 1) words.push(`${((stats.tokens - 1) / stats.seconds).toFixed(1)} tokens/s`);
  words.push(`first after ${stats.first.toFixed(2)} s`);
  const drafts = stats.speculative;
  if (drafts?.n_draft_tokens) {
    const share = ((100 * drafts.n_accepted_tokens) / drafts.n_draft_tokens).toFixed(0);
    words.push(`${share} % of drafts accepted, ${(drafts.n_tokens / drafts.n_rounds).toFixed(1)} tokens a step`);
  }
  if (finish === "stopped") words.push("stopped");
  if (finish === "length") words.push("ended by its limit");
  return words.join(" · ");
}

class Shown {
  // A message on the page.
  constructor(message) {
    this.message = message;
    this.element = make("article", `message ${message.role}`);
    this.element.setAttribute("aria-label", message.role === "user" ? "You" : "Answer");
    this.text = make("div", message.role === "user" ? "text" : "text prose");
    this.stats = make("span", "stats");
    this.error = make("div", "error");
    this.error.setAttribute("role", "alert");
    this.actions = make("footer");
    if (message.role === "user") {
      this.element.append(this.text, this.actions);
    } else {
      this.thoughts = make("div", "prose");
      this.reasoning = make("details", "reasoning", make("summary"), this.thoughts);
      this.prose = new Prose(this.text);
      this.thoughtProse = new Prose(this.thoughts);
      this.element.append(this.reasoning, this.text, this.error, this.actions);
    }
    this.update(false);
  }

  update(isRunning) {
    const { message } = this;
    const buttons = [];
    if (message.role === "user") {
      this.text.textContent = message.content;
      buttons.push(action("Edit", "Change it, and ask again", () => edit(message)));
    } else {
      const isThinking = isRunning && !message.content;
      this.prose.show(message.content);
      this.reasoning.hidden = !message.reasoning;
      this.reasoning.firstChild.textContent = isThinking ? "Thinking…" : "Thoughts";
      this.thoughtProse.show(message.reasoning ?? "");
      this.error.hidden = !message.error;
      this.error.textContent = message.error ?? "";
      this.element.classList.toggle("waiting", isRunning);
      this.stats.textContent = statsOf(message);
      if (!isRunning) {
        if (message.content) buttons.push(action("Copy", "Copy the answer", (button) => copyText(message.content, button)));
        if (message === chat.messages.at(-1)) buttons.push(action("Regenerate", "Answer again (Alt+R)", regenerate));
      }
      buttons.push(this.stats);
    }
    this.actions.replaceChildren(...buttons);
  }
}

let shown = [];

function showChat() {
  shown = chat.messages.map((message) => new Shown(message));
  $("messages").replaceChildren(...shown.map((one) => one.element));
  $("empty").hidden = chat.messages.length > 0;
  $("log").scrollTop = $("log").scrollHeight;
  showList();
}

function showList() {
  const kept = chats.includes(chat) ? chats : [chat, ...chats];
  $("chats").replaceChildren(...kept.map((one) => new Option(titleOf(one), one.id, false, one === chat)));
  $("delete").disabled = !chat.messages.length;
}

function isAtEnd() {
  const log = $("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < 60;
}

function keep(one) {
  if (!chats.includes(one)) chats.unshift(one);
  one.time = Date.now();
  saveChat(one);
}

// ---- asking ----------------------------------------------------------------------------------------------

function request(messages) {
  const system = systemPrompt();
  const told = messages.filter((m) => m.role === "user" || m.content).map(({ role, content }) => ({ role, content }));
  return { ...(model && { model }), messages: system ? [{ role: "system", content: system }, ...told] : told, ...parameters() };
}

// Takes a chunk into the message.
function take(message, chunk, times) {
  const delta = chunk.choices[0]?.delta ?? {};
  message.content += delta.content ?? "";
  if (delta.reasoning_content) message.reasoning = (message.reasoning ?? "") + delta.reasoning_content;
  message.finish = chunk.choices[0]?.finish_reason ?? message.finish;
  const tokens = chunk.usage?.completion_tokens ?? 0;
  if (!tokens) return;
  const now = performance.now();
  times.first ??= now;
  if (tokens > (message.stats?.tokens ?? 0)) times.last = now;
  message.stats = {
    tokens, first: (times.first - times.start) / 1000, seconds: (times.last - times.first) / 1000,
    speculative: chunk.speculative ?? message.stats?.speculative,
  };
}

async function answer() {
  if (running) return;
  const mine = chat; // the reader may look at another one meanwhile
  const asked = request(mine.messages);
  const message = { role: "assistant", content: "" };
  mine.messages.push(message);
  showChat();
  const view = shown.at(-1);
  const controller = (running = new AbortController());
  showRunning();
  let frame = 0;
  let kept = performance.now();
  const draw = () => {
    frame = 0;
    const follow = isAtEnd();
    view.update(running === controller);
    if (follow && chat === mine) $("log").scrollTop = $("log").scrollHeight;
  };
  const times = { start: performance.now(), first: null, last: null };
  try {
    view.update(true);
    for await (const chunk of askChat(asked, controller.signal)) {
      take(message, chunk, times);
      frame ||= requestAnimationFrame(draw);
      if (performance.now() - kept > SAVE_MS) {
        keep(mine);
        kept = performance.now();
      }
    }
  } catch (error) {
    if (error.name === "AbortError") message.finish = "stopped";
    else message.error = error instanceof ApiError ? error.message : String(error);
    if (error.status === 401) askForKey(true);
  } finally {
    cancelAnimationFrame(frame);
    running = null;
    if (chats.includes(mine) || mine === chat) keep(mine); // unless it was deleted
    draw();
    showRunning();
    showList();
  }
}

function send() {
  const text = $("input").value.trim();
  if (!text || running) return;
  $("input").value = "";
  fit();
  chat.messages.push({ role: "user", content: text });
  keep(chat);
  answer();
}

function regenerate() {
  if (running || chat.messages.at(-1)?.role !== "assistant") return;
  chat.messages.pop();
  answer();
}

function edit(message) {
  if (running) return;
  chat.messages.splice(chat.messages.indexOf(message));
  showChat();
  $("input").value = message.content;
  fit();
  $("input").focus();
}

const stop = () => running?.abort();

function showRunning() {
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  $("log").setAttribute("aria-busy", String(running !== null));
}

// ---- the frame -------------------------------------------------------------------------------------------

function open(id) {
  for (const name of ["settings", "metrics"]) {
    const isOpen = name === id && $(name).hidden;
    if (name === "metrics" && isOpen !== !$(name).hidden) metrics[isOpen ? "open" : "close"]();
    $(name).hidden = !isOpen;
    $(`show-${name}`).setAttribute("aria-expanded", String(isOpen));
  }
  if (id && !$(id).hidden) $(id).querySelector("input, select, textarea, button").focus();
  else $("input").focus();
}

function choose(one) {
  stop();
  chat = one;
  showChat();
  $("input").focus();
}

function fit() {
  const input = $("input");
  input.style.height = "auto"; // through the object model: the policy forbids style attributes in markup only
  input.style.height = `${input.scrollHeight}px`;
}

function askForKey(wasWrong) {
  if ($("key-dialog").open) return;
  const isWrong = wasWrong && key.get();
  $("key-note").textContent = `${isWrong ? "The server does not know this key." : "This server asks for a key."} It is kept until this tab is closed.`;
  $("key").value = "";
  $("key-dialog").showModal();
}

async function look() {
  let [state, title] = ["ok", "ready"];
  try {
    await getJson("health/ready");
    if (!model) {
      model = (await getJson("v1/models")).data[0].id;
      $("model").textContent = $("state").title = model;
      document.title = `${model} · pace`;
    }
  } catch (error) {
    if (error.status === 401) {
      askForKey(key.get() !== "");
      title = "a key is needed";
      state = "wait";
    } else {
      title = error.message;
      state = error.status === 503 ? "wait" : "bad";
    }
  }
  $("state").dataset.state = state;
  $("state").title = model ? `${model}: ${title}` : title;
}

function nextTheme() {
  const root = document.documentElement;
  const next = { undefined: "dark", dark: "light", light: "" }[root.dataset.theme];
  if (next) root.dataset.theme = next;
  else delete root.dataset.theme;
  try {
    localStorage.setItem("pace.theme", next);
  } catch {
    // it holds until the page is left
  }
}

function startTheme() {
  try {
    const theme = localStorage.getItem("pace.theme");
    if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
  } catch {
    // as the system
  }
}

const SHORTCUTS = {
  KeyN: () => choose(newChat()),
  KeyR: regenerate,
  KeyS: () => open("settings"),
  KeyM: () => open("metrics"),
};

function onKey(event) {
  const isTyping = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if (event.altKey && !event.ctrlKey && !event.metaKey && SHORTCUTS[event.code]) {
    event.preventDefault();
    SHORTCUTS[event.code]();
  } else if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (running) stop();
    else if (!$("settings").hidden || !$("metrics").hidden) open(null);
  } else if (!isTyping && !event.ctrlKey && !event.metaKey && event.key === "/") {
    event.preventDefault();
    $("input").focus();
  } else if (!isTyping && event.key === "?") {
    $("help-dialog").showModal();
  }
}

function start() {
  startTheme();
  showFields($("fields"));
  showChat();
  showRunning();
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("input").addEventListener("input", fit);
  $("input").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  $("stop").addEventListener("click", stop);
  $("new").addEventListener("click", SHORTCUTS.KeyN);
  $("delete").addEventListener("click", () => {
    deleteChat(chat);
    chats = chats.filter((one) => one !== chat);
    choose(chats[0] ?? newChat());
  });
  $("chats").addEventListener("change", (event) => choose(chats.find((one) => one.id === event.target.value) ?? chat));
  $("show-settings").addEventListener("click", SHORTCUTS.KeyS);
  $("show-metrics").addEventListener("click", SHORTCUTS.KeyM);
  $("theme").addEventListener("click", nextTheme);
  $("show-help").addEventListener("click", () => $("help-dialog").showModal());
  $("reset").addEventListener("click", () => resetFields($("fields")));
  for (const button of document.querySelectorAll("aside .close")) button.addEventListener("click", () => open(null));
  for (const button of document.querySelectorAll("dialog .close")) button.addEventListener("click", () => button.closest("dialog").close());
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key.set($("key").value.trim());
    $("key-dialog").close();
    look();
  });
  document.addEventListener("keydown", onKey);
  addEventListener("pagehide", () => chat.messages.length && keep(chat));
  look();
  setInterval(() => document.hidden || $("key-dialog").open || look(), HEALTH_MS);
  $("input").focus();
}

start();
