/** The ask tab: a recording, a question about it, an answer in words or aloud. */

import { ask, serverEvents } from "./api.js";
import { fromBase64, toBase64 } from "./audio.js";
import { loadConfig } from "./config.js";
import { chips, get, reveal, show } from "./dom.js";
import { refusalProblem } from "./problems.js";
import { speechOf } from "./samples.js";
import { sourceOf } from "./source.js";
import { SpeechOutput } from "./speech_output.js";

const KINDS = { wav: "wav", mp3: "mp3", mpeg: "mp3", flac: "flac", ogg: "ogg", webm: "webm", m4a: "m4a", mp4: "m4a", aac: "aac" };

let source = null;
let output = null;
let running = null;

export function setUpAsk() {
  source = sourceOf("ask-source", { label: "A recording to ask about" });
  source.on("problem", (text) => show(get("ask-problem"), text));
  source.on("change", () => setState("empty"));
  output = new SpeechOutput("ask-output", "answer.wav");
  get("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  setState("empty");
}

export function configureAsk(config) {
  chips(get("ask-samples"), config.samples.recordings, sample);
  chips(get("ask-questions"), config.samples.questions, (text) => {
    get("ask-question").value = text;
  });
  const note = config.knows.ask
    ? ""
    : `${config.model} was not trained to read questions: it answers what is said in the recording.`;
  show(get("ask-limits"), note);
  get("ask-question-field").hidden = !config.knows.ask;
}

async function sample(text) {
  show(get("ask-problem"), "");
  setState("sample");
  try {
    source.set(await speechOf(text), text);
    // Without a question there is nothing to wait for.
    if (get("ask-question-field").hidden) send();
  } catch (error) {
    setState("empty");
    show(get("ask-problem"), refusalProblem(error).text);
  }
}

async function send() {
  if (!source.blob) {
    show(get("ask-problem"), "Give it a recording first: a file, the microphone, or one of the samples.");
    return;
  }
  running?.abort();
  const mine = (running = new AbortController());
  const aloud = get("ask-aloud").checked;
  show(get("ask-problem"), "");
  show(get("ask-note"), "");
  get("ask-answer").textContent = "";
  setState("busy");
  try {
    await output.begin();
    const config = await loadConfig();
    const json = await question(config, aloud);
    const answer = await ask("v1/chat/completions", { method: "POST", json, signal: mine.signal });
    const left = answer.headers.get("x-mimo-fast-left-out");
    for await (const chunk of serverEvents(answer)) {
      if (running !== mine) return;
      take(chunk.choices?.[0]?.delta ?? {});
    }
    output.end();
    if (left?.includes("instructions")) {
      show(get("ask-note"), "The question was left out: this model answers the recording alone.");
    }
    if (!get("ask-answer").textContent.trim()) get("ask-answer").textContent = "(no words)";
    setState("done");
  } catch (error) {
    if (running !== mine || error.name === "AbortError") return;
    setState("empty");
    show(get("ask-problem"), (error.problem ?? refusalProblem(error)).text);
  }
}

async function question(config, aloud) {
  const bytes = new Uint8Array(await source.blob.arrayBuffer());
  const audio = { data: toBase64(bytes), format: kindOf(source.blob, source.name) };
  const content = [{ type: "input_audio", input_audio: audio }];
  const text = get("ask-question").value.trim();
  if (text && !get("ask-question-field").hidden) content.push({ type: "text", text });
  return {
    model: config.model,
    stream: true,
    messages: [{ role: "user", content }],
    ...(aloud ? { modalities: ["text", "audio"], audio: { voice: "default", format: "pcm16" } } : {}),
  };
}

function kindOf(blob, name) {
  const suffix = name.split(".").at(-1).toLowerCase();
  return KINDS[suffix] ?? KINDS[blob.type.split("/").at(-1).replace(/^x-/, "").split(";")[0]] ?? "wav";
}

function take(delta) {
  const words = delta.content ?? delta.audio?.transcript ?? "";
  if (words) get("ask-answer").textContent += words;
  if (delta.audio?.data) output.push(0, fromBase64(delta.audio.data));
}

function setState(state) {
  get("ask").dataset.state = state;
  if (state === "busy") reveal(get("ask-result-panel"));
  get("ask-empty").hidden = state !== "empty";
  const texts = { busy: "Listening to the recording", sample: "The server says the sample" };
  show(get("ask-busy"), texts[state]);
  get("ask-result").hidden = state === "empty" || state === "sample";
  get("ask-answer").setAttribute("aria-busy", String(state === "busy"));
}
