/** Both sides of a talk as one WAV: the user on the left, the model on the right. */

import { RATE } from "./audio.js";
import { download, wavHeader } from "./wav.js";

const BLOCK = 10; // seconds that are kept together
const MOST = 180; // blocks: half an hour, then the oldest go
const GAP = 0.1; // seconds: what follows sooner belongs sample to sample after what was before

/**
 * Times are those of the AudioContext. A block that is complete becomes a Blob, which browsers keep
 * outside of the page's memory.
 */
export class Recorder {
  constructor() {
    this.clear();
  }

  clear() {
    this.origin = null;
    this.open = new Map(); // index -> Int16Array of both channels
    this.blobs = [];
    this.first = 0; // index of the first blob
    this.ends = [0, 0]; // sample after the last one of each side
  }

  get seconds() {
    return (this.blobs.length + this.open.size) * BLOCK;
  }

  you(pcm, time) {
    this.#write(pcm, time, 0);
  }

  model(pcm, time) {
    this.#write(pcm, time, 1);
  }

  #write(pcm, time, channel) {
    this.origin ??= time;
    let at = Math.max(0, Math.round((time - this.origin) * RATE));
    // Times are those of the sound card's blocks, which are coarser than samples.
    if (Math.abs(at - this.ends[channel]) < GAP * RATE) at = this.ends[channel];
    this.ends[channel] = at + pcm.length;
    for (const sample of pcm) {
      const index = Math.floor(at / (BLOCK * RATE));
      const block = index < this.first + this.blobs.length ? null : this.#block(index);
      if (block) block[2 * (at - index * BLOCK * RATE) + channel] = sample;
      at++;
    }
  }

  #block(index) {
    if (!this.open.has(index)) {
      // Two are open: what was heard is told a moment later.
      while (this.first + this.blobs.length < index - 1) this.#close(this.first + this.blobs.length);
      this.open.set(index, new Int16Array(2 * BLOCK * RATE));
    }
    return this.open.get(index);
  }

  #close(index) {
    const block = this.open.get(index) ?? new Int16Array(2 * BLOCK * RATE);
    this.open.delete(index);
    this.blobs.push(new Blob([block]));
    if (this.blobs.length > MOST) {
      this.blobs.shift();
      this.first++;
    }
  }

  save(name) {
    const parts = [...this.blobs];
    const last = Math.max(...this.open.keys(), -1);
    for (let i = this.first + this.blobs.length; i <= last; i++) {
      const block = this.open.get(i) ?? new Int16Array(2 * BLOCK * RATE);
      parts.push(new Blob([i === last ? withoutSilence(block) : block]));
    }
    const bytes = parts.reduce((sum, part) => sum + part.size, 0);
    download(new Blob([wavHeader(bytes, RATE, 2), ...parts], { type: "audio/wav" }), name);
  }
}

function withoutSilence(block) {
  let end = block.length;
  while (end > 2 && block[end - 1] === 0) end--;
  return block.subarray(0, end + (end % 2));
}
