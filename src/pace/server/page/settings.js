// The settings panel: the parameters of a request, each left to the server where its field is empty.

import { loadSettings, saveSettings } from "./store.js";

const number = (label, options = {}) => ({ label, type: "number", step: "any", ...options });

const FIELDS = {
  system: { label: "System prompt", type: "textarea" },
  temperature: number("Temperature", { min: 0, step: 0.1 }),
  max_tokens: number("Most tokens", { min: 1, step: 1 }),
  top_p: number("Top p", { min: 0, max: 1, step: 0.05 }),
  top_k: number("Top k", { min: -1, step: 1 }),
  min_p: number("Min p", { min: 0, max: 1, step: 0.01 }),
  seed: number("Seed", { step: 1 }),
  repetition_penalty: number("Repetition penalty", { min: 0, step: 0.05 }),
  frequency_penalty: number("Frequency penalty", { min: -2, max: 2, step: 0.1 }),
  presence_penalty: number("Presence penalty", { min: -2, max: 2, step: 0.1 }),
  thinking: { label: "Thinking", type: "select", options: { "": "default", on: "on", off: "off" } },
  speculative: { label: "Speculation", type: "select", options: { "": "default", off: "off" } },
  stop: { label: "Stop strings, one a line", type: "textarea" },
};

const values = loadSettings();

// The fields of a request.
export function parameters() {
  const result = {};
  for (const [name, field] of Object.entries(FIELDS)) {
    if (field.type === "number" && values[name]) result[name] = Number(values[name]);
  }
  const stop = (values.stop ?? "").split("\n").filter(Boolean);
  if (stop.length) result.stop = stop;
  if (values.speculative) result.speculative = values.speculative;
  if (values.thinking) result.chat_template_kwargs = { enable_thinking: values.thinking === "on" };
  return result;
}

export const systemPrompt = () => values.system?.trim() ?? "";

function control(name, field) {
  const element = document.createElement(field.type === "number" ? "input" : field.type);
  if (field.type === "select") {
    for (const [value, text] of Object.entries(field.options)) element.add(new Option(text, value));
  } else if (field.type === "number") {
    Object.assign(element, { type: "number", inputMode: "decimal", placeholder: "default" });
    for (const bound of ["min", "max", "step"]) if (field[bound] !== undefined) element[bound] = field[bound];
  }
  element.id = `set-${name}`;
  element.value = values[name] ?? "";
  element.addEventListener("input", () => {
    if (element.value === "") delete values[name];
    else values[name] = element.value;
    saveSettings(values);
  });
  return element;
}

export function showFields(parent) {
  parent.replaceChildren(...Object.entries(FIELDS).map(([name, field]) => {
    const label = document.createElement("label");
    label.append(field.label, control(name, field));
    label.classList.toggle("wide", field.type === "textarea");
    return label;
  }));
}

export function resetFields(parent) {
  for (const name of Object.keys(values)) delete values[name];
  saveSettings(values);
  showFields(parent);
}
