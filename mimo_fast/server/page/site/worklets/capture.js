/** The microphone, or a remote track -> 24 kHz in 16 bits, 32 ms at a time. */

import { Resampler } from "../scripts/resampler.js";

const RATE = 24000;
const BLOCK = 768; // a frame of the server's detector

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = new Resampler(sampleRate, RATE);
    this.block = new Int16Array(BLOCK);
    this.filled = 0;
    this.squares = 0;
    this.closed = false;
    this.port.onmessage = () => {
      this.closed = true;
    };
  }

  process(inputs) {
    const channels = inputs[0];
    // A track that has ended gives no channels.
    if (channels.length > 0) {
      for (const sample of this.resampler.push(mixed(channels))) this.add(sample);
    }
    return !this.closed;
  }

  add(sample) {
    this.squares += sample * sample;
    this.block[this.filled++] = Math.round(Math.max(-1, Math.min(1, sample)) * 32767);
    if (this.filled < BLOCK) return;
    const level = Math.sqrt(this.squares / BLOCK);
    const message = { pcm: this.block, level, time: currentTime };
    this.port.postMessage(message, [this.block.buffer]);
    this.block = new Int16Array(BLOCK);
    this.filled = 0;
    this.squares = 0;
  }
}

function mixed(channels) {
  if (channels.length === 1) return channels[0];
  const sum = new Float32Array(channels[0].length);
  for (const channel of channels) {
    for (let i = 0; i < sum.length; i++) sum[i] += channel[i] / channels.length;
  }
  return sum;
}

registerProcessor("capture", Capture);
