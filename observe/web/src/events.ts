// Events that repeat. This file has no effects.
import type { ClusterEvent } from "./api";

interface Repeated {
  event: ClusterEvent;
  times: number;
  first: number;
}

/** Events with those that say the same of the same object once, with how often. */
export function repeatedEvents(events: ClusterEvent[]): Repeated[] {
  const list: Repeated[] = [], index = new Map<string, Repeated>();
  for (const e of events) {
    const key = JSON.stringify([e.namespace, e.kind, e.name, e.reason, e.text]);
    const known = index.get(key);
    if (known) {
      known.times += Math.max(1, e.count ?? 1);
      known.first = Math.min(known.first, e.time);
    } else {
      const r = { event: e, times: Math.max(1, e.count ?? 1), first: e.time };
      index.set(key, r);
      list.push(r);
    }
  }
  return list;
}
