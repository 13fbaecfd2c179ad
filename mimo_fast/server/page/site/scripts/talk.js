/** The talk tab: a session and what is shown of it. */

import { chips, get, setIcon, show } from "./dom.js";
import { EventLog } from "./event_log.js";
import { Latency } from "./latency.js";
import { cancelsEcho } from "./microphone.js";
import { Recorder } from "./recorder.js";
import { Session } from "./session.js";
import { settings } from "./settings.js";
import { Transcript } from "./transcript.js";
import { keepAwake } from "./wake_lock.js";
import { download } from "./wav.js";
import { Timeline } from "./waveform.js";

const WORDS = {
  idle: "Tap to start",
  connecting: "Connecting",
  queued: "Waiting for a place",
  listening: "Listening",
  hearing: "You speak",
  thinking: "Thinking",
  speaking: "Speaking",
  paused: "Tap to go on",
  error: "Tap to try again",
};

const ICONS = { idle: "mic", error: "retry", speaking: "stop", paused: "play", thinking: "dots" };

const session = new Session();
const latency = new Latency();
const log = new EventLog();
const recorder = new Recorder();
let transcript = null;
let timeline = null;
let heardAt = null;
let subtitleOf = null;

export function setUpTalk() {
  transcript = new Transcript(get("transcript"), get("transcript-empty"));
  timeline = new Timeline(get("talk-wave"));
  listen();
  setUpButton();
  get("talk-mute").addEventListener("click", toggleMute);
  get("talk-end").addEventListener("click", () => {
    session.end();
    // The button that had the focus is gone.
    get("talk-button").focus();
  });
  get("talk-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = get("talk-input").value.trim();
    if (!text) return;
    get("talk-input").value = "";
    say(text);
  });
  get("audio-save").addEventListener("click", () => recorder.save("talk.wav"));
  get("transcript-clear").addEventListener("click", clear);
  get("subtitles-toggle").addEventListener("click", toggleSubtitles);
  get("details-toggle").addEventListener("click", () => {
    settings.set("details", !settings.get("details"));
    showDetails();
  });
  get("events-save").addEventListener("click", () => download(log.blob(), "events.json"));
  showSubtitles();
  showDetails();
  showState("idle");
  // A session that is open is closed in order, or its place would stay taken for a while.
  addEventListener("pagehide", () => session.live && session.end());
}

/** The samples of a configuration. */
export function configureTalk(config) {
  chips(get("talk-samples"), config.samples.talk, say);
}

// Keys

export function talkKey(key, down) {
  if (key === " ") {
    if (session.byHand && session.hasMicrophone) session.hold(down);
    else if (down) session.hasMicrophone ? toggleMute() : press();
  } else if (down && key === "Escape") session.interrupt();
  else if (down && key === "s") toggleSubtitles();
}

export function talkIsLive() {
  return session.live;
}

// Buttons

function setUpButton() {
  const button = get("talk-button");
  button.addEventListener("click", () => {
    // By hand it is held, not clicked.
    if (!(session.byHand && session.hasMicrophone && session.live)) press();
  });
  const hold = (on) => () => session.byHand && session.hasMicrophone && session.hold(on);
  button.addEventListener("pointerdown", hold(true));
  for (const name of ["pointerup", "pointercancel", "pointerleave"]) {
    button.addEventListener(name, hold(false));
  }
  button.addEventListener("contextmenu", (event) => event.preventDefault());
}

function press() {
  if (!session.live) begin({ microphone: true });
  else if (session.state === "paused") session.resume();
  else if (session.state === "speaking" || session.state === "thinking") session.interrupt();
  else if (["connecting", "queued"].includes(session.state)) session.end();
  else if (!session.hasMicrophone) session.addMicrophone();
  else toggleMute();
}

function say(text) {
  if (!session.live) prepare();
  session.say(text);
}

function begin(options) {
  prepare();
  session.start(options);
}

function prepare() {
  recorder.clear();
  timeline.clear();
  log.clear();
  showProblem(null);
  show(get("talk-notice"), "");
}

function toggleMute() {
  if (session.live && session.hasMicrophone) session.mute(!session.muted);
}

function clear() {
  transcript.clear();
  latency.clear();
  show(get("talk-subtitles"), "");
  showLatency();
  get("transcript-tools").hidden = true;
}

function toggleSubtitles() {
  settings.set("subtitles", !settings.get("subtitles"));
  showSubtitles();
}

// What happens

function listen() {
  session.on("state", showState);
  session.on("problem", showProblem);
  session.on("slow", () => show(get("talk-notice"), "The server is slow to answer. Still trying."));
  session.on("notice", (text) => show(get("talk-notice"), text));
  session.on("level", showLevel);
  session.on("sound", (who, pcm, time) => {
    if (who === "you") recorder.you(pcm, time);
    else recorder.model(pcm, time);
  });
  session.on("you", (id, text) => {
    transcript.you(id, text);
    get("transcript-tools").hidden = false;
  });
  session.on("youMore", (id, delta) => transcript.youMore(id, delta));
  session.on("model", (id, delta) => {
    transcript.model(id, delta);
    get("transcript-tools").hidden = false;
    subtitleOf = id;
    showSubtitles();
  });
  session.on("heard", (id, ms, queued, ended) => transcript.heard(id, ms, queued, ended));
  session.on("done", (id, cut) => transcript.done(id, cut));
  session.on("latency", (ms) => {
    latency.add(ms);
    showLatency();
  });
  session.on("served", (served) => {
    const first = served?.first_audio_ms;
    get("detail-server").textContent = first === null || first === undefined ? "–" : `${Math.round(first)} ms`;
  });
  session.on("buffer", (report) => {
    heardAt = report;
  });
  session.on("event", (from, event) => log.add(from, event));
  setInterval(() => {
    if (settings.get("details") && session.live) showDetails();
  }, 500);
}

function showState(state) {
  const talk = get("talk");
  talk.dataset.state = state;
  talk.dataset.microphone = session.hasMicrophone ? (session.muted ? "muted" : "on") : "off";
  get("tab-talk").dataset.live = String(session.live);
  get("talk-status").textContent = wordsOf(state);
  get("detail-way").textContent = session.transport?.kind ?? "–";
  get("talk-hint").textContent = hintOf(state);
  const button = get("talk-button");
  const muted = session.muted && ["listening", "hearing"].includes(state);
  setIcon(button, muted ? "mic-off" : (ICONS[state] ?? "mic"));
  button.setAttribute("aria-label", actionOf(state));
  const mute = get("talk-mute");
  setIcon(mute, session.muted ? "mic-off" : "mic");
  mute.setAttribute("aria-pressed", String(session.muted));
  mute.disabled = !session.hasMicrophone;
  get("talk-controls").dataset.live = String(session.live);
  for (const name of ["talk-mute", "talk-end"]) get(name).hidden = !session.live;
  if (state !== "error") showProblem(null);
  if (state === "listening") show(get("talk-notice"), echoNotice());
  if (session.live) timeline.start();
  else timeline.stop();
  keepAwake(session.live);
}

function wordsOf(state) {
  if (state === "listening") {
    if (!session.hasMicrophone) return "Ready";
    if (session.muted) return "Muted";
    if (session.byHand) return "Hold to talk";
  }
  return WORDS[state];
}

function hintOf(state) {
  if (state === "idle") return "Say something, and it answers. Headphones work best.";
  if (state === "queued") {
    const places = session.places?.most;
    const taken = places > 1 ? `All ${places} places are taken.` : "The server is busy.";
    return `${taken} You are connected when one is free; the microphone is off meanwhile.`;
  }
  if (state === "paused") return "The sound was paused, by a locked screen or a call.";
  if (state === "listening" && !session.hasMicrophone) return "Type a question, or tap for the microphone.";
  if (state === "speaking") return session.hasMicrophone ? "Speak to interrupt." : "Tap to interrupt.";
  return "";
}

function actionOf(state) {
  if (state === "idle") return "Start talking";
  if (state === "error") return "Try again";
  if (state === "paused") return "Go on";
  if (state === "connecting" || state === "queued") return "Cancel";
  if (state === "speaking" || state === "thinking") return "Interrupt";
  if (!session.hasMicrophone) return "Use the microphone";
  if (session.byHand) return "Hold to talk";
  return session.muted ? "Unmute" : "Mute";
}

function echoNotice() {
  const stream = session.microphone;
  if (!stream || cancelsEcho(stream)) return "";
  return "This browser hardly takes echo out: wear headphones, or the model hears itself.";
}

function showProblem(found) {
  const box = get("talk-problem");
  box.hidden = !found;
  if (!found) return;
  get("talk-reason").textContent = found.text;
  get("talk-reason").dataset.code = found.code;
  const lines = found.commands.map((command) => {
    const code = document.createElement("code");
    code.textContent = command;
    return code;
  });
  get("talk-commands").replaceChildren(...lines);
  get("talk-commands").hidden = lines.length === 0;
}

function showLevel(who, level) {
  timeline.level(who, level);
  const talk = get("talk");
  const shown = who === "model" || session.state !== "speaking";
  if (shown) talk.style.setProperty("--level", level.toFixed(3));
}

function showLatency() {
  const text = (ms) => (ms === undefined ? "–" : `${Math.round(ms)} ms`);
  get("latency-last").textContent = text(latency.last);
  get("latency-median").textContent = text(latency.median);
}

function showSubtitles() {
  const on = settings.get("subtitles");
  get("subtitles-toggle").setAttribute("aria-pressed", String(on));
  show(get("talk-subtitles"), on && subtitleOf ? transcript.words(subtitleOf) : "");
}

function showDetails() {
  const on = settings.get("details");
  get("details-toggle").setAttribute("aria-expanded", String(on));
  get("details").hidden = !on;
  if (!on) return;
  get("detail-buffer").textContent = heardAt ? `${Math.round(heardAt.buffered)} ms` : "–";
  const missed = heardAt ? heardAt.missed + heardAt.dropped : null;
  get("detail-missed").textContent = missed === null ? "–" : `${Math.round(missed)} ms`;
  get("events").textContent = log.lines(12) || "No events yet.";
}
