// Builds the tests of the page's pure functions and runs them with Node's test runner: Node 20 does not read TypeScript.
import { spawnSync } from "node:child_process";
import { mkdtemp, readdir, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = fileURLToPath(new URL(".", import.meta.url));
const out = await mkdtemp(join(tmpdir(), "polymesh-page-"));
const tests = (await readdir(join(here, "test"))).filter((name) => name.endsWith(".test.ts") || name.endsWith(".test.tsx"));
try {
  await build({
    absWorkingDir: here, entryPoints: tests.map((name) => join("test", name)), outdir: out, outExtension: { ".js": ".mjs" }, bundle: true, platform: "node", format: "esm", target: "node20",
    jsx: "automatic", jsxImportSource: "preact", logLevel: "warning", loader: { ".css": "empty" },
  });
  const run = spawnSync(process.execPath, ["--test", ...(await readdir(out)).map((name) => join(out, name))], { stdio: "inherit" });
  process.exitCode = run.status ?? 1;
} finally {
  await rm(out, { recursive: true, force: true });
}
