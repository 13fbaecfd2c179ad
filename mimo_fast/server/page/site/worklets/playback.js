/**
 * Speech in 24 kHz, 16 bits -> the loudspeaker, through a jitter buffer that says what was heard.
 *
 * in:  {play: id, pcm}, {end: id}, {flush: ticket}
 * out: {heard: id, ms, buffered, missed, level, pcm, time}   while something is played
 *      {begun: id, time}, {over: id}, {flushed: ticket, id, ms}
 */

import { Resampler } from "../scripts/resampler.js";

const RATE = 24000;
const STEP = 240; // 10 ms are taken at a time
const REPORT = 4; // steps between reports
const LEAST = 0.06; // seconds that are waited for before an item begins
const MOST = 0.4; // the same, where the network is uneven
const GROWTH = 0.06; // by which a gap raises it
const FADE = 240; // samples of an end that is cut

class Playback extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = new Resampler(RATE, sampleRate);
    this.ready = new Float32Array(0);
    this.at = 0;
    this.patience = LEAST;
    this.missed = 0;
    this.closed = false;
    this.clear();
    this.port.onmessage = ({ data }) => this.take(data);
  }

  clear() {
    this.queue = []; // {id, parts, ended, taken, waiting}
    this.running = false;
    this.steps = [];
  }

  take(message) {
    if (message.play !== undefined) this.item(message.play).parts.push(message.pcm);
    else if (message.end !== undefined) this.item(message.end).ended = true;
    else if (message.flush !== undefined) this.flush(message.flush);
    else if (message.close) this.closed = true;
  }

  item(id) {
    const last = this.queue.at(-1);
    if (last?.id === id) return last;
    const found = { id, parts: [], ended: false, taken: 0, begun: false };
    this.queue.push(found);
    return found;
  }

  /** Ends at once what is heard; with a short fade, or it would click. */
  flush(ticket) {
    const item = this.queue[0];
    const ms = item ? this.heardMs(item) : 0;
    const rest = this.ready.subarray(this.at, this.at + FADE);
    this.ready = rest.map((sample, i) => sample * (1 - i / rest.length));
    this.at = 0;
    this.clear();
    this.port.postMessage({ flushed: ticket, id: item?.begun ? item.id : null, ms });
  }

  heardMs(item) {
    // What was taken and is not played yet was not heard.
    const left = ((this.ready.length - this.at) * RATE) / sampleRate;
    return Math.max(0, ((item.taken - left) * 1000) / RATE);
  }

  buffered(item) {
    return item.parts.reduce((sum, part) => sum + part.length, 0);
  }

  process(_inputs, [[output]]) {
    while (this.ready.length - this.at < output.length && this.step());
    const part = this.ready.subarray(this.at, this.at + output.length);
    output.set(part);
    this.at += part.length;
    return !this.closed;
  }

  /** Makes 10 ms more of what is played; false where there is nothing. */
  step() {
    const item = this.queue[0];
    if (!item) return false;
    const held = this.buffered(item);
    if (!this.running) {
      if (held < this.patience * RATE && !item.ended) return false;
      this.running = true;
    }
    if (held === 0) {
      this.running = false;
      if (item.ended) {
        // What is made already is played first.
        if (this.at < this.ready.length) return false;
        this.report(item);
        this.queue.shift();
        this.port.postMessage({ over: item.id });
        return this.step();
      }
      // It ran dry: the listener hears a gap, and the next start waits for more.
      item.gap ??= currentTime;
      if (item.gap === currentTime) this.patience = Math.min(MOST, this.patience + GROWTH);
      return false;
    }
    if (item.gap !== undefined) {
      this.missed += currentTime - item.gap;
      item.gap = undefined;
    }
    const pcm = pull(item, STEP);
    item.taken += pcm.length;
    if (!item.begun) {
      item.begun = true;
      this.port.postMessage({ begun: item.id, time: currentTime });
    }
    const made = this.resampler.push(Float32Array.from(pcm, (sample) => sample / 32768));
    this.append(made);
    this.steps.push(pcm);
    if (this.steps.length >= REPORT) this.report(item);
    return true;
  }

  append(made) {
    const left = this.ready.subarray(this.at);
    const joined = new Float32Array(left.length + made.length);
    joined.set(left);
    joined.set(made, left.length);
    this.ready = joined;
    this.at = 0;
  }

  report(item) {
    const pcm = joinSteps(this.steps);
    this.steps = [];
    let squares = 0;
    for (const sample of pcm) squares += (sample / 32768) ** 2;
    const message = {
      heard: item.id,
      ms: this.heardMs(item),
      buffered: (this.buffered(item) * 1000) / RATE,
      missed: this.missed * 1000,
      level: pcm.length ? Math.sqrt(squares / pcm.length) : 0,
      pcm,
      time: currentTime - pcm.length / RATE,
    };
    this.port.postMessage(message, [pcm.buffer]);
  }
}

/** Takes up to so many samples of an item. */
function pull(item, most) {
  const first = item.parts[0];
  if (first.length <= most) return item.parts.shift();
  item.parts[0] = first.subarray(most);
  return first.subarray(0, most);
}

function joinSteps(steps) {
  const joined = new Int16Array(steps.reduce((sum, step) => sum + step.length, 0));
  let at = 0;
  for (const step of steps) {
    joined.set(step, at);
    at += step.length;
  }
  return joined;
}

registerProcessor("playback", Playback);
