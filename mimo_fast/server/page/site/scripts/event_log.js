/** The last events of a session, without their audio, for whoever looks for a fault. */

const MOST = 500;

export class EventLog {
  constructor() {
    this.clear();
  }

  clear() {
    this.entries = [];
    this.began = performance.now();
  }

  add(from, event) {
    const last = this.entries.at(-1);
    const shown = short(event);
    if (last?.from === from && last.event.type === event.type && isAudio(event)) {
      last.count = (last.count ?? 1) + 1;
      return;
    }
    this.entries.push({ at_ms: Math.round(performance.now() - this.began), from, event: shown });
    if (this.entries.length > MOST) this.entries.shift();
  }

  lines(most) {
    return this.entries
      .slice(-most)
      .map(({ at_ms, from, event, count }) => {
        const time = `${(at_ms / 1000).toFixed(2).padStart(7)}`;
        return `${time}  ${from === "page" ? "→" : "←"} ${event.type}${count ? ` × ${count}` : ""}`;
      })
      .join("\n");
  }

  blob() {
    const text = JSON.stringify({ page: navigator.userAgent, events: this.entries }, null, 1);
    return new Blob([text], { type: "application/json" });
  }
}

function isAudio(event) {
  return event.type === "input_audio_buffer.append" || event.type === "response.output_audio.delta";
}

function short(event) {
  if (!isAudio(event)) return event;
  const name = event.type === "input_audio_buffer.append" ? "audio" : "delta";
  return { ...event, [name]: `${event[name]?.length ?? 0} characters of base64` };
}
