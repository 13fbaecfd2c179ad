/**
 * `Player` without an audio worklet, which an insecure page does not have: parts are scheduled one
 * after the other. There is no microphone on such a page, so nothing interrupts it but a tap.
 */

import { RATE } from "./audio.js";
import { Emitter } from "./emitter.js";

const AHEAD = 0.08; // seconds before the first part of an item
const REPORT = 50; // ms

export class BufferPlayer extends Emitter {
  #parts = []; // {source, id, pcm, start, end, from}
  #next = 0;
  #ended = new Set();
  #begun = null;
  #timer = null;
  #missed = 0;

  constructor(context) {
    super();
    this.context = context;
  }

  play(id, pcm) {
    if (!pcm.length) return;
    const buffer = this.context.createBuffer(1, pcm.length, RATE);
    buffer.copyToChannel(Float32Array.from(pcm, (sample) => sample / 32768), 0);
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.context.destination);
    const now = this.context.currentTime;
    const last = this.#parts.at(-1);
    if (this.#next < now) {
      if (last?.id === id) this.#missed += now - this.#next;
      this.#next = now + AHEAD;
    }
    const from = last?.id === id ? last.from + last.pcm.length : 0;
    const start = this.#next;
    const end = start + pcm.length / RATE;
    source.start(start);
    this.#next = end;
    this.#parts.push({ source, id, pcm, start, end, from });
    this.#timer ??= setInterval(() => this.#report(), REPORT);
  }

  end(id) {
    this.#ended.add(id);
  }

  async flush() {
    const found = this.#heard();
    for (const { source } of this.#parts) source.stop();
    this.#clear();
    return found;
  }

  close() {
    this.flush();
  }

  #clear() {
    this.#parts = [];
    this.#ended.clear();
    this.#begun = null;
    this.#next = 0;
    clearInterval(this.#timer);
    this.#timer = null;
  }

  #heard() {
    const now = this.context.currentTime - (this.context.outputLatency || 0);
    const part = this.#parts.findLast(({ start }) => start <= now);
    if (!part) return { id: null, ms: 0 };
    const samples = part.from + Math.min(part.pcm.length, (now - part.start) * RATE);
    return { id: part.id, ms: (samples * 1000) / RATE };
  }

  #report() {
    const { id, ms } = this.#heard();
    if (id === null) return;
    if (this.#begun !== id) {
      this.#begun = id;
      this.emit("begun", id);
    }
    const now = this.context.currentTime;
    for (const part of this.#parts.filter(({ end }) => end <= now)) {
      const { pcm, start, end } = part;
      this.#parts.splice(this.#parts.indexOf(part), 1);
      const report = { id: part.id, ms: ((part.from + pcm.length) * 1000) / RATE, pcm, time: start };
      const buffered = Math.max(0, this.#next - now) * 1000;
      this.emit("heard", { ...report, buffered, missed: this.#missed * 1000, level: rms(pcm) });
      const more = this.#parts.some((other) => other.id === part.id);
      if (!more && this.#ended.has(part.id)) this.emit("over", part.id);
      if (!more && end < now && !this.#parts.length) this.#next = 0;
    }
    if (!this.#parts.length && [...this.#ended].includes(id)) this.#clear();
  }
}

function rms(pcm) {
  let squares = 0;
  for (const sample of pcm) squares += (sample / 32768) ** 2;
  return Math.sqrt(squares / pcm.length);
}
