// Opens the page of a running cluster, as `polymesh dashboard` serves it, in a browser. The end-to-end tests call it (test/e2e/page_test.go):
//
// node test/shipped.mjs ADDRESS CHROMIUM request NAMESPACE CALLER CALLED all|one [FOLDER for screenshots]
//   from the connection of two workloads to one request, its spans and its lines, by clicks, and to the connection by the keyboard; prints them as JSON. axe checks all views, or one
// node test/shipped.mjs ADDRESS CHROMIUM offline NAMESPACE WORKLOAD TEXT
//   what is shown of a cluster that is gone: a graph, and the lines of a workload with a text
import assert from "node:assert/strict";
import { mkdir, readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { chromium } from "playwright-core";

const [address, executablePath, what, ...args] = process.argv.slice(2);
const base = new URL(address).origin;
const limit = 180_000;

const browser = await chromium.launch({
  executablePath,
  args: ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});
const context = await browser.newContext({ viewport: { width: 1280, height: 800 }, timezoneId: "UTC", locale: "en-GB", reducedMotion: "reduce" });
const page = await context.newPage();
page.setDefaultTimeout(60_000);
const problems = [];
page.on("pageerror", (e) => problems.push(e.message));
page.on("console", (m) => {
  // Before the token is used there is no cookie; and what is looked for and not there is an answer.
  if (m.type() === "error" && !/status of 40[14]/.test(m.text())) problems.push(m.text());
});

async function settled() {
  await page.waitForFunction(() => document.querySelector("main") && !document.querySelector(".progress.on, .skeleton"));
}

async function show(path) {
  await page.goto(base + path);
  await settled();
}

/** Loads a view again until it has something: what is measured comes every 15 seconds. */
async function showUntil(path, has) {
  for (const end = Date.now() + limit; ; ) {
    await show(path);
    if (await has()) return;
    if (Date.now() > end) throw new Error(`${path} does not show it: ${(await page.locator("main").innerText()).slice(0, 2000)}`);
    await page.waitForTimeout(3000);
  }
}

/** Every view, in both color schemes, on a desk and on a phone: axe finds nothing. */
async function checkViews(views, shots) {
  const axe = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
  const failures = [];
  for (const [width, colorScheme] of [[1280, "light"], [1280, "dark"], [390, "light"], [390, "dark"]]) {
    await page.setViewportSize({ width, height: width < 500 ? 844 : 800 });
    await page.emulateMedia({ colorScheme, reducedMotion: "reduce" });
    for (const [name, path] of Object.entries(views)) {
      await show(path);
      await page.evaluate(axe);
      const { violations } = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
      for (const v of violations) failures.push(`${name}, ${width}, ${colorScheme}: ${v.id}: ${v.help}: ${v.nodes.slice(0, 3).map((n) => n.html.slice(0, 160)).join(" | ")}`);
      const wide = await page.evaluate(() => {
        const { clientWidth, scrollWidth } = document.documentElement;
        const over = [...document.querySelectorAll("body *")].filter((e) => e.getBoundingClientRect().right > clientWidth + 0.5).map((e) => e.outerHTML.slice(0, 160));
        return scrollWidth > clientWidth ? `${scrollWidth - clientWidth} pixels wider than the screen: ${over.slice(-4).join(" | ")}` : "";
      });
      if (wide) failures.push(`${name}, ${width}: ${wide}`);
      if (shots) {
        await mkdir(shots, { recursive: true });
        await page.screenshot({ path: join(shots, `${name}-${width}-${colorScheme}.png`) });
      }
    }
  }
  assert.deepEqual(failures, []);
}

async function request(namespace, caller, called, which, shots) {
  const edge = page.locator(".edge", { has: page.locator(`[aria-label^="${caller} calls ${called}"]`) });
  await showUntil(`/graph?ns=${namespace}`, async () => (await edge.count()) > 0);
  await edge.locator(".label").click();
  await settled();
  assert.equal(new URL(page.url()).pathname, `/edge/${namespace}/${caller}/${namespace}/${called}`);
  const requests = page.locator('a[href^="/request/"]');
  await showUntil(new URL(page.url()).pathname, async () => (await requests.count()) > 0);
  await requests.first().click();
  await settled();
  const path = new URL(page.url()).pathname;
  const lines = page.locator(".log [role=listitem]");
  const rows = page.locator(".waterfall [role=row].row");
  // The last proxies send their spans, and their lines, some seconds later.
  let counts = "";
  await showUntil(path, async () => {
    const before = counts;
    counts = `${await lines.count()} ${await rows.count()}`;
    return (await lines.count()) > 0 && counts === before;
  });
  const found = page.url();
  await walk(namespace, caller, called);
  await page.goto(found);
  await settled();
  const texts = [];
  for (const line of await lines.all()) {
    await line.locator("button").first().click();
    texts.push(await line.locator("pre").first().textContent());
  }
  const spans = await rows.allTextContents();
  const views = {
    request: path, overview: "/", graph: `/graph?ns=${namespace}`, edge: `/edge/${namespace}/${caller}/${namespace}/${called}`, logs: "/logs", traces: "/traces", metrics: "/metrics",
    workloads: "/workloads", workload: `/workloads/${namespace}/${called}`, rollouts: "/rollouts", events: "/events", nodes: "/nodes",
  };
  await checkViews(which === "all" ? views : { request: path }, shots);
  return { id: decodeURIComponent(path.split("/")[2]), lines: texts, spans };
}

/** The keyboard alone leads from the top of the page to a workload of the graph, along its calls to one of them, and into it. */
async function walk(namespace, caller, called) {
  await show(`/graph?ns=${namespace}`);
  const visited = [];
  const press = async (key, most, wanted) => {
    for (let i = 0; i < most && !visited.at(-1)?.startsWith(wanted); i++) {
      await page.keyboard.press(key);
      visited.push(await page.evaluate(() => document.activeElement.getAttribute("aria-label") ?? ""));
    }
  };
  await page.keyboard.press("Tab");
  await page.keyboard.press("Enter"); // skip to the view
  const edge = `${caller} calls ${called},`;
  await press("Tab", 80, `${caller}, namespace ${namespace}`);
  await press("ArrowRight", 1, edge);
  await press("ArrowDown", 8, edge);
  await press("ArrowUp", 8, edge);
  assert.ok(visited.at(-1).startsWith(edge), `the keyboard does not lead to "${edge}", but by ${visited.join(" | ")}`);
  await page.keyboard.press("Enter");
  await settled();
  assert.equal(new URL(page.url()).pathname, `/edge/${namespace}/${caller}/${namespace}/${called}`);
}

async function offline(namespace, workload, text) {
  await show("/");
  const overview = await page.locator("main").innerText();
  await show(`/logs?q=${encodeURIComponent(`{namespace="${namespace}",workload="${workload}"} |= "${text}"`)}&w=1h`);
  return { overview, lines: await page.locator(".log [role=listitem]").allTextContents() };
}

await page.goto(address);
// First comes a page that takes the token, and then opens the one that is meant.
await page.waitForFunction(() => document.querySelector("main") && !document.querySelector("#opening"));
await settled();
const result = await { request, offline }[what](...args);
assert.deepEqual(problems, []);
await browser.close();
console.log(JSON.stringify(result));
