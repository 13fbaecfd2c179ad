/** Waveforms: of a talk while it runs, and of a recording. */

import { calm } from "./dom.js";

const BAR = 3; // CSS pixels
const GAP = 2;
const SECONDS = 0.06; // of a bar

/** A canvas in device pixels; gives its context and size in CSS pixels. */
function fitted(canvas) {
  const scale = Math.min(3, devicePixelRatio || 1);
  const { clientWidth: width, clientHeight: height } = canvas;
  if (canvas.width !== Math.round(width * scale)) canvas.width = Math.round(width * scale);
  if (canvas.height !== Math.round(height * scale)) canvas.height = Math.round(height * scale);
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  return { pen, width, height };
}

function color(element, name) {
  return getComputedStyle(element).getPropertyValue(name).trim();
}

function bar(pen, x, top, height) {
  pen.beginPath();
  pen.roundRect(x, top, BAR, Math.max(BAR, height), BAR / 2);
  pen.fill();
}

/** The last seconds of both voices: the user above the line, the model below it. */
export class Timeline {
  #bars = [];
  #levels = { you: 0, model: 0 };
  #timer = null;

  constructor(canvas) {
    this.canvas = canvas;
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  level(who, value) {
    this.#levels[who] = Math.max(this.#levels[who], value);
  }

  start() {
    // Whoever asks for less motion sees it once a second.
    const every = 1000 * (calm.matches ? 1 : SECONDS);
    this.#timer ??= setInterval(() => this.#step(), every);
  }

  stop() {
    clearInterval(this.#timer);
    this.#timer = null;
  }

  clear() {
    this.#bars = [];
    this.draw();
  }

  #step() {
    this.#bars.push(this.#levels);
    this.#levels = { you: 0, model: 0 };
    if (this.#bars.length > 600) this.#bars.splice(0, 300);
    if (!document.hidden) this.draw();
  }

  draw() {
    const { pen, width, height } = fitted(this.canvas);
    const most = Math.floor(width / (BAR + GAP));
    const shown = this.#bars.slice(-most);
    const middle = height / 2;
    const colors = ["--you", "--model", "--line"].map((name) => color(this.canvas, name));
    for (let i = 0; i < most; i++) {
      const levels = shown[shown.length - 1 - i];
      const x = width - (i + 1) * (BAR + GAP);
      const you = (levels?.you ?? 0) * (middle - 3);
      const model = (levels?.model ?? 0) * (middle - 3);
      if (you < 1 && model < 1) {
        pen.fillStyle = colors[2];
        bar(pen, x, middle - BAR / 2, BAR);
        continue;
      }
      if (you >= 1) {
        pen.fillStyle = colors[0];
        bar(pen, x, middle - 1 - you, you);
      }
      if (model >= 1) {
        pen.fillStyle = colors[1];
        bar(pen, x, middle + 1, model);
      }
    }
  }
}

/** A recording as bars, and how far it was played. */
export class Picture {
  #levels = [];
  #played = 0;

  constructor(canvas, voice) {
    this.canvas = canvas;
    this.voice = voice;
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  /** Levels from 0 to 1, of equal parts. */
  show(levels) {
    this.#levels = levels;
    this.draw();
  }

  push(level) {
    this.#levels.push(level);
    if (this.#levels.length > 4000) {
      this.#levels = this.#levels.filter((_, i) => i % 2 === 0);
    }
    this.draw();
  }

  /** From 0 to 1. */
  played(share) {
    this.#played = share;
    this.draw();
  }

  draw() {
    const { pen, width, height } = fitted(this.canvas);
    const most = Math.max(1, Math.floor(width / (BAR + GAP)));
    const [on, off] = [color(this.canvas, `--${this.voice}`), color(this.canvas, "--line-strong")];
    for (let i = 0; i < most; i++) {
      const from = Math.floor((i * this.#levels.length) / most);
      const to = Math.max(from + 1, Math.floor(((i + 1) * this.#levels.length) / most));
      const level = Math.max(0, ...this.#levels.slice(from, to));
      const tall = Math.max(BAR, level * (height - 2));
      pen.fillStyle = i < this.#played * most ? on : off;
      bar(pen, i * (BAR + GAP), (height - tall) / 2, tall);
    }
  }
}
