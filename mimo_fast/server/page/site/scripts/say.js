/** The say tab: a text, said while it streams; what is heard is marked. */

import { protocols, socketAddress } from "./api.js";
import { loadConfig } from "./config.js";
import { chips, get, make, reveal, show } from "./dom.js";
import { HeardText, heardCharacters } from "./heard.js";
import { problem, refusalProblem } from "./problems.js";
import { SpeechOutput } from "./speech_output.js";

let output = null;
let socket = null;
let sentences = [];

export function setUpSay() {
  output = new SpeechOutput("say-output", "speech.wav");
  output.on("heard", ({ id, ms }) => mark(id, ms));
  output.on("over", () => setState("done"));
  get("say-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (socket) stop();
    else say();
  });
  get("say-text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) get("say-form").requestSubmit();
  });
  get("say-speed").addEventListener("input", showSpeed);
  showSpeed();
  setState("empty");
}

export function configureSay(config) {
  chips(get("say-samples"), config.samples.say, (text) => {
    get("say-text").value = text;
    get("say-form").requestSubmit();
  });
  chips(get("say-styles"), config.knows.styles ? config.samples.styles : [], (text) => {
    get("say-style").value = text;
  });
  get("say-style-field").hidden = !config.knows.styles;
  const voices = config.voices.map((name) => make("option", { value: name }, name));
  get("say-voice").replaceChildren(...voices);
  get("say-voice-field").hidden = config.voices.length < 2;
}

function showSpeed() {
  get("say-speed-value").textContent = `${Number(get("say-speed").value).toFixed(2)}×`;
}

async function say() {
  const text = get("say-text").value.trim();
  if (!text) return get("say-text").focus();
  show(get("say-problem"), "");
  stop();
  sentences = [];
  get("say-said").replaceChildren();
  setState("busy");
  try {
    await output.begin();
    await loadConfig();
    await stream(text);
    output.end();
    if (!sentences.length) throw { problem: { text: "The model knows no word of this text." } };
    setState(output.playing ? "playing" : "done");
  } catch (error) {
    output.end();
    setState(sentences.length ? "done" : "empty");
    const found = error.problem ?? refusalProblem(error);
    if (!error.stopped) show(get("say-problem"), found.text);
  } finally {
    socket = null;
    showButton();
  }
}

/** Sends the text, and plays what comes. */
function stream(text) {
  const mine = (socket = new WebSocket(socketAddress("v1/audio/speech/stream"), protocols()));
  showButton();
  mine.binaryType = "arraybuffer";
  return new Promise((resolve, reject) => {
    mine.onopen = () => {
      mine.send(JSON.stringify({ type: "session.config", ...manner() }));
      mine.send(JSON.stringify({ type: "input.text", text }));
      mine.send(JSON.stringify({ type: "input.done" }));
    };
    mine.onmessage = ({ data }) => {
      if (typeof data !== "string") {
        take(new Int16Array(data));
        return;
      }
      const event = JSON.parse(data);
      if (event.type === "audio.start") begin(event);
      else if (event.type === "audio.done") sentences[event.sentence_index].ended = true;
      else if (event.type === "session.done") resolve();
      else if (event.type === "error") reject({ problem: { text: event.message } });
    };
    mine.onclose = ({ code }) => {
      if (code === 1000 && socket !== mine) reject({ stopped: true });
      reject({ problem: problem(code === 1012 ? "stopping" : "full") });
    };
  });
}

function manner() {
  const style = get("say-style").value.trim();
  return {
    response_format: "pcm",
    voice: get("say-voice").value || "default",
    speed: Number(get("say-speed").value),
    ...(style && !get("say-style-field").hidden ? { instructions: style } : {}),
  };
}

function begin({ sentence_index: index, sentence_text: text }) {
  const element = make("span", { className: "sentence" });
  const said = new HeardText(element);
  said.text = text;
  sentences[index] = { said, element, queued: 0, ended: false };
  if (index) get("say-said").append(" ");
  get("say-said").append(element);
  setState("playing");
}

function take(pcm) {
  const index = sentences.length - 1;
  sentences[index].queued += (pcm.length * 1000) / 24000;
  output.push(index, pcm);
}

function mark(id, ms) {
  sentences.forEach(({ said, element, queued, ended }, index) => {
    element.classList.toggle("now", index === id);
    if (index < id) said.mark(said.length);
    else if (index > id) said.mark(0);
    else said.mark(heardCharacters(said.length, ms, queued, ended));
  });
}

function stop() {
  const mine = socket;
  socket = null;
  mine?.close(1000);
  output.stop();
  showButton();
}

function setState(state) {
  get("say").dataset.state = state;
  if (state === "playing") reveal(get("say-result-panel"));
  get("say-empty").hidden = state !== "empty";
  if (state === "done") {
    for (const { said, element } of sentences) {
      element.classList.remove("now");
      said.mark(said.length);
    }
  }
}

function showButton() {
  get("say-button").querySelector("span").textContent = socket ? "Stop" : "Say it";
  get("say-button").querySelector("use").setAttribute("href", socket ? "#i-stop" : "#i-say");
}
