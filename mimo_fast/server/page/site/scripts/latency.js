/** Milliseconds from the end of a turn to the first sound of its answer. */
export class Latency {
  #all = [];

  clear() {
    this.#all = [];
  }

  /** Interrupted turns are never given here. */
  add(ms) {
    this.#all.push(ms);
    if (this.#all.length > 500) this.#all.shift();
  }

  get last() {
    return this.#all.at(-1);
  }

  get median() {
    if (!this.#all.length) return undefined;
    const sorted = this.#all.toSorted?.((a, b) => a - b) ?? [...this.#all].sort((a, b) => a - b);
    const middle = sorted.length >> 1;
    return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
  }
}
