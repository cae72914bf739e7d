// `npm ci && npm run build`: bundles src/ into ../assets, with the licences of what is bundled and the hash of each file.
import { createHash } from "node:crypto";
import { existsSync, readFileSync, readdirSync, writeFileSync } from "node:fs";
import { build } from "esbuild";

const out = "../assets";
const made = await build({
  entryPoints: ["src/main.jsx"], bundle: true, minify: true, format: "esm", target: "es2022", outfile: `${out}/app.js`,
  jsx: "automatic", jsxImportSource: "preact", legalComments: "none", metafile: true, charset: "utf8",
});
writeFileSync(`${out}/style.css`, readFileSync("src/style.css"));
writeFileSync(`${out}/index.html`, readFileSync("src/index.html"));

const packages = new Set();
for (const path of Object.keys(made.metafile.inputs)) {
  const found = path.match(/^node_modules\/((?:@[^/]+\/)?[^/]+)\//);
  if (found) packages.add(found[1]);
}
const texts = [...packages].sort().map((name) => {
  const folder = `node_modules/${name}`;
  const { version, license } = JSON.parse(readFileSync(`${folder}/package.json`));
  const file = readdirSync(folder).find((f) => /^(licen[cs]e|copying)/i.test(f));
  return `${name} ${version} (${license})\n\n${file ? readFileSync(`${folder}/${file}`, "utf8").trim() : ""}\n`;
});
writeFileSync(`${out}/licences.txt`, texts.join("\n" + "-".repeat(80) + "\n\n"));

const hash = (file) => "sha256-" + createHash("sha256").update(readFileSync(`${out}/${file}`)).digest("base64");
const files = ["app.js", "icon.svg", "index.html", "licences.txt", "style.css"];
writeFileSync(`${out}/assets.json`, JSON.stringify(Object.fromEntries(files.map((f) => [f, hash(f)])), null, 2) + "\n");
if (!existsSync("package-lock.json")) console.warn("no package-lock.json");
