/** Recordings for whoever has none at hand: the server says a text. */

import { ask } from "./api.js";
import { loadConfig } from "./config.js";

/** A text as a WAV. */
export async function speechOf(text) {
  const config = await loadConfig();
  const json = { model: config.model, input: text, voice: "default", response_format: "flac" };
  const answer = await ask("v1/audio/speech", { method: "POST", json });
  return new Blob([await answer.arrayBuffer()], { type: "audio/flac" });
}
