/** A text that is said: what was heard of it is marked. */

import { make } from "./dom.js";

const MS_A_CHARACTER = 65; // until the end of the audio is known

/**
 * How many characters were heard: in proportion to the audio, as the model does not say when it
 * says which word.
 */
export function heardCharacters(characters, heardMs, queuedMs, ended) {
  const all = ended ? queuedMs : Math.max(queuedMs, characters * MS_A_CHARACTER);
  if (all <= 0) return 0;
  return Math.min(characters, Math.ceil((characters * heardMs) / all));
}

/** An element of two parts: heard, and still to come. */
export class HeardText {
  #text = "";
  #count = 0;

  constructor(element) {
    this.heard = make("span", { className: "heard" });
    this.coming = make("span", { className: "coming" });
    element.replaceChildren(this.heard, this.coming);
  }

  get length() {
    return this.#text.length;
  }

  get text() {
    return this.#text;
  }

  set text(text) {
    this.#text = text;
    this.#show();
  }

  /** So many characters were heard; a word that was begun counts. */
  mark(count) {
    const rest = this.#text.slice(count).search(/\s|$/);
    const whole = count <= 0 ? 0 : count + Math.max(0, rest);
    if (whole === this.#count) return;
    this.#count = whole;
    this.#show();
  }

  #show() {
    this.heard.textContent = this.#text.slice(0, this.#count);
    this.coming.textContent = this.#text.slice(this.#count);
  }
}
