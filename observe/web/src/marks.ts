// Marks of changes above a chart. This file has no effects.
import type { Mark } from "./api";

/** The color of a kind of change, for its icon and its line: a custom property of the style sheet, without the dashes. */
export const markColors: Record<Mark["kind"], string> = { oom: "bad", evict: "bad", restart: "warn", node: "accent", rollout: "accent", deploy: "accent" };

const severity = Object.keys(markColors);

/** The room of an icon in pixels. */
export const markWidth = 14;

export interface PlacedMark {
  mark: Mark;
  /** The middle of its icon. */
  at: number;
  /** The marks for which it stands, in the order of time. */
  all: Mark[];
}

/** Places icons exactly at their times. Where there is room for one only, the worst change has it, and stands for the others. */
export function placeMarks(marks: Mark[], x: (time: number) => number): PlacedMark[] {
  const placed: PlacedMark[] = [];
  for (const mark of [...marks].sort((a, b) => severity.indexOf(a.kind) - severity.indexOf(b.kind) || a.time - b.time)) {
    const at = x(mark.time);
    const near = placed.filter((p) => Math.abs(p.at - at) < markWidth).sort((a, b) => Math.abs(a.at - at) - Math.abs(b.at - at))[0];
    if (near) near.all.push(mark);
    else placed.push({ mark, at, all: [mark] });
  }
  for (const p of placed) p.all.sort((a, b) => a.time - b.time);
  return placed.sort((a, b) => a.at - b.at);
}
