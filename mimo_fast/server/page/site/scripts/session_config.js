/** What a session of the Realtime protocol is told, by this page's settings. */

import { settings } from "./settings.js";

/** The session of a talk. */
export function sessionOf(config, byHand) {
  const session = {
    type: "realtime",
    output_modalities: ["audio"],
    audio: {
      input: { transcription: { model: config.model }, turn_detection: detection(byHand) },
      output: {},
    },
  };
  const voice = settings.get("voice");
  if (config.voices.includes(voice)) session.audio.output.voice = voice;
  const instructions = settings.get("instructions").trim();
  if (config.knows.instructions && instructions) session.instructions = instructions;
  return session;
}

function detection(byHand) {
  if (byHand) return null;
  if (settings.get("turns") === "patient") return { type: "semantic_vad", eagerness: "high" };
  return { type: "server_vad", silence_duration_ms: settings.get("silence") };
}
