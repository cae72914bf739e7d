// A library: upload, what it will take, submit; the job's own page follows it.
import { useState } from "preact/hooks";
import { post, upload } from "./api.js";
import { FileDrop, Heads, Problem, useTask } from "./parts.jsx";
import { Price, useEstimate } from "./predict.jsx";
import { bytes } from "./words.js";

// Records and their mean length, from the first 8 MB of a plain FASTA; null for a packed one.
async function measure(file) {
  const text = await file.slice(0, 8 << 20).text();
  if (!text.startsWith(">") && !text.includes("\n>")) return null;
  const records = text.split(/^>/m).slice(1);
  const total = records.reduce((n, r) => n + r.slice(r.indexOf("\n") + 1).replace(/\s/g, "").length, 0);
  const share = Math.min(1, (8 << 20) / file.size);
  return { records: Math.max(1, Math.round(records.length / share)), mean: Math.max(1, Math.round(total / records.length)) };
}

export function Library({ server }) {
  const heads = server.models.filter((m) => m.kind === "head" && m.task !== "per_residue").map((m) => m.aliases[0] ?? m.name);
  const [file, setFile] = useState(null);
  const [size, setSize] = useState(null);
  const [chosen, setChosen] = useState(heads.slice(0, 1));
  const [where, setWhere] = useState("");
  const [rank, setRank] = useState("");
  const [top, setTop] = useState(1000);
  const [diverse, setDiverse] = useState(false);
  const task = useTask();
  const price = useEstimate({ kind: "predict", records: size?.records, mean_length: size?.mean, heads: chosen }, Boolean(size && chosen.length));
  const start = () => task.run(async (signal) => {
    const stored = await upload(file, signal);
    const spec = { inputs: [`file:${stored.id}`], heads: chosen, top: Number(top) };
    if (where.trim()) spec.where = where.trim();
    if (rank.trim()) spec.rank = rank.trim();
    if (diverse) spec.diverse = 1;
    const job = await post("v1/jobs", { kind: "screen", spec, name: file.name.slice(0, 200) }, { signal });
    location.hash = `#/jobs/${job.id}`;
  });
  return (
    <>
      <h1>Screen a library</h1>
      <p>A FASTA file of any size becomes a ranked, explained table. The run goes on when this page is closed.</p>
      <FileDrop label="Drop the library here, or choose it" accept=".fasta,.fa,.faa,.gz,.bz2,.xz" id="library-file" onFile={async (f) => { setFile(f); setSize(await measure(f)); }} />
      {file && <p role="status">{file.name}, {bytes(file.size)}{size ? `: about ${size.records.toLocaleString("en")} proteins of ${size.mean} residues.` : "."} <Price price={price} /></p>}
      <Heads models={server.models.filter((m) => m.task !== "per_residue")} chosen={chosen} onChange={setChosen} />
      <div class="field"><label for="where">Keep only proteins for which (leave empty for all)</label>
        <input id="where" value={where} onInput={(e) => setWhere(e.target.value)} placeholder={`for example ${chosen[0] ?? "head"}.ood_percentile < 0.95`} size={60} />
        <small>Columns are HEAD.LABEL (a probability), HEAD.value and HEAD.ood_percentile; join with and, or, not.</small></div>
      <div class="field"><label for="rank">Best first by (leave empty for the heads' own scores)</label><input id="rank" value={rank} onInput={(e) => setRank(e.target.value)} size={60} /></div>
      <p class="tools"><label>At most <input type="number" min={1} value={top} onInput={(e) => setTop(e.target.value)} /> hits</label>
        <label><input type="checkbox" checked={diverse} onChange={(e) => setDiverse(e.target.checked)} /> one of each neighbourhood only</label></p>
      <p><button type="button" class="main" disabled={!file || !chosen.length || task.busy} onClick={start}>Screen</button> {task.busy && <span role="status">Uploading ... <button type="button" onClick={task.stop}>Stop</button></span>}</p>
      <Problem error={task.problem} />
    </>
  );
}
