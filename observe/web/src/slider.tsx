// The time slider: everything that was recorded, to be walked through.
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { api, type Extent, type Mark, useData } from "./api";
import { count, rate, when } from "./format";
import { Icon } from "./icons";
import { areas } from "./shapes";
import { live, now, place, set } from "./state";
import { markText } from "./chart";
import { placeMarks } from "./marks";
import { endOf, timeParam, windowOf } from "./url";

const height = 36;

export function Slider() {
  const { data } = useData<Extent>(api("extent"));
  const q = place.value.query;
  const w = windowOf(q).ms;
  const [playing, setPlaying] = useState(false);
  const track = useRef<HTMLDivElement>(null);
  const [room, setRoom] = useState(0);
  useLayoutEffect(() => {
    const host = track.current;
    if (!host) return;
    const observer = new ResizeObserver(() => setRoom(host.clientWidth));
    observer.observe(host);
    return () => observer.disconnect();
  }, []);
  const start = data?.start ?? now() - w, end = Math.max(data?.end ?? now(), start + 60_000);
  const at = Math.min(end, Math.max(start, endOf(q) ?? end));
  const window = useMemo(() => new URLSearchParams({ end: String(end), window: `${Math.max(60, Math.ceil((end - start) / 1000))}s` }), [data]);
  const { data: changes } = useData<{ marks: Mark[] }>(data && end - start <= 31 * 86_400_000 ? api("marks", window) : undefined, false);
  const step = Math.max(15_000, Math.min(w / 4, (end - start) / 100));

  useEffect(() => {
    if (!playing) return;
    const timer = setTimeout(() => {
      const next = at + Math.max(step, w / 4);
      if (next >= end) {
        setPlaying(false);
        set({ t: undefined }, true);
      } else set({ t: timeParam(next) }, true);
    }, 900);
    return () => clearTimeout(timer);
  }, [playing, at]);

  const requests = data?.requests[0]?.points ?? [], errors = data?.errors[0]?.points ?? [];
  const most = Math.max(1e-9, ...requests.map((p) => p[1]));
  const x = (t: number) => ((t - start) / (end - start)) * 1000;
  const area = (points: [number, number][], least = 0) => areas(points, 4 * Math.max(15_000, (end - start) / 150), (t) => x(t).toFixed(1), (v) => (height - (v > 0 ? Math.max(least, (v / most) * (height - 3)) : 0)).toFixed(1), height);
  const nearest = requests.reduce<[number, number] | undefined>((best, p) => (!best || Math.abs(p[0] - at) < Math.abs(best[0] - at) ? p : best), undefined);
  const marks = (changes?.marks ?? []).filter((m) => m.time >= start && m.time <= end);

  return (
    <div class="slider">
      <button type="button" class="icon-button" aria-label={playing ? "Stop the replay" : "Replay from here"} title={playing ? "Stop" : "Replay"} onClick={() => {
        if (!playing && at >= end - step) set({ t: timeParam(start + w) });
        setPlaying(!playing);
      }}>
        <Icon name={playing ? "pause" : "play"} />
      </button>
      <div class="track" ref={track}>
        <svg viewBox={`0 0 1000 ${height}`} preserveAspectRatio="none" aria-hidden="true">
          <rect class="window" x={x(at - w)} y="0" width={Math.max(2, x(at) - x(at - w))} height={height} />
          <path class="requests" d={area(requests)} />
          <path class="errors" d={area(errors, 3)} />
          <path class="at" d={`M${x(at)} 0V${height}`} />
        </svg>
        {room > 0 && placeMarks(marks, (t) => (x(t) / 1000) * room).map(({ mark: m, at, all }) => (
          <span key={`${m.time}${m.kind}${m.text}`} class={`mark ${m.kind}`} aria-hidden="true" title={all.slice(0, 12).map((c) => markText(c, false)).join("\n")} style={{ insetInlineStart: `${at.toFixed(1)}px` }}><Icon name={m.kind} size={12} /></span>
        ))}
        <input
          type="range" min={start} max={end} step={step} value={at} aria-label="Time" aria-valuetext={`${live.value ? "now" : when(at, now())}${nearest ? `, ${rate(nearest[1])}` : ""}`}
          onInput={(e) => {
            setPlaying(false);
            const t = Number(e.currentTarget.value);
            set({ t: t >= end - step ? undefined : timeParam(t) }, true);
          }}
        />
        <div class="scale" aria-hidden="true">
          <span>{when(start, now())}</span>
          <span>{data ? count(marks.length, "change", "changes") : ""}</span>
          <span>now</span>
        </div>
      </div>
      <output>{live.value ? "Live" : when(at, now())}</output>
    </div>
  );
}
