/** Speech that an answer brings: played while it comes, shown, and given as a file. */

import { loudness, openAudio, RATE } from "./audio.js";
import { clock, get, icon, make } from "./dom.js";
import { Emitter } from "./emitter.js";
import { makePlayer } from "./player.js";
import { iconButton } from "./source.js";
import { download, wavBlob } from "./wav.js";
import { Picture } from "./waveform.js";

const WINDOW = 720; // samples of a level

/** Fills an element. Tells "heard" ({id, ms}) and "over". Ids are given with the parts. */
export class SpeechOutput extends Emitter {
  #player = null;
  #parts = [];
  #items = [];
  #samples = 0;
  #playing = false;
  #file = "speech.wav";

  constructor(id, file) {
    super();
    this.#file = file;
    this.element = get(id);
    this.element.classList.add("output");
    this.button = iconButton("play", "Play");
    this.button.addEventListener("click", () => (this.#playing ? this.stop() : this.replay()));
    this.time = make("span", { className: "source-time" });
    const canvas = make("canvas", { className: "picture", "aria-hidden": "true" });
    this.picture = new Picture(canvas, "model");
    this.save = make(
      "button",
      { type: "button", className: "button", "data-testid": "download" },
      icon("download"),
      "Download",
    );
    this.save.addEventListener("click", () => download(this.blob(), this.#file));
    this.element.append(this.button, canvas, this.time, this.save);
    this.element.hidden = true;
  }

  /** In a tap: what comes is played. */
  async begin() {
    this.stop();
    this.#parts = [];
    this.#items = [];
    this.#samples = 0;
    this.picture.show([]);
    this.picture.played(0);
    this.element.hidden = true;
    await this.#open();
  }

  /** More samples of an item. */
  push(id, pcm) {
    if (!pcm.length) return;
    if (this.#items.at(-1)?.id !== id) {
      this.#items.at(-1) && this.#player?.end(this.#items.at(-1).id);
      this.#items.push({ id, from: this.#samples, parts: [] });
    }
    // A copy: what is posted to the worklet is cloned, not shared.
    this.#items.at(-1).parts.push(pcm);
    this.#parts.push(pcm);
    this.#samples += pcm.length;
    this.element.hidden = false;
    this.time.textContent = clock(this.seconds);
    for (let at = 0; at < pcm.length; at += WINDOW) {
      this.picture.push(loudness(rms(pcm.subarray(at, at + WINDOW))));
    }
    this.#player?.play(id, pcm);
    this.#show(true);
  }

  /** No more comes. */
  end() {
    if (this.#items.length) this.#player?.end(this.#items.at(-1).id);
    else this.#show(false);
  }

  get seconds() {
    return this.#samples / RATE;
  }

  get playing() {
    return this.#playing;
  }

  async replay() {
    await this.#open();
    for (const { id, parts } of this.#items) {
      for (const part of parts) this.#player.play(id, part);
      this.#player.end(id);
    }
    this.#show(true);
  }

  stop() {
    this.#player?.close();
    this.#player = null;
    this.#show(false);
  }

  blob() {
    return wavBlob(this.#parts, RATE);
  }

  async #open() {
    const context = await openAudio();
    this.#player?.close();
    this.#player = makePlayer(context);
    this.#player.on("heard", ({ id, ms }) => {
      const item = this.#items.find((each) => each.id === id);
      if (!item) return;
      const at = item.from + (ms * RATE) / 1000;
      this.picture.played(at / Math.max(1, this.#samples));
      this.emit("heard", { id, ms });
    });
    this.#player.on("over", (id) => {
      if (id !== this.#items.at(-1)?.id) return;
      this.picture.played(1);
      this.#show(false);
      this.emit("over");
    });
  }

  #show(playing) {
    this.#playing = playing;
    this.element.dataset.playing = String(playing);
    this.button.querySelector("use").setAttribute("href", playing ? "#i-stop" : "#i-play");
    this.button.setAttribute("aria-label", playing ? "Stop" : "Play");
  }
}

function rms(pcm) {
  let squares = 0;
  for (const sample of pcm) squares += (sample / 32768) ** 2;
  return Math.sqrt(squares / pcm.length);
}
