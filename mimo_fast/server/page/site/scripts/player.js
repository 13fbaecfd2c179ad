/** Speech that comes in parts -> the loudspeaker; says what was heard of it. */

import { BufferPlayer } from "./buffer_player.js";
import { Emitter } from "./emitter.js";

/** A player for this page: an insecure one has no worklets. */
export function makePlayer(context) {
  return context.audioWorklet ? new Player(context) : new BufferPlayer(context);
}

/**
 * Tells "begun" (id), "heard" ({id, ms, buffered, missed, level, pcm, time}) and "over" (id).
 * Ids are given by whoever plays; times of what was heard leave out what is on its way to the ear.
 */
class Player extends Emitter {
  #tickets = 0;
  #flushes = new Map();

  constructor(context) {
    super();
    this.context = context;
    this.node = new AudioWorkletNode(context, "playback", {
      numberOfInputs: 0,
      outputChannelCount: [1],
    });
    this.node.port.onmessage = ({ data }) => this.#take(data);
    this.node.connect(context.destination);
  }

  /** Plays samples of 16 bits after those that it has. */
  play(id, pcm) {
    if (pcm.length) this.node.port.postMessage({ play: id, pcm });
  }

  /** No more comes of an item. */
  end(id) {
    this.node.port.postMessage({ end: id });
  }

  /** Ends what is heard, and drops what waits: {id, ms}; id is null where nothing was heard. */
  flush() {
    const ticket = ++this.#tickets;
    return new Promise((resolve) => {
      this.#flushes.set(ticket, resolve);
      this.node.port.postMessage({ flush: ticket });
      // A context that is suspended answers nothing.
      setTimeout(() => this.#flushed(ticket, { id: null, ms: 0 }), 500);
    });
  }

  close() {
    this.node.port.postMessage({ close: true });
    this.node.port.onmessage = null;
    this.node.disconnect();
  }

  #flushed(ticket, found) {
    this.#flushes.get(ticket)?.(found);
    this.#flushes.delete(ticket);
  }

  #heard(ms) {
    return Math.max(0, ms - 1000 * (this.context.outputLatency || 0));
  }

  #take(data) {
    if (data.flushed !== undefined) {
      this.#flushed(data.flushed, { id: data.id, ms: this.#heard(data.ms) });
    } else if (data.begun !== undefined) {
      this.emit("begun", data.begun);
    } else if (data.over !== undefined) {
      this.emit("over", data.over);
    } else if (data.heard !== undefined) {
      this.emit("heard", { ...data, id: data.heard, ms: this.#heard(data.ms) });
    }
  }
}
