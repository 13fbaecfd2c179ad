// Counts what goes through the page's sockets.
(() => {
  const RATE = 24000;
  const counts = { received: 0, created: 0, replies: 0, interrupted: 0, events: 0 };

  const Socket = window.WebSocket;
  window.WebSocket = class extends Socket {
    constructor(...given) {
      super(...given);
      // Who leaves in the middle of a reply is not told of its end.
      this.addEventListener("close", () => {
        counts.replies = counts.created;
      });
      this.addEventListener("message", ({ data }) => {
        if (typeof data !== "string") return;
        counts.events++;
        const event = JSON.parse(data);
        if (event.type === "response.output_audio.delta") {
          counts.received += (event.delta.length * 3) / 4 / 2 / RATE;
        } else if (event.type === "response.created") {
          counts.created++;
        } else if (event.type === "response.done") {
          counts.replies++;
        } else if (event.type === "conversation.item.truncated" && event.audio_end_ms > 0) {
          counts.interrupted++;
        }
      });
    }
  };

  window.__counts = () => ({ ...counts });
})();
