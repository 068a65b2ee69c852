// Icons of 16 by 16, drawn with the color of the text. They never stand alone: a text is next to them, or is their label.

const paths = {
  overview: "M1.5 8h3l2-5 3 10 2-5h3",
  graph: "M3.5 5.5a2 2 0 1 0 0-4 2 2 0 0 0 0 4zM12.5 10a2 2 0 1 0 0-4 2 2 0 0 0 0 4zM4.5 14.5a2 2 0 1 0 0-4 2 2 0 0 0 0 4zM5.4 4.3l5.2 2.8M6.3 11.6l4.4-2.5",
  logs: "M2 3.5h12M2 6.5h8M2 9.5h12M2 12.5h6",
  traces: "M1.5 3h9M4 6.3h8M6 9.6h6.5M8 13h6.5",
  metrics: "M1.5 1.5v13h13M4 11l3-4 2.5 2L14 4",
  workloads: "M8 1.5l6 3v7l-6 3-6-3v-7zM2 4.5l6 3 6-3M8 7.5v7",
  rollouts: "M1.5 13h3.5V9.5h4V6h3.5V2.5M9.5 2.5h3v0M10 5l2.5-2.5L15 5",
  events: "M8 1.5a4 4 0 0 0-4 4v3L2.5 11.5h11L12 8.5v-3a4 4 0 0 0-4-4zM6.5 14h3",
  nodes: "M2 2.5h12v4.5H2zM2 9h12v4.5H2zM4.5 4.750h.01M4.5 11.250h.01",
  lock: "M4 7h8v6.5H4zM5.5 7V5a2.5 2.5 0 0 1 5 0v2",
  unlock: "M4 7h8v6.5H4zM5.5 7V4.5a2.5 2.5 0 0 1 4.9-.7",
  unknown: "M6 6a2 2 0 1 1 2.8 1.9c-.6.3-.8.7-.8 1.6M8 12h.01",
  mixed: "M4 7h8v6.5H4zM5.5 7V5a2.5 2.5 0 0 1 5 0M8 9v2.5",
  ok: "M2.5 8.5l3.5 3.5 7.5-8",
  warn: "M8 2l6.5 11.5h-13zM8 6.5v3.5M8 11.8h.01",
  bad: "M8 1.5a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13zM5.5 5.5l5 5M10.5 5.5l-5 5",
  note: "M8 1.5a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13zM8 7.5v4M8 4.8h.01",
  idle: "M3 8h10",
  search: "M7 2a5 5 0 1 0 0 10A5 5 0 0 0 7 2zM11 11l3.5 3.5",
  left: "M10 3L5 8l5 5",
  right: "M6 3l5 5-5 5",
  down: "M3 6l5 5 5-5",
  play: "M4.5 2.5l8.5 5.5-8.5 5.5z",
  pause: "M5 3v10M11 3v10",
  download: "M8 2v8M4.5 7L8 10.5 11.5 7M2.5 13.5h11",
  copy: "M5.5 5.5h8v8h-8zM3.5 10.5h-1v-8h8v1",
  close: "M3.5 3.5l9 9M12.5 3.5l-9 9",
  plus: "M8 3v10M3 8h10",
  minus: "M3 8h10",
  fit: "M2 6V2h4M10 2h4v4M14 10v4h-4M6 14H2v-4",
  gateway: "M2 14V7a6 6 0 0 1 12 0v7M5.5 14V8.5a2.5 2.5 0 0 1 5 0V14",
  service: "M2.5 8h11M8 2.5v11M4 4l8 8M12 4l-8 8",
  external: "M8 1.5a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13zM1.5 8h13M8 1.5c2.5 2 2.5 11 0 13M8 1.5c-2.5 2-2.5 11 0 13",
  namespace: "M1.5 3.5h5l1.5 2h6.5v8h-13z",
  rest: "M3 8h.01M8 8h.01M13 8h.01",
  database: "M2.5 3.5c0-2.7 11-2.7 11 0v9c0 2.7-11 2.7-11 0zM2.5 3.5c0 2.7 11 2.7 11 0M2.5 8c0 2.7 11 2.7 11 0",
  deploy: "M8 13.5v-9M4 8l4-4 4 4M2.5 1.5h11",
  restart: "M13 8a5 5 0 1 1-1.6-3.7M13.5 1.5v3.5H10",
  oom: "M3 5h10v6H3zM5 2.5V5M8 2.5V5M11 2.5V5M5 11v2.5M8 11v2.5M11 11v2.5",
  evict: "M9 3H3v10h6M7 8h7M11.5 5.5L14 8l-2.5 2.5",
  node: "M2 4.5h12v7H2zM4.5 8h.01",
  rollout: "M1.5 13h4V9h4V5h5",
  keyboard: "M1.5 4h13v8.5h-13zM4 6.7h.01M6.7 6.7h.01M9.3 6.7h.01M12 6.7h.01M4.5 9.8h7",
  theme: "M8 1.5a6.5 6.5 0 1 0 0 13zM8 1.5a6.5 6.5 0 0 1 0 13",
  clock: "M8 1.5a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13zM8 4.5V8l2.5 2",
  table: "M1.5 2.5h13v11h-13zM1.5 6h13M1.5 9.7h13M6 6v7.5",
} as const;

export type IconName = keyof typeof paths;
export const iconPath = (name: IconName): string => paths[name];

/** An icon. Without a label it is decoration. */
export function Icon({ name, label, size = 16 }: { name: IconName; label?: string; size?: number }) {
  return (
    <svg class="icon" viewBox="0 0 16 16" width={size} height={size} {...(label ? { role: "img", "aria-label": label } : { "aria-hidden": "true" })}>
      <path d={paths[name]} />
    </svg>
  );
}
