/** Resamples a stream; used in the audio worklets. */

const ZEROS = 16; // zero crossings of the filter on either side
const EDGE = 0.94; // of the lower Nyquist frequency that is kept

/**
 * A polyphase filter, a sinc in a Hann window: what is above the lower of the two Nyquist
 * frequencies is taken out, so that nothing is folded back.
 */
export class Resampler {
  constructor(source, target) {
    const divisor = gcd(source, target);
    this.up = target / divisor;
    this.down = source / divisor;
    const ratio = Math.min(1, target / source);
    const half = Math.ceil(ZEROS / ratio);
    this.taps = 2 * half;
    this.filters = Array.from({ length: this.up }, (_, phase) =>
      filter(half, phase / this.up, ratio * EDGE),
    );
    // Half a filter of silence: the first sample has something before it.
    this.waiting = new Float32Array(half - 1);
    this.phase = 0;
  }

  /** More samples -> what can be made of them. */
  push(block) {
    if (this.up === this.down) return block;
    const input = new Float32Array(this.waiting.length + block.length);
    input.set(this.waiting);
    input.set(block, this.waiting.length);
    const room = Math.max(0, Math.ceil(((input.length - this.taps + 1) * this.up) / this.down) + 1);
    const output = new Float32Array(room);
    let made = 0;
    let at = 0;
    let phase = this.phase;
    while (at + this.taps <= input.length) {
      const weights = this.filters[phase];
      let sum = 0;
      for (let i = 0; i < this.taps; i++) sum += input[at + i] * weights[i];
      output[made++] = sum;
      phase += this.down;
      at += Math.floor(phase / this.up);
      phase %= this.up;
    }
    this.phase = phase;
    // A step is shorter than the filter, so `at` is inside the input.
    this.waiting = input.slice(at);
    return output.subarray(0, made);
  }
}

function filter(half, offset, cutoff) {
  const weights = new Float32Array(2 * half);
  let sum = 0;
  for (let i = 0; i < weights.length; i++) {
    const x = i - (half - 1) - offset;
    const window = Math.abs(x) < half ? 0.5 + 0.5 * Math.cos((Math.PI * x) / half) : 0;
    const angle = Math.PI * cutoff * x;
    weights[i] = (angle === 0 ? 1 : Math.sin(angle) / angle) * window;
    sum += weights[i];
  }
  return weights.map((weight) => weight / sum);
}

function gcd(a, b) {
  return b === 0 ? a : gcd(b, a % b);
}
