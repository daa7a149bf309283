// What a model wrote, as DOM nodes: made with createElement and text nodes only, so nothing in it can be markup.

const MAX_INLINE = 4000; // a longer line is shown as it is: looking for pairs in it takes the square of its length

function make(name, ...children) {
  const element = document.createElement(name);
  element.append(...children);
  return element;
}

const INLINE = /(`+)([^`]+)\1|\*\*(\S|\S.*?\S)\*\*|\*(\S|\S.*?\S)\*|<(https?:\/\/[^\s<>]+)>|\[([^\]]+)\]\((https?:\/\/[^\s()]+)\)|(https?:\/\/[^\s<>()"'`]*[^\s<>()"'`.,:;!?])/g;

function link(text, href) {
  const element = make("a", text);
  element.href = href; // http or https, by the expression
  element.rel = "noopener noreferrer";
  element.target = "_blank";
  return element;
}

function inline(text) {
  if (text.length > MAX_INLINE) return [text];
  const nodes = [];
  let end = 0;
  for (const found of text.matchAll(INLINE)) {
    const [whole, , code, bold, italic, angled, label, target, bare] = found;
    nodes.push(text.slice(end, found.index));
    if (code !== undefined) nodes.push(make("code", code));
    else if (bold !== undefined) nodes.push(make("strong", ...inline(bold)));
    else if (italic !== undefined) nodes.push(make("em", ...inline(italic)));
    else if (target !== undefined) nodes.push(link(label, target));
    else nodes.push(link(angled ?? bare, angled ?? bare));
    end = found.index + whole.length;
  }
  nodes.push(text.slice(end));
  return nodes;
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^(#{1,6})\s+(.*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)/;
const RULE = /^ {0,3}(-{3,}|\*{3,}|_{3,})\s*$/;
const TABLE = /^\s*\|?(\s*:?-+:?\s*\|)+\s*:?-*:?\s*$/;

function kindOf(line, next) {
  if (!line.trim()) return "blank";
  if (FENCE.test(line)) return "code";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (ITEM.test(line)) return "list";
  if (line.startsWith(">")) return "quote";
  if (line.includes("|") && next !== undefined && TABLE.test(next)) return "table";
  return "text";
}

// Divides text into blocks of {kind, source}; a block's node depends on these two alone.
function blocks(text) {
  const lines = text.split("\n");
  const result = [];
  for (let i = 0; i < lines.length; ) {
    const kind = kindOf(lines[i], lines[i + 1]);
    const first = i++;
    if (kind === "code") {
      const fence = lines[first].match(FENCE)[1];
      while (i < lines.length && !(lines[i].trim().startsWith(fence) && !lines[i].trim().replaceAll(fence[0], ""))) i++;
      i++; // the closing fence, where there is one
    } else if (kind === "table") {
      while (i < lines.length && lines[i].includes("|")) i++;
    } else if (kind === "list") {
      while (i < lines.length && (kindOf(lines[i]) === "list" || /^\s+\S/.test(lines[i]))) i++;
    } else if (kind === "quote" || kind === "text") {
      while (i < lines.length && kindOf(lines[i], lines[i + 1]) === kind) i++;
    }
    if (kind !== "blank") result.push({ kind, source: lines.slice(first, i).join("\n") });
  }
  return result;
}

function codeBlock(source) {
  const lines = source.split("\n");
  const [, fence, language] = lines[0].match(FENCE);
  const last = lines.length > 1 && lines.at(-1).trim().startsWith(fence) ? -1 : lines.length;
  const text = lines.slice(1, last).join("\n");
  const copy = make("button", "Copy");
  copy.type = "button";
  copy.addEventListener("click", () => copyText(text, copy));
  const block = make("div", make("header", make("span", language || "text"), copy), make("pre", make("code", text)));
  block.className = "code";
  return block;
}

function list(source) {
  const root = { indent: -1, node: null, last: null };
  const open = [root];
  for (const line of source.split("\n")) {
    const item = line.match(ITEM);
    if (!item) {
      open.at(-1).last?.append("\n", ...inline(line.trim()));
      continue;
    }
    const [, space, mark, text] = item;
    while (open.at(-1).indent > space.length) open.pop();
    if (open.at(-1).indent < space.length || open.length === 1) {
      if (open.length > 8) open.pop(); // deeper ones stay at this depth
      const ordered = /\d/.test(mark);
      const node = make(ordered ? "ol" : "ul");
      if (ordered) node.start = Number.parseInt(mark, 10);
      const parent = open.at(-1);
      if (parent.last) parent.last.append(node);
      else if (root.node) root.node.append(node);
      else root.node = node;
      open.push({ indent: space.length, node, last: null });
    }
    const level = open.at(-1);
    level.last = make("li", ...inline(text));
    level.node.append(level.last);
  }
  return root.node;
}

function table(source) {
  const rows = source.split("\n").filter((_, i) => i !== 1).map((line) => line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|"));
  return make("table", ...rows.map((cells, i) => make("tr", ...cells.map((cell) => make(i ? "td" : "th", ...inline(cell.trim()))))));
}

function nodeOf({ kind, source }) {
  if (kind === "code") return codeBlock(source);
  if (kind === "list") return list(source);
  if (kind === "table") return table(source);
  if (kind === "rule") return make("hr");
  if (kind === "quote") return make("blockquote", ...inline(source.replaceAll(/^> ?/gm, "")));
  if (kind === "heading") {
    const [, marks, text] = source.match(HEADING);
    return make(`h${Math.min(marks.length + 2, 5)}`, ...inline(text));
  }
  return make("p", ...inline(source));
}

export function copyText(text, button) {
  const before = button.textContent;
  const say = (word) => {
    button.textContent = word;
    setTimeout(() => (button.textContent = before), 1200);
  };
  if (navigator.clipboard) navigator.clipboard.writeText(text).then(() => say("Copied"), () => say("Not allowed"));
  else say("Needs https"); // browsers have no clipboard for pages over plain http, but from this machine
}

// Shows text in `element`, and keeps the nodes of blocks that have not changed: a growing text costs its last block.
export class Prose {
  constructor(element) {
    this.element = element;
    this.shown = [];
  }

  show(text) {
    const wanted = blocks(text);
    let same = 0;
    while (same < this.shown.length && same < wanted.length && this.shown[same].source === wanted[same].source && this.shown[same].kind === wanted[same].kind) same++;
    while (this.element.childNodes.length > same) this.element.lastChild.remove();
    for (const block of wanted.slice(same)) this.element.append(nodeOf(block));
    this.shown = wanted;
  }
}
