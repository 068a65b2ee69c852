// Builds the page into observe/page/dist, which package page embeds: index.html, a script and a style sheet, each as gzip and brotli.
// Their names have the hash of their contents, so a browser may keep them forever. `node build.mjs` takes less than a second.
import { createHash } from "node:crypto";
import { mkdir, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { brotliCompressSync, constants, gzipSync } from "node:zlib";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = new URL(".", import.meta.url);
const dist = new URL(process.argv[2] ?? "../page/dist/", here);

const result = await build({
  absWorkingDir: fileURLToPath(here),
  entryPoints: { app: "src/main.tsx" },
  outdir: "out",
  bundle: true,
  minify: true,
  write: false,
  format: "esm",
  target: "es2022",
  jsx: "automatic",
  jsxImportSource: "preact",
  legalComments: "none",
  charset: "utf8",
  logLevel: "warning",
});

await mkdir(dist, { recursive: true });
for (const old of await readdir(dist)) {
  if (/\.(gz|br)$/.test(old)) await rm(new URL(old, dist));
}

let total = 0;
async function put(name, data) {
  // Level 9 and no time stamp: the same input gives the same bytes.
  const gzip = gzipSync(data, { level: 9 });
  total += gzip.length;
  await writeFile(new URL(`${name}.gz`, dist), gzip);
  await writeFile(new URL(`${name}.br`, dist), brotliCompressSync(data, { params: { [constants.BROTLI_PARAM_QUALITY]: 11, [constants.BROTLI_PARAM_SIZE_HINT]: data.length } }));
}

let html = await readFile(new URL("src/index.html", here), "utf8");
for (const file of result.outputFiles) {
  const kind = file.path.endsWith(".css") ? "css" : "js";
  const hash = createHash("sha256").update(file.contents).digest("hex").slice(0, 12);
  const name = `app-${hash}.${kind}`;
  html = html.replace(`app.${kind}`, name);
  await put(name, file.contents);
}
await put("index.html", Buffer.from(html));
// Whoever opens the page waits for it, also over a slow line.
const budget = 150_000;
if (total > budget) throw new Error(`the page has ${total} bytes as gzip, more than ${budget}`);
console.log(`${(total / 1000).toFixed(1)} KB gzip together`);
