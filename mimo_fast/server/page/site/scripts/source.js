/** A recording that the user gives: a file, dropped or chosen, or the microphone. */

import { loudness, openAudio, RATE } from "./audio.js";
import { clock, get, icon, make } from "./dom.js";
import { Emitter } from "./emitter.js";
import { askForMicrophone, Listener, release } from "./microphone.js";
import { wavBlob } from "./wav.js";
import { Picture } from "./waveform.js";

const MOST_SECONDS = 900;
const LEVELS = 400;

/**
 * Fills an element. Tells "change" (this), "problem" (text), and while it records "begin",
 * "block" (pcm), "end". `blob` and `name` are the recording, null where there is none.
 */
export class Source extends Emitter {
  blob = null;
  name = "";
  seconds = 0;
  #parts = [];
  #stream = null;
  #listener = null;
  #player = null;

  /** small: one of several beside each other. */
  constructor(element, { label, small = false } = {}) {
    super();
    this.element = element;
    element.classList.add("source");
    element.classList.toggle("small", small);
    this.#build(label);
    this.#show();
  }

  get recording() {
    return this.#listener !== null;
  }

  /** Takes a recording that came from elsewhere. */
  set(blob, name) {
    this.#stopPlaying();
    this.blob = blob;
    this.name = name;
    this.seconds = 0;
    this.picture.show([]);
    this.#show();
    this.emit("change", this);
    if (blob) this.#look(blob);
  }

  clear() {
    this.set(null, "");
    this.file.value = "";
  }

  /** In a tap. */
  async record() {
    const opening = openAudio();
    opening.catch(() => {});
    try {
      this.#stream = await askForMicrophone();
      const context = await opening;
      this.clear();
      this.#parts = [];
      this.#listener = new Listener(context, this.#stream, (block) => this.#block(block));
      this.#stream.getAudioTracks()[0].onended = () => this.stop();
      this.emit("begin");
    } catch (error) {
      release(this.#stream);
      this.#stream = null;
      this.emit("problem", error.problem?.text ?? "The microphone could not be opened.");
    }
    this.#show();
  }

  stop() {
    if (!this.#listener) return;
    this.#listener.close();
    this.#listener = null;
    release(this.#stream);
    this.#stream = null;
    const parts = this.#parts;
    this.#parts = [];
    const levels = this.levels;
    this.set(wavBlob(parts, RATE), "recording.wav");
    this.picture.show(levels);
    this.emit("end");
  }

  #block({ pcm, level }) {
    this.#parts.push(pcm);
    this.seconds = (this.#parts.length * pcm.length) / RATE;
    this.levels.push(loudness(level));
    this.picture.push(loudness(level));
    this.time.textContent = clock(this.seconds);
    this.emit("block", pcm);
    if (this.seconds >= MOST_SECONDS) this.stop();
  }

  /** Its length and its loudness, where the browser can decode it. */
  async #look(blob) {
    try {
      const offline = new OfflineAudioContext(1, 1, 16000);
      const decoded = await offline.decodeAudioData(await blob.arrayBuffer());
      if (this.blob !== blob) return;
      this.seconds = decoded.duration;
      this.time.textContent = clock(decoded.duration);
      this.picture.show(levelsOf(decoded.getChannelData(0)));
    } catch {
      // The server may know a format that the browser does not.
    }
  }

  #build(label) {
    this.file = make("input", {
      type: "file",
      className: "visually-hidden",
      accept: "audio/*,.wav,.mp3,.flac,.ogg,.opus,.m4a,.mp4,.webm,.aac",
      "aria-label": `${label}: a file`,
    });
    this.file.addEventListener("change", () => this.#take(this.file.files[0]));
    this.choose = make("button", { type: "button", className: "button" }, icon("file"), "Choose a file");
    this.choose.addEventListener("click", () => this.file.click());
    this.mic = make("button", { type: "button", className: "button record" }, icon("mic"), make("span", {}, "Record"));
    this.mic.addEventListener("click", () => (this.recording ? this.stop() : this.record()));
    this.empty = make(
      "div",
      { className: "source-empty" },
      make("p", { className: "source-title" }, label),
      make("p", { className: "source-text" }, "Drop a recording here, choose a file, or use the microphone."),
    );
    this.title = make("span", { className: "source-name" });
    this.time = make("span", { className: "source-time" });
    this.play = iconButton("play", `${label}: play`);
    this.play.addEventListener("click", () => this.#playOrStop());
    this.remove = iconButton("close", `${label}: remove`);
    this.remove.addEventListener("click", () => this.clear());
    const canvas = make("canvas", { className: "picture", "aria-hidden": "true" });
    this.picture = new Picture(canvas, "you");
    this.picture.played(1);
    this.full = make(
      "div",
      { className: "source-full" },
      this.play,
      make("div", { className: "source-body" }, make("div", { className: "source-head" }, this.title, this.time), canvas),
      this.remove,
    );
    const buttons = make("div", { className: "source-buttons" }, this.choose, this.mic);
    this.element.append(this.file, this.empty, this.full, buttons);
    this.#acceptDrops();
  }

  #acceptDrops() {
    const over = (on) => (event) => {
      event.preventDefault();
      this.element.dataset.over = String(on);
    };
    this.element.addEventListener("dragover", over(true));
    this.element.addEventListener("dragleave", over(false));
    this.element.addEventListener("drop", (event) => {
      over(false)(event);
      this.#take(event.dataTransfer.files[0]);
    });
  }

  #take(file) {
    if (!file) return;
    this.stop();
    this.set(file, file.name);
  }

  #show() {
    const has = this.blob !== null || this.recording;
    this.element.dataset.state = this.recording ? "recording" : has ? "full" : "empty";
    this.empty.hidden = has;
    this.full.hidden = !has;
    this.play.hidden = this.remove.hidden = this.recording;
    this.choose.hidden = has;
    this.mic.hidden = has && !this.recording;
    this.mic.querySelector("span").textContent = this.recording ? "Stop" : "Record";
    this.mic.querySelector("use").setAttribute("href", this.recording ? "#i-stop" : "#i-mic");
    this.title.textContent = this.recording ? "Recording" : this.name;
    this.time.textContent = this.seconds ? clock(this.seconds) : "";
    if (!this.recording) this.levels = [];
    else this.levels ??= [];
  }

  #playOrStop() {
    if (this.#player) return this.#stopPlaying();
    const url = URL.createObjectURL(this.blob);
    const audio = (this.#player = new Audio(url));
    this.play.querySelector("use").setAttribute("href", "#i-stop");
    audio.ontimeupdate = () => this.picture.played(audio.currentTime / (audio.duration || 1));
    audio.onended = audio.onerror = () => this.#stopPlaying();
    audio.play().catch(() => this.#stopPlaying());
  }

  #stopPlaying() {
    if (!this.#player) return;
    const audio = this.#player;
    this.#player = null;
    audio.onended = audio.onerror = audio.ontimeupdate = null;
    audio.pause();
    URL.revokeObjectURL(audio.src);
    this.play.querySelector("use").setAttribute("href", "#i-play");
    this.picture.played(1);
  }
}

export function iconButton(name, label) {
  return make("button", { type: "button", className: "icon-button", "aria-label": label }, icon(name));
}

/** The source of an element of index.html. */
export function sourceOf(id, options) {
  return new Source(get(id), options);
}

function levelsOf(samples) {
  const size = Math.max(1, Math.floor(samples.length / LEVELS));
  const levels = [];
  for (let at = 0; at < samples.length; at += size) {
    let squares = 0;
    const end = Math.min(samples.length, at + size);
    for (let i = at; i < end; i++) squares += samples[i] * samples[i];
    levels.push(loudness(Math.sqrt(squares / (end - at))));
  }
  return levels;
}
