/** The conversation in words, while it goes on. */

import { make } from "./dom.js";
import { HeardText, heardCharacters } from "./heard.js";

const MOST = 200; // turns that are shown

export class Transcript {
  #turns = new Map();

  constructor(element, empty) {
    this.element = element;
    this.empty = empty;
  }

  clear() {
    this.#turns.clear();
    this.element.replaceChildren();
    this.empty.hidden = false;
  }

  /** A turn of the user: his words, or that he speaks. */
  you(id, text) {
    const turn = this.#turn(id, "you");
    turn.words.textContent = text ?? turn.text ?? "";
    turn.text = text ?? turn.text;
    turn.element.dataset.open = String(text === undefined);
    this.#follow();
  }

  /** More words of the user, while they are found. */
  youMore(id, delta) {
    const turn = this.#turn(id, "you");
    this.you(id, (turn.text ?? "") + delta);
  }

  /** A turn of the model grows. */
  model(id, delta) {
    const turn = this.#turn(id, "model");
    turn.said ??= new HeardText(turn.words);
    turn.said.text += turn.said.text ? delta : delta.trimStart();
    // Screen readers wait for the whole turn.
    turn.element.setAttribute("aria-busy", "true");
    this.#follow();
  }

  /** How far a turn of the model was heard, of the milliseconds that have come. */
  heard(id, ms, queuedMs, ended) {
    const turn = this.#turns.get(id);
    turn?.said?.mark(heardCharacters(turn.said.length, ms, queuedMs, ended));
  }

  /** A turn of the model has ended; what was not heard of it stays pale where it was cut. */
  done(id, cut) {
    const turn = this.#turns.get(id);
    if (!turn) return;
    turn.element.removeAttribute("aria-busy");
    turn.element.dataset.cut = String(Boolean(cut));
    if (!cut) turn.said?.mark(turn.said.length);
    turn.note.hidden = !cut;
    turn.note.textContent = cut ? "interrupted" : "";
  }

  remove(id) {
    this.#turns.get(id)?.element.remove();
    this.#turns.delete(id);
    this.empty.hidden = this.#turns.size > 0;
  }

  words(id) {
    const turn = this.#turns.get(id);
    return turn?.said?.text ?? turn?.text ?? "";
  }

  #turn(id, who) {
    if (this.#turns.has(id)) return this.#turns.get(id);
    const name = make("span", { className: "who" }, who === "you" ? "You" : "Model");
    const note = make("span", { className: "note", hidden: true });
    const words = make("p", { className: "words" });
    const head = make("div", { className: "turn-head" }, name, note);
    const element = make("div", { className: "turn", "data-who": who, "data-id": id }, head, words);
    const turn = { element, words, note };
    this.#turns.set(id, turn);
    this.element.append(element);
    this.empty.hidden = true;
    if (this.#turns.size > MOST) this.remove(this.#turns.keys().next().value);
    return turn;
  }

  #follow() {
    const { element } = this;
    const far = element.scrollHeight - element.scrollTop - element.clientHeight;
    // Whoever reads further up is left there.
    if (far < 160) element.scrollTop = element.scrollHeight;
  }
}
