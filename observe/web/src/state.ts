// What the page knows beside its data: where it is, what time the store has, and what was chosen for this browser.
import { computed, effect, signal } from "@preact/signals";
import { type Change, change, endOf, filtersOf, formatPlace, parsePlace, type Place, timeParam, windowOf } from "./url";

export const place = signal<Place>(parsePlace(location.href));
addEventListener("popstate", () => {
  place.value = parsePlace(location.href);
});

const filters = new Map<string, Change>();
effect(() => {
  const { path, query } = place.value;
  if (path.length <= 1) filters.set(path[0] ?? "", filtersOf(query));
});

/** The filters with which a view comes back: those that it had when it was left. Where one is already, there are none. */
export function filtersIn(view: string): Change {
  const { path } = place.value;
  return path.length <= 1 && (path[0] ?? "") === view ? {} : (filters.get(view) ?? {});
}

/** Goes to a URL of the page. With replace it takes the place of the current one in the history. */
export function go(url: string, replace = false): void {
  if (url === formatPlace(place.peek().path, place.peek().query)) return;
  if (replace) history.replaceState(null, "", url);
  else history.pushState(null, "", url);
  place.value = parsePlace(url);
}

/** Changes parameters of the current URL. */
export function set(by: Change, replace = false): void {
  const { path, query } = place.peek();
  go(formatPlace(path, change(query, by)), replace);
}

export interface StoreState {
  name: string;
  reachable: boolean;
  since?: string;
  offline?: boolean;
  now: number;
}

export const store = signal<StoreState | undefined>(undefined);
/** The store does not answer. */
export const lost = signal(false);
let skew = 0;

/** The store's time: the browser's clock may be wrong. */
export const now = (): number => Date.now() + skew;

/** Counts up while the page is live and seen. */
export const tick = signal(0);
export const live = computed(() => endOf(place.value.query) === undefined);

async function poll(): Promise<void> {
  try {
    const asked = Date.now();
    const response = await fetch("/api/polymesh/v1/state");
    if (!response.ok) throw new Error(response.statusText);
    const s = (await response.json()) as StoreState;
    skew = s.now - (asked + Date.now()) / 2;
    store.value = s;
    lost.value = false;
  } catch {
    lost.value = true;
  }
}

const pollEvery = 10_000;

/** How often what is shown is asked again: a long time changes slowly, and costs more to read. */
export const refreshOf = (window: number): number => Math.min(300_000, Math.max(10_000, window / 90));
let refreshed = Date.now();

/** Begins. It waits for the store's time, but not for long: a store that does not answer is shown, too. */
export async function start(): Promise<void> {
  applyTheme();
  await Promise.race([poll(), new Promise((done) => setTimeout(done, 1500))]);
  setInterval(() => {
    if (document.hidden) return;
    void poll();
    if (live.peek() && !store.peek()?.offline && Date.now() - refreshed >= refreshOf(windowOf(place.peek().query).ms) - 500) again();
  }, pollEvery);
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && live.peek()) again();
  });
}

function again(): void {
  refreshed = Date.now();
  tick.value++;
}

/** Moves the shown time by shares of its length; beyond now is live. */
export function shift(by: number): void {
  const q = place.peek().query;
  const { ms } = windowOf(q);
  const to = (endOf(q) ?? now()) + by * ms;
  set({ t: to >= now() - 1000 ? undefined : timeParam(to) });
}

export type Theme = "auto" | "light" | "dark";
export const theme = signal<Theme>(stored("theme", ["auto", "light", "dark"] as const) ?? "auto");
export const keys = signal(stored("keys", ["on", "off"] as const) !== "off");

function stored<T extends string>(name: string, allowed: readonly T[]): T | undefined {
  try {
    const value = localStorage.getItem("polymesh." + name);
    return allowed.find((a) => a === value);
  } catch {
    return undefined; // storage is off
  }
}

function remember(name: string, value: string): void {
  try {
    localStorage.setItem("polymesh." + name, value);
  } catch {
    // it lasts as long as the page
  }
}

/** Counts up when colors change: charts draw again. */
export const colors = signal(0);

function applyTheme(): void {
  document.documentElement.dataset.theme = theme.peek();
  colors.value++;
}

export function setTheme(value: Theme): void {
  theme.value = value;
  remember("theme", value);
  applyTheme();
}

export function setKeys(on: boolean): void {
  keys.value = on;
  remember("keys", on ? "on" : "off");
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => colors.value++);
