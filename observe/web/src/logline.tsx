// A line of a log on the screen. Its text is only ever text.
import { useMemo } from "preact/hooks";
import { clockMs } from "./format";
import { hue } from "./hue";
import { parseLine, writer } from "./logs";
import { Icon } from "./icons";

const levelWords = { error: "error", warn: "warning", info: "info", debug: "debug", "": "" } as const;

/** What is usual has no icon. */
const levelIcons = { error: "bad", warn: "warn", debug: "idle" } as const;

/** Text with the places marked that a search found. */
export function Marked({ text, find }: { text: string; find: string }) {
  if (!find) return <>{text}</>;
  const parts = [], lower = text.toLowerCase(), wanted = find.toLowerCase();
  let from = 0;
  for (let i = lower.indexOf(wanted); i >= 0 && parts.length < 200; i = lower.indexOf(wanted, from)) {
    parts.push(text.slice(from, i), <mark key={i}>{text.slice(i, i + find.length)}</mark>);
    from = i + find.length;
  }
  return <>{parts}{text.slice(from)}</>;
}

export function LogLine({ at, labels, line, onOpen, open = false, find = "", repeated = 0, since = at, wrap = false }: {
  at: number; labels: Record<string, string>; line: string; onOpen?: () => void; open?: boolean; find?: string; repeated?: number; since?: number; wrap?: boolean;
}) {
  const p = useMemo(() => parseLine(line), [line]);
  const who = writer(labels);
  const proxy = labels.container === "istio-proxy";
  const level = p.level;
  const body = (
    <>
      <time dateTime={new Date(at).toISOString()}>{clockMs(at)}</time>
      <span class={`level ${level}`}>{level in levelIcons && <Icon name={levelIcons[level as keyof typeof levelIcons]} size={12} label={levelWords[level]} />}</span>
      <span class={`writer w${hue(who.workload)}`} title={[labels.namespace, labels.pod, labels.container].filter(Boolean).join(" / ")}>
        {who.workload}{who.pod && <small>{who.pod}</small>}{proxy && <small>proxy</small>}
      </span>
      <span class="text">
        {p.access ? (
          <><b>{p.access.code || "–"}</b> {p.access.method} <Marked text={p.access.path} find={find} /> <small>{p.access.duration} ms{p.access.flags && ` · ${p.access.flags}`}</small></>
        ) : (
          <><Marked text={p.message} find={find} />{p.fields.slice(0, 12).map(([k, v]) => <small key={k} class="pair"><i>{k}</i>=<Marked text={v.length > 80 ? v.slice(0, 80) + "…" : v} find={find} /></small>)}</>
        )}
      </span>
      {repeated > 1 && <span class="repeated" title={`${repeated} lines that differ only by numbers, the first of those shown at ${clockMs(since)}`}>×{repeated}</span>}
    </>
  );
  return onOpen ? (
    <button type="button" class={`line ${level} ${wrap ? "wrap" : ""}`} aria-expanded={open} onClick={onOpen}>{body}</button>
  ) : (
    <div class={`line ${level} ${wrap ? "wrap" : ""}`}>{body}</div>
  );
}
