/** What the server can do; asks for the key where it needs one. */

import { ask } from "./api.js";
import { Emitter } from "./emitter.js";
import { askForKey } from "./keys.js";

export const news = new Emitter();

let known = null;
let asking = null;

/** The configuration that is known, or null. */
export function knownConfig() {
  return known;
}

/**
 * The server's configuration, asked for anew.
 * Raises a Refusal; one of a key only where the user gave none.
 */
export function loadConfig() {
  asking ??= load().finally(() => {
    asking = null;
  });
  return asking;
}

async function load() {
  for (;;) {
    try {
      known = await (await ask("page/config")).json();
      news.emit("config", known);
      return known;
    } catch (error) {
      if (!error.isKey || !(await askForKey(error.message))) throw error;
    }
  }
}
