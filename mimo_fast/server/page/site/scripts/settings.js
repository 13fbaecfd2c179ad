/** What the user chose, kept by the browser; and the key, for this tab unless it is to stay. */

import { Emitter } from "./emitter.js";

const PLACE = "mimo-fast";
const KEY_PLACE = "mimo-fast-key";

const DEFAULTS = {
  voice: "default",
  instructions: "",
  microphone: "",
  speaker: "",
  turns: "automatic",
  silence: 500,
  connection: "automatic",
  theme: "auto",
  subtitles: false,
  details: false,
};

class Settings extends Emitter {
  #values = { ...DEFAULTS, ...read(localStorage, PLACE) };

  get(name) {
    return this.#values[name];
  }

  set(name, value) {
    if (this.#values[name] === value) return;
    this.#values[name] = value;
    write(localStorage, PLACE, this.#values);
    this.emit(name, value);
    this.emit("change", name, value);
  }
}

export const settings = new Settings();

let key = read(sessionStorage, KEY_PLACE) ?? read(localStorage, KEY_PLACE) ?? "";

/** The key that is sent to the server; "" for none. */
export function currentKey() {
  return key;
}

/** Whether the key stays when the tab is closed. */
export function keyStays() {
  return Boolean(read(localStorage, KEY_PLACE));
}

export function setKey(value, stays) {
  key = value;
  write(sessionStorage, KEY_PLACE, value);
  write(localStorage, KEY_PLACE, stays ? value : "");
}

function read(storage, place) {
  try {
    return JSON.parse(storage.getItem(place));
  } catch {
    return null;
  }
}

function write(storage, place, value) {
  try {
    if (value) storage.setItem(place, JSON.stringify(value));
    else storage.removeItem(place);
  } catch {
    // A private window may keep nothing: then it lasts as long as the page.
  }
}
