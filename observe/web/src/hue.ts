// Colors of names: each new name gets the next color and keeps it while the page is open, so that the first eight differ.

const known = new Map<string, number>();

/** The number of the color of a name, from 1. */
export function hue(name: string): number {
  let n = known.get(name);
  if (n === undefined) {
    n = (known.size % 8) + 1;
    known.set(name, n);
  }
  return n;
}
