/** Requests to the server, and why it refused one. */

import { currentKey } from "./settings.js";

/** A request that failed. `code` is the server's, or "away" where nothing answered. */
export class Refusal extends Error {
  name = "Refusal";

  constructor(message, code, status = 0, wait = 0) {
    super(message);
    this.code = code;
    this.status = status;
    this.wait = wait;
  }

  get isKey() {
    return this.status === 401;
  }

  get isFull() {
    return this.status === 429;
  }
}

/** The address of a path, beside this page: a proxy may serve it in a folder. */
export function address(path) {
  return new URL(path.replace(/^\//, ""), document.baseURI);
}

/** The address of a WebSocket. */
export function socketAddress(path) {
  const found = address(path);
  found.protocol = found.protocol === "https:" ? "wss:" : "ws:";
  return found;
}

/** Subprotocols of a WebSocket; a browser sends the key in one, never in the address. */
export function protocols() {
  const key = currentKey();
  return key ? ["realtime", `openai-insecure-api-key.${key}`] : ["realtime"];
}

/** An answer whose status is good. Raises a Refusal for any other. */
export async function ask(path, { method = "GET", json, form, text, type, headers, signal } = {}) {
  const sent = new Headers(headers);
  if (currentKey()) sent.set("Authorization", `Bearer ${currentKey()}`);
  let body = form;
  if (json !== undefined) {
    sent.set("Content-Type", "application/json");
    body = JSON.stringify(json);
  } else if (text !== undefined) {
    sent.set("Content-Type", type);
    body = text;
  }
  let answer;
  try {
    answer = await fetch(address(path), { method, body, headers: sent, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server does not answer.", "away");
  }
  if (answer.ok) return answer;
  throw await refusalOf(answer);
}

async function refusalOf(answer) {
  const wait = Number(answer.headers.get("retry-after")) || 0;
  try {
    const { error } = await answer.json();
    return new Refusal(error.message, error.code, answer.status, wait);
  } catch {
    return new Refusal(`The server answered ${answer.status}.`, null, answer.status, wait);
  }
}

/** The objects of an answer of server-sent events. Raises a Refusal for one that says error. */
export async function* serverEvents(answer) {
  const decoder = new TextDecoder();
  let waiting = "";
  for await (const bytes of parts(answer.body)) {
    waiting += decoder.decode(bytes, { stream: true });
    const lines = waiting.split("\n");
    waiting = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const found = JSON.parse(line.slice(6));
      if (found.error) throw new Refusal(found.error.message, found.error.code, 500);
      yield found;
    }
  }
}

// Not every browser iterates over streams.
async function* parts(stream) {
  const reader = stream.getReader();
  let ended = false;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      ended = done;
      if (done) return;
      yield value;
    }
  } finally {
    // Whoever stops reading lets the server stop, too.
    if (!ended) reader.cancel().catch(() => {});
  }
}

/** Places of the server: {sessions: {taken, most}, ...}. */
export async function ready(signal) {
  return (await ask("ready", { signal })).json();
}
