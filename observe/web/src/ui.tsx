// The parts of which views are made.
import type { ComponentChildren } from "preact";
import { useEffect, useId, useRef, useState } from "preact/hooks";
import type { Data } from "./api";
import { ago, codeParts, csv, percent, when } from "./format";
import { Icon, type IconName } from "./icons";
import type { Since } from "./since";
import { filtersIn, now, place, set } from "./state";
import { type Change, ownPath, placeOf } from "./url";

/** A link within the page. It keeps the time and the namespaces. */
export function Link({ to, query, children, ...rest }: { to: string[]; query?: Change; children: ComponentChildren; class?: string; title?: string; "aria-label"?: string; "aria-current"?: "page" | undefined }) {
  return (
    <a href={placeOf(place.value, to, query)} {...rest}>
      {children}
    </a>
  );
}

/** A link to one of the views of the navigation, with the filters that it had when it was left. */
export function ViewLink({ view, ...rest }: { view: string; children: ComponentChildren; "aria-current"?: "page" | undefined }) {
  return <Link to={view ? [view] : []} query={filtersIn(view)} {...rest} />;
}

/** The URL of a path that the store made, with time and namespaces. */
export function ownLink(link: string | undefined): string | undefined {
  const to = link === undefined ? undefined : ownPath(link);
  if (!to) return undefined;
  const query: Change = {};
  for (const name of new Set(to.query.keys())) query[name] = to.query.getAll(name);
  return placeOf(place.value, to.path, query);
}

export const levelIcon = { bad: "bad", warn: "warn", note: "note", ok: "ok", idle: "idle" } as const;
export type Level = keyof typeof levelIcon;

/** A word with an icon and a color. */
export function Badge({ level, children, icon }: { level: Level; children: ComponentChildren; icon?: IconName }) {
  return (
    <span class={`badge ${level}`}>
      <Icon name={icon ?? levelIcon[level]} size={12} />
      {children}
    </span>
  );
}

export function Panel({ title, actions, children, class: className = "" }: { title?: ComponentChildren; actions?: ComponentChildren; children: ComponentChildren; class?: string }) {
  return (
    <section class={`panel ${className}`}>
      {(title || actions) && (
        <header>
          {title && <h2>{title}</h2>}
          {actions && <div class="actions">{actions}</div>}
        </header>
      )}
      {children}
    </section>
  );
}

export function Stat({ label, value, hint, level }: { label: string; value: ComponentChildren; hint?: ComponentChildren; level?: Level }) {
  return (
    <div class={`stat ${level ?? ""}`}>
      <dt>{label}</dt>
      <dd>
        <strong>
          {level && level !== "ok" && level !== "idle" && <Icon name={levelIcon[level]} size={14} />}
          {value}
        </strong>
        {hint && <small>{hint}</small>}
      </dd>
    </div>
  );
}

export function Empty({ title, children, icon = "note" }: { title: string; children?: ComponentChildren; icon?: IconName }) {
  return (
    <div class="empty">
      <Icon name={icon} size={28} />
      <p class="title">{title}</p>
      {children && <div>{children}</div>}
    </div>
  );
}

/** What a view shows while it has no data, or why it has none. */
export function Waiting<T>({ of, children }: { of: Data<T>; children: (data: T) => ComponentChildren }) {
  return (
    <>
      {of.error && (
        <div class="failure" role="alert">
          <Icon name="warn" />
          <span>
            {of.error.message}
            {of.data && " What you see is from before."}
          </span>
        </div>
      )}
      <div class={`progress ${of.loading ? "on" : ""}`} role="status" aria-live="polite">
        {of.loading && <span class="unseen">Loading</span>}
      </div>
      {of.data ? children(of.data) : of.loading ? <div class="skeleton" aria-hidden="true"><i /><i /><i /></div> : null}
    </>
  );
}

/** A time, with how long ago as its title, or the other way round. */
export function Time({ at, relative = false, seconds = false }: { at: number; relative?: boolean; seconds?: boolean }) {
  const n = now();
  const absolute = when(at, n, seconds), distance = ago(at, n);
  return (
    <time dateTime={new Date(at).toISOString()} title={relative ? when(at, n, true) : `${new Date(at).toString()} (${distance})`}>
      {relative ? distance : absolute}
    </time>
  );
}

/** A time, or the one before which it was. */
export function SinceTime({ of }: { of: Since }) {
  return <>{of.before && "before "}<Time at={of.time} /></>;
}

/** A text in which what is between backticks is code. */
export function Prose({ text }: { text: string }) {
  return <>{codeParts(text).map((p, i) => (p.code ? <code key={i}>{p.text}</code> : p.text))}</>;
}

/** A share of something as a bar with its text. */
export function Meter({ share, text, level }: { share: number | undefined; text: string; level?: Level }) {
  return (
    <span class={`meter ${level ?? ""}`}>
      <span class="track" aria-hidden="true">
        {share !== undefined && <span style={{ inlineSize: `${Math.min(100, Math.max(0, share * 100))}%` }} />}
      </span>
      <span>{text}</span>
    </span>
  );
}

export function Copy({ text, label }: { text: string; label: string }) {
  const [done, setDone] = useState(false);
  return (
    <button
      type="button" class="icon-button" title={label} aria-label={done ? "Copied" : label}
      onClick={() => {
        void navigator.clipboard?.writeText(text).then(() => {
          setDone(true);
          setTimeout(() => setDone(false), 1500);
        });
      }}
    >
      <Icon name={done ? "ok" : "copy"} />
    </button>
  );
}

/** A button that opens a box. It closes with Escape, and when the focus or a click goes elsewhere. */
export function Menu({ label, text, icon, children, class: className = "", right = false }: { label: string; text?: ComponentChildren; icon?: IconName; children: ComponentChildren | ((close: () => void) => ComponentChildren); class?: string; right?: boolean }) {
  const [open, setOpen] = useState(false);
  const box = useRef<HTMLDivElement>(null), button = useRef<HTMLButtonElement>(null);
  const id = useId();
  useEffect(() => {
    if (!open) return;
    const outside = (e: Event) => {
      if (e.target instanceof Node && !box.current?.contains(e.target)) setOpen(false);
    };
    document.addEventListener("pointerdown", outside);
    return () => document.removeEventListener("pointerdown", outside);
  }, [open]);
  const close = () => {
    setOpen(false);
    button.current?.focus();
  };
  return (
    <div
      class={`menu ${className}`} ref={box}
      onKeyDown={(e) => {
        if (e.key === "Escape" && open) {
          e.stopPropagation();
          close();
        }
      }}
      onFocusOut={(e) => {
        if (e.relatedTarget instanceof Node && !box.current?.contains(e.relatedTarget)) setOpen(false);
      }}
    >
      <button ref={button} type="button" aria-expanded={open} aria-controls={id} aria-label={label} title={text ? undefined : label} class={text ? "" : "icon-button"} onClick={() => setOpen(!open)}>
        {icon && <Icon name={icon} />}
        {text}
        {text && <Icon name="down" size={10} />}
      </button>
      {open && (
        <div class={`box ${right ? "right" : ""}`} id={id}>
          {typeof children === "function" ? children(close) : children}
        </div>
      )}
    </div>
  );
}

export interface Column<T> {
  key: string;
  title: string;
  /** Numbers stand at the right. */
  number?: boolean;
  value: (row: T) => string | number | undefined;
  cell?: (row: T) => ComponentChildren;
  class?: string;
}

/** A table that can be sorted; how is part of the URL. On a narrow screen each row becomes a card. */
export function Table<T>({ columns, rows, caption, id, sorted, rowClass, limit = 300, name }: {
  columns: Column<T>[]; rows: T[]; caption: string; id: (row: T) => string; sorted?: string; rowClass?: (row: T) => string; limit?: number;
  /** Of the parameter with the order, for pages with several tables. */
  name?: string;
}) {
  const [all, setAll] = useState(false);
  const parameter = name ?? "sort";
  const order = place.value.query.get(parameter) ?? sorted ?? "";
  const down = order.startsWith("-"), key = order.replace(/^-/, "");
  const column = columns.find((c) => c.key === key);
  let list = rows;
  if (column) {
    list = [...rows].sort((a, b) => {
      const x = column.value(a), y = column.value(b);
      if (x === undefined || y === undefined) return (x === undefined ? 1 : 0) - (y === undefined ? 1 : 0);
      const c = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), undefined, { numeric: true });
      return down ? -c : c;
    });
  }
  const shown = all ? list : list.slice(0, limit);
  return (
    <>
      <div class="table" tabIndex={0} role="region" aria-label={caption}>
        <table>
          <caption class="unseen">{caption}</caption>
          <thead>
            <tr>
              {columns.map((c) => (
                <th key={c.key} scope="col" class={`${c.number ? "number" : ""} ${c.class ?? ""}`} aria-sort={c.key === key ? (down ? "descending" : "ascending") : undefined}>
                  <button type="button" onClick={() => set({ [parameter]: c.key === key ? (down ? c.key : "-" + c.key) : c.number ? "-" + c.key : c.key }, true)}>
                    {c.title}
                    <span class="order" aria-hidden="true">{c.key === key ? (down ? "↓" : "↑") : ""}</span>
                  </button>
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {shown.map((row) => (
              <tr key={id(row)} class={rowClass?.(row)}>
                {columns.map((c) => (
                  <td key={c.key} data-label={c.title} class={`${c.number ? "number" : ""} ${c.class ?? ""}`}>
                    {c.cell ? c.cell(row) : (c.value(row) ?? "–")}
                  </td>
                ))}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      {list.length > shown.length && (
        <p class="more">
          <button type="button" onClick={() => setAll(true)}>Show all {list.length} rows</button>
        </p>
      )}
    </>
  );
}

/** Saves a text as a file. */
export function download(name: string, type: string, text: string): void {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const a = document.createElement("a");
  a.href = url;
  a.download = name;
  a.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** A menu to save data. */
export function Export({ name, json, rows, svg }: { name: string; json?: () => unknown; rows?: () => (string | number)[][]; svg?: () => string | undefined }) {
  const file = (ext: string) => `${name.replace(/[^\w.-]+/g, "-").slice(0, 80)}.${ext}`;
  return (
    <Menu label="Save as a file" icon="download" text="Save" right>
      {(close) => (
        <div class="list">
          {json && <button type="button" onClick={() => { download(file("json"), "application/json", JSON.stringify(json(), null, 2) + "\n"); close(); }}>JSON</button>}
          {rows && <button type="button" onClick={() => { download(file("csv"), "text/csv", csv(rows())); close(); }}>CSV</button>}
          {svg && <button type="button" onClick={() => { const text = svg(); if (text) download(file("svg"), "image/svg+xml", text); close(); }}>SVG</button>}
        </div>
      )}
    </Menu>
  );
}

/** A choice of a few, as buttons. */
export function Choice<T extends string>({ label, value, options, onChange }: { label: string; value: T; options: { value: T; text: ComponentChildren }[]; onChange: (value: T) => void }) {
  return (
    <div class="choice" role="group" aria-label={label}>
      {options.map((o) => (
        <button key={o.value} type="button" aria-pressed={o.value === value} onClick={() => onChange(o.value)}>{o.text}</button>
      ))}
    </div>
  );
}

/** The share of failed requests, with a level. */
export function Errors({ rate, errors }: { rate: number; errors: number }) {
  if (rate <= 0) return <span class="muted">–</span>;
  const share = errors / rate;
  if (share < 0.0005) return <span class="muted">0 %</span>;
  return share >= 0.01 ? <Badge level={share >= 0.05 ? "bad" : "warn"}>{percent(share)}</Badge> : <span>{percent(share)}</span>;
}

/** A checkbox that is a parameter of the URL. */
export function Flag({ name, children }: { name: string; children: ComponentChildren }) {
  const on = place.value.query.get(name) === "1";
  return (
    <label class="flag">
      <input type="checkbox" checked={on} onChange={(e) => set({ [name]: e.currentTarget.checked ? "1" : undefined })} />
      {children}
    </label>
  );
}

/** A text that is a parameter of the URL. It is set after a pause. */
export function Text({ name, label, placeholder, type = "search", list, width }: { name: string; label: string; placeholder?: string; type?: "search" | "number"; list?: string; width?: string }) {
  const value = place.value.query.get(name) ?? "";
  const [text, setText] = useState(value);
  const timer = useRef(0);
  useEffect(() => setText(value), [value]);
  return (
    <label class={`field ${width ?? ""}`}>
      <span>{label}</span>
      <input
        type={type} value={text} placeholder={placeholder} list={list} autocomplete="off" spellcheck={false}
        onInput={(e) => {
          const next = e.currentTarget.value;
          setText(next);
          clearTimeout(timer.current);
          timer.current = window.setTimeout(() => set({ [name]: next.trim() }, true), 350);
        }}
        onKeyDown={(e) => {
          if (e.key === "Enter") {
            clearTimeout(timer.current);
            set({ [name]: e.currentTarget.value.trim() });
          }
        }}
      />
    </label>
  );
}
