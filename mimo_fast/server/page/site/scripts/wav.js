/** WAV files of 16 bits. */

/** The header of a WAV whose samples have so many bytes. */
export function wavHeader(bytes, rate, channels) {
  const header = new DataView(new ArrayBuffer(44));
  const text = (at, letters) =>
    [...letters].forEach((letter, i) => header.setUint8(at + i, letter.charCodeAt(0)));
  text(0, "RIFF");
  header.setUint32(4, 36 + bytes, true);
  text(8, "WAVEfmt ");
  header.setUint32(16, 16, true);
  header.setUint16(20, 1, true);
  header.setUint16(22, channels, true);
  header.setUint32(24, rate, true);
  header.setUint32(28, rate * channels * 2, true);
  header.setUint16(32, channels * 2, true);
  header.setUint16(34, 16, true);
  text(36, "data");
  header.setUint32(40, bytes, true);
  return header.buffer;
}

/** A file of Int16Arrays. */
export function wavBlob(parts, rate, channels = 1) {
  const bytes = parts.reduce((sum, part) => sum + part.byteLength, 0);
  return new Blob([wavHeader(bytes, rate, channels), ...parts], { type: "audio/wav" });
}

/** Gives the user a file. */
export function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  // Not at once: some browsers read it later.
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
