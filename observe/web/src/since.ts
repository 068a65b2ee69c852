// Since when something is so, if what is known of it begins with the shown time. This file has no effects.
import type { Pod, WorkloadAnswer } from "./api";

export interface Since {
  time: number;
  /** It began at some time before this one. */
  before: boolean;
}

/** Revisions without those that only have no number yet: a Deployment has its template before the number of its revision. */
export function numbered(revisions: WorkloadAnswer["revisions"]): WorkloadAnswer["revisions"] {
  return revisions.filter((r, i) => {
    const next = revisions[i - 1];
    return r.revision || !next?.revision || r.images.join("\n") !== next.images.join("\n");
  });
}

/** When the revisions of a workload began, the newest first. The first snapshot that has the oldest one says only that it was there by then. */
export function revisionTimes(a: { start: number; cut?: boolean; state: { created?: string }; pods: Pick<Pod, "created" | "revision">[]; revisions: WorkloadAnswer["revisions"] }): Since[] {
  const created = Date.parse(a.state.created ?? "");
  return a.revisions.map((r, i) => {
    if (i < a.revisions.length - 1) return { time: r.time, before: false };
    // A Deployment's first revision is as old as it.
    if (r.revision === "1" && Number.isFinite(created)) return { time: created, before: false };
    if (!a.cut && created >= a.start) return { time: created, before: false };
    const pods = a.pods.filter((p) => r.revision && p.revision === r.revision).map((p) => Date.parse(p.created ?? "")).filter(Number.isFinite);
    return { time: Math.min(r.time, ...pods), before: true };
  });
}
