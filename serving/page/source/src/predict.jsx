// Sequences in, a table of what the heads say out, with how far to trust each answer.
import { useEffect, useMemo, useState } from "preact/hooks";
import { post, predict, save } from "./api.js";
import { csv, parse, residues } from "./fasta.js";
import { FileDrop, Heads, Problem, Table, useTask } from "./parts.jsx";
import { kept } from "./kept.js";
import { certainty, seconds, told, trust } from "./words.js";

const EXAMPLE = `>P69905 hemoglobin subunit alpha
MVLSPADKTNVKAAWGKVGAHAGEYGAEALERMFLSFPTTKTYFPHFDLSHGSAQVKGHGKKVADALTNAVAHVDDMPNALSALSDLHAHKLRVDPVNFKLLSHCLLVTLAAHLPAEFTPAVHASLDKFLASVSTVLTSKYR
>P0DTC2_tail a stretch that no head was trained on
GGGGSGGGGSGGGGSEAAAKEAAAKEAAAK
`;

export function useEstimate(body, ready) {
  const [price, setPrice] = useState(null);
  const text = JSON.stringify(body);
  useEffect(() => {
    setPrice(null);
    if (!ready) return undefined;
    const timer = setTimeout(async () => {
      try { setPrice(await post("v1/estimate", JSON.parse(text))); } catch (error) { setPrice({ problem: error }); }
    }, 400);
    return () => clearTimeout(timer);
  }, [text, ready]);
  return price;
}

export function Price({ price }) {
  if (!price) return null;
  if (price.problem) return <Problem error={price.problem} />;
  const total = price.seconds + (price.search_seconds ?? 0) + (price.wait_seconds ?? 0);
  return <span> {price.tokens.toLocaleString("en")} tokens, {seconds(total)}{price.search_seconds > 1 ? ", most of it the search for homologs" : ""}{price.wait_seconds > 1 ? `, ${seconds(price.wait_seconds)} of it waiting for others` : ""}.</span>;
}

export function Predict({ server }) {
  const heads = server.models.filter((m) => m.kind === "head").map((m) => m.aliases[0] ?? m.name);
  const [text, setText] = useState(kept.text ?? "");
  const [chosen, setChosen] = useState(kept.heads ?? heads.slice(0, 3));
  const [rows, setRows] = useState(kept.rows ?? null);
  const [done, setDone] = useState(0);
  const task = useTask();
  const records = useMemo(() => parse(text), [text]);
  const count = residues(records);
  const over = records.length > server.limits.max_items;
  const price = useEstimate(
    { kind: "predict", lengths: records.slice(0, server.limits.max_items).map((r) => r.sequence.length), heads: chosen },
    records.length > 0 && chosen.length > 0 && !over && records.every((r) => r.sequence),
  );
  Object.assign(kept, { text, heads: chosen, rows });
  const start = () => task.run(async (signal) => {
    setRows(null);
    setDone(0);
    setRows(await predict(server.limits, records, chosen, { long_sequences: "window" }, setDone, signal));
  });
  const columns = useMemo(() => [
    { name: "protein", sort: (r) => r.id },
    { name: "residues", sort: (r) => r.sequence.length, numeric: true },
    ...chosen.filter((h) => rows?.[0]?.predictions[h]).flatMap((h) => [
      { name: h.replaceAll("_", " "), sort: (r) => { const p = r.predictions[h]; return typeof p.value === "number" ? p.value : told(p); },
        cell: (r) => { const p = r.predictions[h]; return p.task === "per_residue" ? <Strand value={p.value} /> : <>{told(p)}<small class="sure">{certainty(p)}</small></>; } },
      { name: `${h.replaceAll("_", " ")}: trust`, sort: (r) => -(r.predictions[h].ood_percentile ?? 0), cell: (r) => <Trust p={r.predictions[h]} /> },
    ]),
  ], [rows]);
  const table = () => csv([
    ["id", "residues", ...chosen.flatMap((h) => [h, `${h}.how_sure`, `${h}.ood_percentile`, `${h}.nearest`, `${h}.nearest_identity`, `${h}.trust`])],
    ...rows.map((r) => [r.id, r.sequence.length, ...chosen.flatMap((h) => { const p = r.predictions[h]; return [p.task === "per_residue" ? p.value : told(p), certainty(p), p.ood_percentile, p.nearest?.[0]?.id, p.nearest?.[0]?.identity, trust(p).sentence]; })]),
  ]);
  return (
    <>
      <h1>What are these proteins like?</h1>
      <div class="field">
        <label for="sequences">Paste sequences: FASTA, or one a line</label>
        <textarea id="sequences" rows={9} spellcheck={false} value={text} onInput={(e) => setText(e.target.value)} />
      </div>
      <p class="tools">
        <FileDrop label="or drop a FASTA file here" accept=".fasta,.fa,.faa,.txt" onFile={async (f) => setText(await f.text())} id="fasta-file" />
        <button type="button" onClick={() => setText(EXAMPLE)}>Put in two examples</button>
      </p>
      <Heads models={server.models} chosen={chosen} onChange={setChosen} />
      <p role="status">
        {records.length.toLocaleString("en")} {records.length === 1 ? "sequence" : "sequences"}, {count.toLocaleString("en")} residues.
        <Price price={price} />
        {over && <> This service answers {server.limits.max_items.toLocaleString("en")} at once; <a href="#/library">screen them as a library</a>.</>}
      </p>
      <p>
        <button type="button" class="main" disabled={task.busy || !records.length || !chosen.length || over} onClick={start}>Predict</button>{" "}
        {task.busy && <><progress max={records.length} value={done} aria-label="sequences answered" /> <button type="button" onClick={task.stop}>Stop</button></>}
      </p>
      <Problem error={task.problem} />
      {rows && (
        <>
          <Table rows={rows} columns={columns} caption="Predictions. Click a protein for its own page." onRow={(r) => { kept.protein = r; location.hash = "#/protein"; }} />
          <p><button type="button" onClick={() => save(new Blob([table()], { type: "text/csv" }), "predictions.csv")}>Download as CSV</button></p>
        </>
      )}
    </>
  );
}

export function Trust({ p }) {
  const { level, sentence } = trust(p);
  return <span class="trust"><strong class={level}>{level}</strong> {sentence}</span>;
}

export function Strand({ value }) {
  const counts = {};
  for (const c of value) counts[c] = (counts[c] ?? 0) + 1;
  return <span>{Object.entries(counts).sort((a, b) => b[1] - a[1]).map(([c, n]) => `${c} ${Math.round((100 * n) / value.length)} %`).join(", ")}</span>;
}
