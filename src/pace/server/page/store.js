// Conversations and settings in this browser. Each conversation has an entry of its own, so that two tabs keep each other's.

const CHAT = "pace.chat.";
const SETTINGS = "pace.settings";

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null; // no storage, or somebody else's entry
  }
}

export function newChat() {
  return { id: `${Date.now()}-${Math.random().toString(36).slice(2, 8)}`, time: Date.now(), messages: [] };
}

function isChat(chat) {
  return typeof chat?.id === "string" && typeof chat.time === "number" && Array.isArray(chat.messages)
    && chat.messages.every((m) => (m?.role === "user" || m?.role === "assistant") && typeof m.content === "string");
}

// All of them, the newest first.
export function loadChats() {
  try {
    const names = Object.keys(localStorage).filter((name) => name.startsWith(CHAT));
    return names.map(read).filter(isChat).sort((a, b) => b.time - a.time);
  } catch {
    return [];
  }
}

// Keeps a conversation; where the browser's space is full, the oldest others make room. False where it can't be kept.
export function saveChat(chat) {
  for (;;) {
    try {
      localStorage.setItem(CHAT + chat.id, JSON.stringify(chat));
      return true;
    } catch {
      const oldest = loadChats().filter((other) => other.id !== chat.id).at(-1);
      if (!oldest) return false;
      deleteChat(oldest);
    }
  }
}

export function deleteChat(chat) {
  try {
    localStorage.removeItem(CHAT + chat.id);
  } catch {
    // no storage: nothing was kept
  }
}

export function titleOf(chat) {
  const text = chat.messages[0]?.content.trim().replaceAll(/\s+/g, " ") ?? "";
  return text.length > 48 ? `${text.slice(0, 47)}…` : text || "New conversation";
}

export function loadSettings() {
  const settings = read(SETTINGS);
  return settings && typeof settings === "object" && !Array.isArray(settings) ? settings : {};
}

export function saveSettings(settings) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    // they hold until the page is left
  }
}
