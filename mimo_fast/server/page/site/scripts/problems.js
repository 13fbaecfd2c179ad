/** What went wrong, in words that say what to do; commands are lines for a terminal. */

const port = () => location.port || (location.protocol === "https:" ? "443" : "80");

const PROBLEMS = {
  insecure: () => ({
    text:
      "A browser gives a microphone to https pages and to localhost only. Start the server with " +
      "a certificate, or bring it to this machine's localhost. Typing and files work as it is.",
    commands: [
      "mimo-fast serve --ssl-certfile cert.pem --ssl-keyfile key.pem",
      `ssh -N -L ${port()}:127.0.0.1:${port()} ${location.hostname}`,
    ],
  }),
  denied: () => ({
    text:
      "This page may not use the microphone. Allow it beside the address, in the browser's site " +
      "settings, then try again. Typing works without one.",
  }),
  "no-microphone": () => ({
    text: "No microphone was found. Plug one in, then try again. Typing works without one.",
  }),
  busy: () => ({
    text:
      "Another program holds the microphone, or the system refuses it. Close that program, then " +
      "try again.",
  }),
  away: () => ({
    text: "The server does not answer. Is it running, and is this machine on its network?",
    commands: ["mimo-fast serve"],
  }),
  full: () => ({ text: "The server is full, and no place became free. Try again later." }),
  key: () => ({ text: "The server needs its key. Try again and give it, or set it in Settings." }),
  stopping: () => ({ text: "The server is stopping or starting again. Try again in a moment." }),
  lost: () => ({ text: "The connection was lost. What was said so far is still here." }),
  blocked: () => ({
    text: "The browser does not start sound here. Tap once more; on a phone, check silent mode.",
  }),
};

/** {code, text, commands} of a code; `text` replaces the usual one. */
export function problem(code, text) {
  const found = PROBLEMS[code]?.() ?? { text: text || "Something went wrong." };
  return { code, commands: [], ...found, ...(text ? { text } : {}) };
}

/** Why there is no microphone, from the error of getUserMedia. */
export function microphoneProblem(error) {
  const codes = {
    NotAllowedError: "denied",
    SecurityError: "denied",
    NotFoundError: "no-microphone",
    OverconstrainedError: "no-microphone",
    NotReadableError: "busy",
    AbortError: "busy",
  };
  return problem(codes[error.name] ?? "busy");
}

/** What a Refusal means to a user. */
export function refusalProblem(error) {
  if (error.code === "away") return problem("away");
  if (error.isKey) return problem("key");
  if (error.isFull) return problem("full");
  if (error.status === 503) return problem("stopping");
  return problem(error.code ?? "server", error.message);
}

/** {code, text, commands} of anything that was raised. */
export function asProblem(error) {
  if (error.problem) return error.problem;
  if (error.name === "Refusal" || error.status !== undefined) return refusalProblem(error);
  // A worklet's module could not be fetched.
  if (error.name === "AbortError") return problem("away");
  if (error.name === "SoundError" || error.name === "NotAllowedError") return problem("blocked");
  return problem("away", "The connection could not be made. Try again.");
}
