/** Which way a session goes; from WebRTC back to the WebSocket where it does not connect. */

import { settings } from "./settings.js";
import { WebRtcTransport } from "./webrtc.js";
import { WebSocketTransport } from "./websocket.js";

const WAIT = 6000; // ms after which WebRTC is given up

const LOCAL = new Set(["localhost", "127.0.0.1", "[::1]"]);

/** The kinds to be tried, in order. */
export function kindsFor(config) {
  const chosen = settings.get("connection");
  // What is heard of a call is told by a worklet, which an insecure page does not have.
  const canCall = config.webrtc && "RTCPeerConnection" in globalThis && globalThis.isSecureContext;
  if (chosen === "websocket" || !canCall) return ["websocket"];
  if (chosen === "automatic" && LOCAL.has(location.hostname)) return ["websocket"];
  return ["webrtc", "websocket"];
}

/**
 * A transport that is connected. `prepare` is called with each before it connects, `fellBack` with
 * the reason where the first one did not.
 */
export async function connect({ context, config, stream, prepare, fellBack }) {
  const kinds = kindsFor(config);
  for (const kind of kinds) {
    const transport =
      kind === "webrtc"
        ? new WebRtcTransport(context, config.model, stream, config.ice_servers)
        : new WebSocketTransport(context, config.model);
    prepare(transport);
    try {
      const connecting = transport.connect();
      await (kind === "webrtc" ? withinTime(connecting) : connecting);
      return transport;
    } catch (error) {
      transport.close();
      // A full server and a wrong key are the same on the other way.
      if (kind === kinds.at(-1) || error.isFull || error.isKey) throw error;
      fellBack(error.message);
    }
  }
  throw new Error("there is no way to the server");
}

function withinTime(promise) {
  const late = new Promise((_, reject) => {
    setTimeout(() => reject(new Error("WebRTC did not connect in time")), WAIT);
  });
  return Promise.race([promise, late]);
}
