/** The transcribe tab: a file or the microphone in words, as they are found. */

import { ask, protocols, serverEvents, socketAddress } from "./api.js";
import { toBase64 } from "./audio.js";
import { knownConfig, loadConfig } from "./config.js";
import { chips, get, make, reveal, show } from "./dom.js";
import { refusalProblem } from "./problems.js";
import { speechOf } from "./samples.js";
import { sourceOf } from "./source.js";
import { download } from "./wav.js";

const FORMATS = {
  text: { suffix: "txt", type: "text/plain" },
  srt: { suffix: "srt", type: "application/x-subrip" },
  vtt: { suffix: "vtt", type: "text/vtt" },
  verbose_json: { suffix: "json", type: "application/json" },
};

let source = null;
let running = null;
let seed = 0;
let made = new Map();

export function setUpTranscribe() {
  source = sourceOf("transcribe-source", { label: "A recording to transcribe" });
  source.on("change", ({ blob }) => (blob ? transcribe() : running?.live || clear()));
  source.on("begin", listen);
  source.on("problem", (text) => show(get("transcribe-problem"), text));
  for (const button of document.querySelectorAll("[data-format]")) {
    button.addEventListener("click", () => save(button.dataset.format));
  }
  get("transcribe-copy").addEventListener("click", async () => {
    await navigator.clipboard.writeText(get("transcribe-text").textContent);
    show(get("transcribe-note"), "Copied.");
  });
  // An insecure page may not write to the clipboard.
  get("transcribe-copy").hidden = !navigator.clipboard;
  setState("empty");
}

export function configureTranscribe(config) {
  chips(get("transcribe-samples"), config.samples.recordings, sample);
  const names = { en: "English", zh: "Chinese" };
  const languages = config.languages.map((code) => make("option", { value: code }, names[code]));
  get("transcribe-language").replaceChildren(make("option", { value: "" }, "Found by itself"), ...languages);
  get("transcribe-language-field").hidden = languages.length < 2;
}

/** A sample is said by the server first. */
async function sample(text) {
  show(get("transcribe-problem"), "");
  clear();
  setState("sample");
  try {
    source.set(await speechOf(text), text);
  } catch (error) {
    fail(error);
  }
}

async function transcribe() {
  // The words of the microphone came while it was heard.
  if (running?.live) return;
  clear();
  const mine = (running = new AbortController());
  setState("busy");
  try {
    await loadConfig();
    seed = Math.floor(Math.random() * 2 ** 31);
    const answer = await request({ stream: "true" }, mine.signal);
    for await (const event of serverEvents(answer)) {
      if (running !== mine) return;
      if (event.type === "transcript.text.delta") add(event.delta);
      else if (event.type === "transcript.text.done") put(event.text);
    }
    finish();
  } catch (error) {
    if (running === mine && error.name !== "AbortError") fail(error);
  }
}

function request(fields, signal) {
  const form = new FormData();
  form.set("file", source.blob, source.name || "recording.wav");
  form.set("model", knownConfig().model);
  form.set("seed", String(seed));
  const language = get("transcribe-language").value;
  if (language) form.set("language", language);
  for (const [name, value] of Object.entries(fields)) form.set(name, value);
  return ask("v1/audio/transcriptions", { method: "POST", form, signal });
}

/** The microphone: a session that only listens, whose words come turn by turn. */
function listen() {
  clear();
  setState("listening");
  const address = socketAddress("v1/realtime");
  address.searchParams.set("intent", "transcription");
  const socket = new WebSocket(address, protocols());
  const mine = (running = { live: true, abort: () => socket.close() });
  const turns = new Map();
  const waiting = [];
  let pending = 0;
  const send = (event) => socket.send(JSON.stringify(event));
  const close = () => {
    off();
    socket.close();
    if (running === mine) {
      running = null;
      finish();
    }
  };
  const removers = [
    source.on("block", (pcm) => {
      const event = { type: "input_audio_buffer.append", audio: toBase64(new Uint8Array(pcm.buffer)) };
      if (socket.readyState === WebSocket.OPEN) send(event);
      else if (socket.readyState === WebSocket.CONNECTING) waiting.push(event);
    }),
    source.on("end", () => {
      seed = Math.floor(Math.random() * 2 ** 31);
      if (socket.readyState !== WebSocket.OPEN) return close();
      // A turn in progress ends here; with too little in it the server says so.
      send({ type: "input_audio_buffer.commit" });
      setState("busy");
      setTimeout(() => pending === 0 && close(), 1000);
    }),
  ];
  const off = () => removers.forEach((remove) => remove());
  const text = () => [...turns.values()].filter(Boolean).join(" ");
  socket.onopen = () => waiting.splice(0).forEach(send);
  socket.onmessage = ({ data }) => {
    const event = JSON.parse(data);
    const kind = event.type.replace("conversation.item.input_audio_transcription.", "");
    if (event.type === "input_audio_buffer.committed") {
      pending++;
      turns.set(event.item_id, "");
    } else if (kind === "delta") {
      turns.set(event.item_id, (turns.get(event.item_id) ?? "") + event.delta);
    } else if (kind === "completed" || kind === "failed") {
      pending--;
      if (kind === "completed") turns.set(event.item_id, event.transcript.trim());
    }
    if (running === mine) put(text());
    if (pending === 0 && kind === "completed" && !source.recording) close();
  };
  socket.onclose = ({ code }) => {
    off();
    if (running !== mine) return;
    running = null;
    if (code !== 1000 && source.recording) {
      source.stop();
      show(get("transcribe-problem"), "The connection was lost. The recording is still here.");
    }
    finish();
  };
}

function add(delta) {
  put(get("transcribe-text").textContent + delta);
}

function put(text) {
  get("transcribe-text").textContent = text;
}

function finish() {
  running = null;
  const found = get("transcribe-text").textContent.trim();
  setState("done");
  show(get("transcribe-note"), found ? "" : "No words were found in this recording.");
  for (const button of document.querySelectorAll("[data-format]")) button.disabled = !found;
  get("transcribe-copy").disabled = !found;
}

function fail(error) {
  running = null;
  setState(source.blob ? "done" : "empty");
  show(get("transcribe-problem"), (error.problem ?? refusalProblem(error)).text);
}

function clear() {
  running?.abort?.();
  running = null;
  made = new Map();
  put("");
  show(get("transcribe-note"), "");
  show(get("transcribe-problem"), "");
  setState("empty");
}

/** The transcript as a file; the server writes it, with the same seed, so with the same words. */
async function save(format) {
  try {
    if (!made.has(format)) {
      show(get("transcribe-note"), "The file is being made.");
      const answer = await request({ response_format: format });
      made.set(format, await answer.text());
    }
    const { suffix, type } = FORMATS[format];
    const name = (source.name || "recording").replace(/\.\w+$/, "");
    download(new Blob([made.get(format)], { type }), `${name}.${suffix}`);
    show(get("transcribe-note"), "");
  } catch (error) {
    fail(error);
  }
}

function setState(state) {
  get("transcribe").dataset.state = state;
  if (state === "busy") reveal(get("transcribe-result-panel"));
  get("transcribe-empty").hidden = state !== "empty";
  const texts = { busy: "Transcribing", sample: "The server says the sample" };
  show(get("transcribe-busy"), texts[state]);
  get("transcribe-listening").hidden = state !== "listening";
  get("transcribe-tools").hidden = state !== "done";
  get("transcribe-text").setAttribute("aria-busy", String(state === "busy"));
}
