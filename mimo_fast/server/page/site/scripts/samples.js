/** Recordings for whoever has none at hand: the server says a text. */

import { ask } from "./api.js";
import { openAudio } from "./audio.js";
import { loadConfig } from "./config.js";

/** A text as a FLAC; in a tap, as what comes of it may be played. */
export async function speechOf(text) {
  openAudio().catch(() => {});
  const config = await loadConfig();
  const json = { model: config.model, input: text, voice: "default", response_format: "flac" };
  const answer = await ask("v1/audio/speech", { method: "POST", json });
  return new Blob([await answer.arrayBuffer()], { type: "audio/flac" });
}
