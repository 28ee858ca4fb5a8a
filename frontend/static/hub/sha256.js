// SHA-256 of a file (FIPS 180-4). The browser's own is used where it is offered and the file fits in memory;
// over plain HTTP on another host than this one it is not offered, and then the file is read piece by piece here.

const PIECE_BYTES = 4 * 1024 * 1024;
const OWN_ABOVE_BYTES = 512 * 1024 * 1024;

export async function sha256(file) {
  if (globalThis.crypto?.subtle && file.size <= OWN_ABOVE_BYTES) {
    return hex(new Uint8Array(await crypto.subtle.digest("SHA-256", await file.arrayBuffer())));
  }
  const hash = new Hash();
  for (let start = 0; start < file.size; start += PIECE_BYTES) {
    hash.update(new Uint8Array(await file.slice(start, start + PIECE_BYTES).arrayBuffer()));
  }
  return hash.finish();
}

function hex(bytes) {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// The first 32 bits of the fractional parts of the roots of the first primes.
function fractions(count, power) {
  const found = [];
  for (let number = 2; found.length < count; number += 1) {
    let prime = true;
    for (let divisor = 2; divisor * divisor <= number; divisor += 1) if (number % divisor === 0) prime = false;
    if (prime) {
      const root = number ** (1 / power);
      found.push(((root - Math.floor(root)) * 2 ** 32) | 0);
    }
  }
  return found;
}
const START = fractions(8, 2);
const ROUND = fractions(64, 3);
const turn = (word, by) => (word >>> by) | (word << (32 - by));

export class Hash {
  constructor() {
    this.state = Int32Array.from(START);
    this.rest = new Uint8Array(64);
    this.filled = 0;
    this.total = 0;
    this.words = new Int32Array(64);
  }

  update(bytes) {
    this.total += bytes.length;
    let at = 0;
    if (this.filled) {
      at = Math.min(64 - this.filled, bytes.length);
      this.rest.set(bytes.subarray(0, at), this.filled);
      this.filled += at;
      if (this.filled < 64) return;
      this.block(this.rest, 0);
      this.filled = 0;
    }
    for (; at + 64 <= bytes.length; at += 64) this.block(bytes, at);
    this.rest.set(bytes.subarray(at));
    this.filled = bytes.length - at;
  }

  finish() {
    const bits = this.total * 8;
    const tail = new Uint8Array(this.filled < 56 ? 64 - this.filled : 128 - this.filled);
    tail[0] = 0x80;
    const view = new DataView(tail.buffer);
    view.setUint32(tail.length - 8, Math.floor(bits / 2 ** 32));
    view.setUint32(tail.length - 4, bits >>> 0);
    this.update(tail);
    const out = new DataView(new ArrayBuffer(32));
    this.state.forEach((word, place) => out.setInt32(place * 4, word));
    return hex(new Uint8Array(out.buffer));
  }

  block(bytes, at) {
    const w = this.words;
    for (let i = 0; i < 16; i += 1) {
      const j = at + i * 4;
      w[i] = (bytes[j] << 24) | (bytes[j + 1] << 16) | (bytes[j + 2] << 8) | bytes[j + 3];
    }
    for (let i = 16; i < 64; i += 1) {
      const x = w[i - 15];
      const y = w[i - 2];
      w[i] = (w[i - 16] + w[i - 7] + (turn(x, 7) ^ turn(x, 18) ^ (x >>> 3)) + (turn(y, 17) ^ turn(y, 19) ^ (y >>> 10))) | 0;
    }
    let [a, b, c, d, e, f, g, h] = this.state;
    for (let i = 0; i < 64; i += 1) {
      const one = (h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + ((e & f) ^ (~e & g)) + ROUND[i] + w[i]) | 0;
      const two = ((turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      [h, g, f, e, d, c, b, a] = [g, f, e, (d + one) | 0, c, b, a, (one + two) | 0];
    }
    [a, b, c, d, e, f, g, h].forEach((word, place) => { this.state[place] = (this.state[place] + word) | 0; });
  }
}
