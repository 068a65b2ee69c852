// Colors of names. This file has no effects.

/** The number of the color of a name, from 1 to 8. It depends on nothing else: a name has the same one in every view, and for everybody. */
export function hue(name: string): number {
  let n = 0x811c9dc5;
  for (const c of name) n = Math.imul(n ^ c.codePointAt(0)!, 0x01000193);
  n ^= n >>> 15;
  return ((n >>> 0) % 8) + 1;
}
