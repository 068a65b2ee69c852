// Opens every view in a browser, with the made-up afternoon that package page serves (TestBrowser): axe finds nothing in either color scheme and at
// either width, the keyboard goes through the graph, one request is found by clicks, and what others write stays text.
//
// node test/browser.mjs URL CHROMIUM [FOLDER for screenshots]
import assert from "node:assert/strict";
import { mkdir, readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { chromium } from "playwright-core";

const [base, executablePath, shots] = process.argv.slice(2);
const axe = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const request = "30450c11-359b-9e2d-9844-a7a456c25a09", untraced = "7f1d2c3b-4a59-4e68-8776-95a4b3c2d1e0";
const app = "polyglot-services";

const browser = await chromium.launch({
  executablePath,
  args: ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});

/** A page that fails the test on an error, and on anything that the policy rejects. */
async function open(options) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 800 }, timezoneId: "UTC", locale: "en-GB", reducedMotion: "reduce", ...options });
  const page = await context.newPage();
  page.setDefaultTimeout(60_000);
  page.problems = [];
  page.on("pageerror", (e) => page.problems.push(e.message));
  page.on("console", (m) => {
    // What is looked for and not there is an answer, which Chromium reports as an error.
    if (m.type() === "error" && !/status of 404/.test(m.text())) page.problems.push(m.text());
  });
  page.on("request", (r) => {
    if (!r.url().startsWith(base) && !r.url().startsWith("data:") && !r.url().startsWith("blob:")) page.problems.push(`asked ${r.url()}`);
  });
  return page;
}

async function show(page, path) {
  await page.goto(base + path);
  await settled(page);
}

/** Waits until nothing is loaded any more. */
async function settled(page) {
  await page.waitForFunction(() => document.querySelector("main") && !document.querySelector(".progress.on, .skeleton"));
  await page.waitForLoadState("networkidle");
}

/** What a phone's reader cannot see, or only by scrolling sideways. A graph is as wide as it needs to be. */
function cutOff(page) {
  return page.evaluate(() => {
    const found = [], room = document.documentElement.clientWidth;
    for (const e of document.querySelectorAll("main, main .panel, .table, .log, .line-details, nav.side, .menu .box")) {
      if (e.scrollWidth > e.clientWidth + 1) found.push(`${e.tagName} ${e.className}: ${e.scrollWidth} in ${e.clientWidth}`);
    }
    for (const e of document.querySelectorAll("nav.side a, .zoom button, .menu .box *")) {
      const r = e.getBoundingClientRect();
      if (r.left < 0 || r.right > room + 0.5) found.push(`${e.outerHTML.slice(0, 100)} is outside of the screen`);
    }
    const zoom = document.querySelector(".zoom")?.getBoundingClientRect(), stage = document.querySelector(".stage")?.getBoundingClientRect();
    if (zoom && stage && zoom.bottom > stage.top + 0.5) found.push("the buttons for the size cover the graph");
    return found;
  });
}

function done(page) {
  assert.deepEqual(page.problems, []);
  return page.context().close();
}

const found = await (await fetch(`${base}/api/polymesh/v1/traces?limit=2`)).json();
const views = {
  overview: "/",
  graph: "/graph",
  "graph-node": `/graph?sel=${encodeURIComponent(JSON.stringify(["workload", app, "fastapi-service"]))}`,
  "graph-table": "/graph?view=table",
  "graph-failing": "/graph?errors=1",
  edge: `/edge/${app}/node-service/${app}/rust-service`,
  "edge-tcp": `/edge/${app}/java-service/data/postgres`,
  request: `/request/${request}`,
  "request-untraced": `/request/${untraced}`,
  "request-missing": "/request/00000000-0000-4000-8000-000000000000",
  logs: "/logs",
  "logs-query": `/logs?q=${encodeURIComponent(`{workload="java-service"} |= "price"`)}&wrap=1&group=1`,
  "logs-metric": `/logs?q=${encodeURIComponent('sum by (workload) (count_over_time({job="pods"}[1m]))')}`,
  traces: "/traces",
  compare: `/compare/${found.traces[0].id}/${found.traces[1].id}`,
  metrics: "/metrics",
  "metrics-query": `/metrics?q=${encodeURIComponent('sum by (destination_workload) (rate(istio_requests_total{reporter="destination"}[5m]))')}`,
  workloads: "/workloads",
  workload: `/workloads/${app}/node-service?w=1h`,
  rollouts: "/rollouts",
  rollout: `/rollouts/${app}/java-service`,
  events: "/events",
  nodes: "/nodes",
  missing: "/nodes/x/y",
};

// Each view, in both color schemes, on a desk and on a phone.
for (const [name, width, colorScheme] of [["desk", 1280, "light"], ["desk", 1280, "dark"], ["phone", 390, "light"], ["phone", 390, "dark"]]) {
  const page = await open({ viewport: { width, height: width < 500 ? 844 : 800 }, colorScheme, isMobile: width < 500, hasTouch: width < 500 });
  const failures = [];
  for (const [view, path] of Object.entries(views)) {
    await show(page, path);
    assert.ok((await page.title()).includes("Polymesh"));
    await page.evaluate(axe);
    const { violations } = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
    for (const v of violations) failures.push(`${view}, ${name}, ${colorScheme}: ${v.id}: ${v.help}: ${v.nodes.slice(0, 3).map((n) => n.html.slice(0, 160)).join(" | ")}`);
    const wide = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
    if (wide > 0) failures.push(`${view}, ${name}: ${wide} pixels wider than the screen`);
    if (width < 500) failures.push(...(await cutOff(page)).map((what) => `${view}, ${name}: ${what}`));
    if (shots) {
      await mkdir(shots, { recursive: true });
      await page.screenshot({ path: join(shots, `${view}-${width}-${colorScheme}.png`) });
    }
  }
  assert.deepEqual(failures, []);
  await done(page);
}

{ // On a phone, what is opened fits, too: a line of a log, the menu of times.
  const page = await open({ viewport: { width: 390, height: 844 }, isMobile: true, hasTouch: true });
  await show(page, `/logs?q=${encodeURIComponent('{job="pods", container="istio-proxy"}')}`);
  await page.locator(".log [role=listitem] button").first().click();
  await page.locator(".line-details .context").waitFor();
  assert.ok((await page.locator(".line-details .facts dd").count()) > 5);
  assert.deepEqual(await cutOff(page), []);
  await page.getByRole("button", { name: /^Time: / }).click();
  const until = page.getByLabel("Until, UTC", { exact: true });
  assert.ok(await until.evaluate((e) => e.scrollWidth <= e.clientWidth && e.clientWidth >= 200));
  assert.deepEqual(await cutOff(page), []);
  await done(page);
}

{ // The icons of changes stand over their lines, and none covers another.
  const page = await open();
  const end = Date.parse("2026-03-02T14:00:00Z"), window = 7_200_000;
  for (const path of ["/?", "/nodes?", `/workloads/${app}/node-service?`]) {
    await show(page, `${path}t=2026-03-02T14:00:00Z&w=2h`);
    await page.locator(".chart .mark").first().waitFor();
    const charts = await page.locator(".chart:has(.mark)").evaluateAll((all) => all.map((c) => {
      const plot = c.querySelector(".u-over").getBoundingClientRect();
      return { left: plot.left, width: plot.width, marks: [...c.querySelectorAll(".mark")].map((m) => ({ at: (m.getBoundingClientRect().left + m.getBoundingClientRect().right) / 2, title: m.title })) };
    }));
    assert.ok(charts.length > 0);
    for (const { left, width, marks } of charts) {
      marks.forEach((m, i) => {
        const places = m.title.split("\n").map((line) => left + ((Date.parse(`2026-03-02T${line.slice(0, 8)}Z`) - (end - window)) / window) * width);
        assert.ok(places.some((x) => Math.abs(x - m.at) < 1.5), `${m.title} is at ${m.at}, not at ${places}`);
        assert.ok(i === 0 || m.at - marks[i - 1].at >= 13.5);
      });
    }
  }
  await done(page);
}

{ // Buckets without lines are there, the first one begins with the shown time, and alike lines are one with their number.
  const page = await open();
  const asked = page.waitForRequest((r) => r.url().includes("count_over_time"));
  await show(page, `/logs?t=2026-03-02T14:00:00Z&w=15m&group=1&q=${encodeURIComponent('{job="pods", container="app"}')}`);
  const query = new URL((await asked).url()).searchParams;
  const step = Number(query.get("step")) * 1000, from = Number(query.get("start").slice(0, -6));
  assert.equal(from - step, Date.parse("2026-03-02T13:45:00Z"));
  assert.match(query.get("query"), new RegExp(`\\[${step}ms\\]`));
  assert.match(await page.locator(".chart .u-legend").first().textContent(), /13:59:45 – 14:00:00/);
  const alike = (await page.locator(".log [role=listitem]").allTextContents()).map((t) => t.replace(/^[\d:.]+/, "").replace(/×\d+$/, "").replace(/[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{16,}|\d+(\.\d+)?/gi, "#"));
  assert.equal(new Set(alike).size, alike.length);
  assert.ok((await page.locator(".log .repeated").count()) > 0);
  await done(page);
}

{ // What lasts since before the time that was looked at has no begin that is made up.
  const page = await open();
  await page.route("**/v1/overview?**", async (r) => {
    const response = await r.fetch();
    const o = await response.json();
    await r.fulfill({ response, json: { ...o, statements: [{ level: "warn", text: "It broke.", why: "see `kubectl logs x`", since: Date.parse("2026-03-02T13:00:00Z"), earlier: true }] } });
  });
  await show(page, "/");
  assert.equal(await page.locator(".statements .since").textContent(), "since 13:00 or earlier");
  assert.equal(await page.locator(".statements code").textContent(), "kubectl logs x");
  // As far back as the nodes are asked about, the first one uses too much CPU; at an earlier time, its begin is known.
  await show(page, "/nodes?t=2026-03-02T14:00:00Z&w=15m");
  assert.match(await page.locator("tr", { hasText: "above 70 % for 10 min" }).textContent(), /before 13:40 more than 20 min/);
  await show(page, "/nodes?t=2026-03-02T13:50:00Z&w=15m");
  assert.match(await page.locator("tr", { hasText: "above 70 %" }).textContent(), /minutes13:34 15 min/);
  await done(page);
}

{ // The keys of the list each stand in one line.
  const page = await open();
  await show(page, "/");
  await page.keyboard.press("?");
  const boxes = await page.locator(".keys kbd").evaluateAll((all) => all.map((k) => ({ text: k.textContent, rows: k.getClientRects().length, height: k.getBoundingClientRect().height })));
  for (const b of boxes) assert.ok(b.rows === 1 && b.height < 30 && !b.text.includes(" "), JSON.stringify(b));
  await done(page);
}

{ // A gateway, which no sidecar sees receiving, has what it sends; and limits name their containers.
  const page = await open();
  await show(page, "/workloads");
  assert.match(await page.locator("tr", { hasText: "istio-ingressgateway" }).textContent(), /sends [\d.]+\/s/);
  await show(page, "/workloads/istio-system/istio-ingressgateway");
  assert.match(await page.locator("main").textContent(), /Requests per second that it sends/);
  await show(page, `/workloads/${app}/node-service`);
  assert.match(await page.locator(".chart", { hasText: "Memory by container" }).locator("figcaption").textContent(), /limit of app: \d+ MiB/);
  // In the list, use and limit are of the same container.
  await show(page, "/workloads");
  assert.match(await page.locator("tr", { hasText: "node-service" }).locator("td[data-label=Memory]").textContent(), /^\d+ MiBapp 9\d % of limit$/);
  await done(page);
}

{ // From the end of a container to what it wrote before, and from the use of a node to its pods.
  const page = await open();
  await show(page, `/workloads/${app}/node-service?w=1h`);
  await page.locator("td[data-label='Last end'] a", { hasText: "OOMKilled, code 137" }).click();
  await settled(page);
  const query = new URL(page.url()).searchParams;
  assert.match(query.get("q"), /^\{job="pods", namespace="polyglot-services", pod="node-service-[^"]+", container="app"\}$/);
  assert.equal(query.get("t"), "2026-03-02T13:51:01Z");
  await show(page, "/nodes");
  await page.locator("tr", { hasText: "192.0.2.1" }).locator("td[data-label=Memory] a").click();
  await settled(page);
  assert.ok((await page.locator("tbody tr").count()) > 3);
  await done(page);
}

{ // A view comes back with its filters, with the time of where one is; a second click clears them.
  const page = await open();
  await show(page, "/workloads?find=rust&trouble=1");
  const views = page.getByRole("navigation", { name: "Views" });
  await page.locator("tbody a").first().click();
  await settled(page);
  await page.keyboard.press("[");
  await views.getByRole("link", { name: "Workloads" }).click();
  await settled(page);
  const query = () => new URL(page.url()).searchParams;
  assert.deepEqual([query().get("find"), query().get("trouble")], ["rust", "1"]);
  assert.ok(query().get("t"));
  await views.getByRole("link", { name: "Graph" }).click();
  await settled(page);
  assert.equal(query().get("find"), null);
  await page.keyboard.press("g");
  await page.keyboard.press("w");
  await settled(page);
  assert.equal(query().get("find"), "rust");
  await views.getByRole("link", { name: "Workloads" }).click();
  await settled(page);
  assert.equal(query().get("find"), null);
  await done(page);
}

{ // The keyboard alone: from the top of the page to an edge of the graph, and into it.
  const page = await open();
  await show(page, "/graph");
  await page.keyboard.press("Tab");
  assert.equal(await page.evaluate(() => document.activeElement.textContent), "Skip to the view");
  await page.keyboard.press("Enter");
  const focused = () => page.evaluate(() => document.activeElement.getAttribute("aria-label") ?? "");
  for (let i = 0; i < 30 && !(await focused()).startsWith("istio-ingressgateway"); i++) await page.keyboard.press("Tab");
  assert.match(await focused(), /^istio-ingressgateway, namespace istio-system, called by 0, calls 2/);
  // Along the calls to where they fail.
  await page.keyboard.press("ArrowRight");
  assert.match(await focused(), /^istio-ingressgateway calls fastapi-service/);
  for (let i = 0; i < 4 && !(await focused()).startsWith("istio-ingressgateway calls fastapi-service,"); i++) await page.keyboard.press("ArrowDown");
  assert.match(await focused(), /^istio-ingressgateway calls fastapi-service, [\d.]+ requests per second, [\d.]+ % errors, p99 \d+ ms, 75 % of a rollout, mutual TLS$/);
  await page.keyboard.press("ArrowRight");
  assert.match(await focused(), /^fastapi-service, namespace polyglot-services, receives/);
  await page.keyboard.press("ArrowRight");
  for (let i = 0; i < 4 && !(await focused()).includes("calls java-service"); i++) await page.keyboard.press((await page.evaluate(() => document.activeElement.getBoundingClientRect().y > 400)) ? "ArrowUp" : "ArrowDown");
  assert.match(await focused(), /^fastapi-service calls java-service/);
  await page.keyboard.press("Enter");
  await settled(page);
  assert.equal(new URL(page.url()).pathname, `/edge/${app}/fastapi-service/${app}/java-service`);
  await page.goBack();
  await settled(page);
  assert.equal(new URL(page.url()).pathname, "/graph");
  // A node opens its panel, Escape closes it.
  const node = page.locator('[data-node][aria-label^="rust-service"]');
  await node.focus();
  await page.keyboard.press("Enter");
  assert.equal(await node.getAttribute("aria-pressed"), "true");
  assert.match(await page.locator(".side-panel").textContent(), /1 of 2 pods are ready/);
  await page.keyboard.press("Escape");
  assert.equal(await page.locator(".side-panel").count(), 0);
  // Keys of the page.
  await page.keyboard.press("v");
  await settled(page);
  assert.equal(await page.locator("tbody tr").count(), 9);
  await page.keyboard.press("g");
  await page.keyboard.press("n");
  await settled(page);
  assert.equal(new URL(page.url()).pathname, "/nodes");
  await page.keyboard.press("[");
  assert.ok(new URL(page.url()).searchParams.get("t"));
  await page.keyboard.press(".");
  assert.equal(new URL(page.url()).searchParams.get("t"), null);
  await page.keyboard.press("?");
  assert.ok(await page.locator("dialog[open]").isVisible());
  await page.keyboard.press("Escape");
  await page.keyboard.press("/");
  await page.keyboard.type("rust");
  await page.locator("[role=option]", { hasText: "rust-service" }).first().waitFor();
  await page.keyboard.press("ArrowDown");
  await page.keyboard.press("Enter");
  await settled(page);
  assert.equal(new URL(page.url()).pathname, `/workloads/${app}/rust-service`);
  await done(page);
}

{ // From an edge to one of its requests, and to what was logged about it: the same id everywhere.
  const page = await open();
  await show(page, "/graph");
  await page.locator(".edge", { has: page.locator('[aria-label^="node-service calls rust-service"]') }).locator(".label").click();
  await settled(page);
  assert.match(await page.locator("main").textContent(), /the connection to the pod failed; gave up after all retries/);
  assert.equal(new URL(await page.getByRole("link", { name: "Traces", exact: true }).last().evaluate((a) => a.href)).searchParams.get("service"), `rust-service.${app}`);
  const row = page.locator("tr", { hasText: "UF,URX", has: page.locator("a") }).first();
  await row.locator("a").first().click();
  await settled(page);
  const id = decodeURIComponent(new URL(page.url()).pathname.split("/")[2]);
  assert.match(id, /^[0-9a-f-]{36}$/);
  const rows = page.locator(".waterfall [role=row].row");
  assert.ok((await rows.count()) >= 10);
  assert.ok((await page.locator(".waterfall .row.bad").count()) > 0);
  const lines = page.locator(".log [role=listitem]");
  assert.ok((await lines.count()) >= 10);
  for (const line of await lines.all()) {
    await line.locator("button").first().click();
    assert.ok((await line.locator("pre").first().textContent()).includes(id));
  }
  // A part of the waterfall shows its lines only. Arrow keys go through the rows.
  await rows.first().focus();
  await page.keyboard.press("ArrowDown");
  await page.keyboard.press("ArrowDown");
  await page.keyboard.press("Enter");
  assert.ok(new URL(page.url()).searchParams.get("span"));
  assert.equal(await page.locator(".span-details").count(), 1);
  assert.equal(await lines.count(), 1);
  await done(page);
}

{ // The time slider: before the failures nothing fails, and the URL alone brings it back.
  const page = await open();
  await show(page, "/graph");
  const slider = page.locator('input[type="range"]');
  await slider.focus();
  for (let i = 0; i < 12; i++) await page.keyboard.press("ArrowLeft");
  await settled(page);
  const url = page.url();
  assert.ok(new URL(url).searchParams.get("t"));
  assert.equal(await page.locator(".drawing .edge.bad").count(), 0);
  const other = await open();
  await other.goto(url);
  await settled(other);
  assert.equal(await other.locator(".drawing .edge.bad").count(), 0);
  assert.equal(await other.locator("[data-edge]").count(), await page.locator("[data-edge]").count());
  await done(other);
  await done(page);
}

{ // What others write is text.
  const page = await open();
  await show(page, "/events");
  const text = await page.locator(".event-list").textContent();
  assert.ok(text.includes(`<img src=x onerror="document.title='owned'">`));
  assert.ok(text.includes("[click](javascript:alert(1))"));
  assert.equal(await page.locator("main img").count(), 0);
  for (const href of await page.locator("a[href]").evaluateAll((links) => links.map((a) => a.getAttribute("href")))) assert.match(href, /^(\/(?!\/)|#)/);
  const q = encodeURIComponent(`{job="events"} |= "onerror"`);
  await show(page, `/logs?q=${q}`);
  assert.ok((await page.locator(".log").textContent()).includes("<img src=x"));
  await show(page, `/workloads/${encodeURIComponent("<img src=x onerror=alert(1)>")}/${encodeURIComponent("..%2f")}`);
  assert.equal(await page.locator("main img").count(), 0);
  assert.equal((await fetch(`${base}/constructor`)).status, 404);
  await show(page, "/edge/constructor");
  assert.match(await page.locator("main").textContent(), /There is no such view/);
  await done(page);
}

{ // Logs: completion, lines around a line, and files.
  const page = await open();
  await show(page, "/logs");
  const box = page.getByLabel("LogQL query", { exact: true });
  await box.fill('{workload="ja');
  await page.locator("[role=option]", { hasText: "java-service" }).waitFor();
  await page.keyboard.press("ArrowDown");
  await page.keyboard.press("Enter");
  assert.equal(await box.inputValue(), '{workload="java-service"');
  await box.fill('{workload="java-service", container="app"} |= "price list"');
  await page.keyboard.press("Enter");
  await settled(page);
  const line = page.locator(".log [role=listitem] button").first();
  await line.click();
  await page.locator(".line-details .context").waitFor();
  assert.match(await page.locator(".line-details .context").textContent(), /price list is \d+ minutes old/);
  assert.equal(await page.locator(".log mark").first().textContent(), "price list");
  await page.getByRole("button", { name: "Save as a file" }).click();
  const [file] = await Promise.all([page.waitForEvent("download"), page.getByRole("button", { name: "CSV" }).click()]);
  assert.match(await readFile(await file.path(), "utf8"), /^time,namespace,workload/);
  await show(page, "/graph");
  await page.getByRole("button", { name: "Save as a file" }).click();
  const [svg] = await Promise.all([page.waitForEvent("download"), page.getByRole("button", { name: "SVG" }).click()]);
  const drawing = await readFile(await svg.path(), "utf8");
  assert.match(drawing, /^<svg/);
  assert.match(drawing, /rust-service/);
  assert.doesNotMatch(drawing, /var\(|light-dark|<script/);
  await done(page);
}

{ // New lines come while they are written, and what is shown is asked again.
  const page = await open();
  await show(page, `/logs?tail=1&q=${encodeURIComponent('{namespace="talk"}')}`);
  await page.locator(".log [role=listitem]").nth(2).waitFor();
  const first = await page.locator(".log .text").first().textContent();
  assert.match(first, /^line \d+$/);
  await page.waitForFunction((before) => document.querySelector(".log .text").textContent !== before, first);
  await page.getByRole("button", { name: "Hold" }).click();
  await page.locator("button", { hasText: "Go on" }).waitFor();
  await show(page, "/workloads");
  await page.waitForResponse((r) => r.url().includes("/workloads?"));
  await done(page);
}

{ // The cluster is gone: the page says so, and still shows what was recorded.
  const page = await open();
  await page.route("**/v1/state", async (r) => {
    const response = await r.fetch();
    const state = await response.json();
    await r.fulfill({ response, json: { ...state, reachable: false, since: new Date(state.now - 5 * 60_000).toISOString() } });
  });
  await show(page, "/graph");
  assert.match(await page.locator(".banner.bad").textContent(), /The cluster is gone since 13:55; you see what was recorded/);
  await page.evaluate(axe);
  assert.deepEqual((await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }))).violations.map((v) => v.id), []);
  await page.getByRole("button", { name: "Show the time before" }).click();
  await settled(page);
  assert.equal(new URL(page.url()).searchParams.get("t"), "2026-03-02T13:55:00Z");
  assert.ok((await page.locator("[data-edge]").count()) > 5);
  await done(page);
}

{ // The store does not answer any more: what was there stays.
  const page = await open();
  await show(page, "/workloads");
  await page.route("**/api/**", (r) => r.abort());
  await page.locator(".banner.bad").waitFor();
  assert.ok((await page.locator("tbody tr").count()) > 5);
  page.problems = page.problems.filter((p) => !/ERR_FAILED/.test(p));
  await done(page);
}

await browser.close();
console.log(`${Object.keys(views).length} views, no violation, no error`);
