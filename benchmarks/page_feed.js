// Speaks to the page faster than a microphone, and counts what went through its sockets.
//
// A browser records and plays in real time alone. So the blocks of the page's capture node are
// handed to the page as if the node had sent them, as many at once as somebody said; all that the
// page does with a block after that, it does. What it plays is played in real time.
(() => {
  const RATE = 24000;
  const BLOCK = 768;
  const counts = { said: 0, received: 0, replies: 0, interrupted: 0, events: 0 };
  let capture = null;

  const Node = window.AudioWorkletNode;
  window.AudioWorkletNode = class extends Node {
    constructor(context, name, options) {
      super(context, name, options);
      if (name === "capture") capture = this;
    }
  };

  const Socket = window.WebSocket;
  window.WebSocket = class extends Socket {
    constructor(...given) {
      super(...given);
      this.addEventListener("message", ({ data }) => {
        if (typeof data !== "string") return;
        counts.events++;
        const event = JSON.parse(data);
        if (event.type === "response.output_audio.delta") {
          counts.received += (event.delta.length * 3) / 4 / 2 / RATE;
        } else if (event.type === "response.done") {
          counts.replies++;
          if (event.response.status !== "completed") counts.interrupted++;
        }
      });
    }
  };

  const samplesOf = (text) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    return new Int16Array(bytes.buffer);
  };

  window.__feed = {
    counts: () => ({ ...counts }),
    // Base64 of int16 samples at 24 kHz -> the page, in one go.
    say: (text) => {
      const samples = samplesOf(text);
      const begun = capture.context.currentTime;
      for (let at = 0; at + BLOCK <= samples.length; at += BLOCK) {
        const pcm = samples.slice(at, at + BLOCK);
        const level = Math.sqrt(pcm.reduce((sum, x) => sum + (x / 32768) ** 2, 0) / BLOCK);
        const data = { pcm, level, time: begun + at / RATE };
        capture.port.dispatchEvent(new MessageEvent("message", { data }));
      }
      counts.said += samples.length / RATE;
    },
  };
})();
