// One protein: tracks along it, every substitution, and what stands behind the answers.
import { useEffect, useMemo, useState } from "preact/hooks";
import { post, predict, save } from "./api.js";
import { csv, parse } from "./fasta.js";
import { kept } from "./kept.js";
import { Chart, Problem, Table, useTask } from "./parts.jsx";
import { Trust } from "./predict.jsx";
import { certainty, number, told } from "./words.js";

const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999"]; // Okabe and Ito 2008

export function Protein({ server }) {
  const [text, setText] = useState(kept.protein ? `>${kept.protein.id}\n${kept.protein.sequence}` : kept.single ?? "");
  const [given, setGiven] = useState(null);
  const [scan, setScan] = useState(null);
  const [answer, setAnswer] = useState(null);
  const task = useTask();
  const heads = server.models.filter((m) => m.kind === "head").map((m) => m.aliases[0] ?? m.name);
  kept.single = text;
  const look = (record) => task.run(async (signal) => {
    setGiven(record);
    setScan(null);
    setAnswer(null);
    if (heads.length) setAnswer((await predict(server.limits, [record], heads, { long_sequences: "window", nearest: 0 }, null, signal))[0]);
    setScan(await post("v1/scan", { sequence: record.sequence, long_sequences: "window" }, { signal }));
  });
  useEffect(() => {
    if (kept.protein) { look(kept.protein); kept.protein = null; }
  }, []);
  const record = useMemo(() => parse(text)[0], [text]);
  return (
    <>
      <h1>One protein</h1>
      <div class="field">
        <label for="protein">Sequence</label>
        <textarea id="protein" rows={4} spellcheck={false} value={text} onInput={(e) => setText(e.target.value)} />
      </div>
      <p><button type="button" class="main" disabled={task.busy || !record?.sequence} onClick={() => look(record)}>Look at it</button>{" "}
        {task.busy && <span role="status">{answer || !heads.length ? "Scoring every substitution, with homologs ..." : "Asking the heads ..."} <button type="button" onClick={task.stop}>Stop</button></span>}</p>
      <Problem error={task.problem} />
      {given && (answer || scan) && <h2>{given.id} <small>{given.description} {given.sequence.length} residues</small></h2>}
      {answer && <Answers answer={answer} />}
      {(answer || scan) && <Tracks sequence={given.sequence} answer={answer} scan={scan} />}
      {scan && <Scan id={given.id} sequence={given.sequence} scan={scan} />}
    </>
  );
}

function Answers({ answer }) {
  const rows = Object.entries(answer.predictions).filter(([, p]) => p.task !== "per_residue");
  if (!rows.length) return null;
  return (
    <div class="scroll" tabIndex={0} role="region" aria-label="answers of the heads">
      <table>
        <caption>What the heads say</caption>
        <thead><tr><th scope="col">property</th><th scope="col">answer</th><th scope="col">how sure</th><th scope="col">nearest training protein</th><th scope="col">trust</th></tr></thead>
        <tbody>
          {rows.map(([head, p]) => (
            <tr key={head}><th scope="row"><a href={`#/models/${head}@${p.version}`}>{head.replaceAll("_", " ")}</a></th><td>{told(p)}</td><td>{certainty(p)}</td><td>{p.nearest?.[0]?.text ?? (p.homologs ? "no homolog" : "not searched")}</td><td><Trust p={p} /></td></tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

function Tracks({ sequence, answer, scan }) {
  const tracks = Object.entries(answer?.predictions ?? {}).filter(([, p]) => p.task === "per_residue" && typeof p.value === "string");
  const cells = tracks.flatMap(([head, p]) => [...p.value].map((label, i) => ({ track: head.replaceAll("_", " "), place: i + 1, label, residue: sequence[i] })));
  const depth = scan?.depth?.map((d, i) => ({ place: i + 1, depth: d }));
  if (!cells.length && !depth) return null;
  const labels = [...new Set(cells.map((c) => c.label))].sort();
  return (
    <>
      <h3>Along the chain</h3>
      {cells.length > 0 && <Chart depends={[cells.length, sequence]} label={`By residue: ${tracks.map(([h]) => h.replaceAll("_", " ")).join(", ")} (${labels.join(", ")})`}
        draw={(Plot, width) => Plot.plot({
          width, height: 40 + 34 * tracks.length, marginLeft: 140, x: { label: "residue" }, y: { label: null }, style: { background: "transparent" },
          color: { domain: labels, range: COLOURS, legend: true },
          marks: [Plot.rect(cells, { x1: (d) => d.place - 0.5, x2: (d) => d.place + 0.5, y: "track", fill: "label", title: (d) => `${d.residue}${d.place}: ${d.label}` })],
        })} />}
      {depth && <Chart depends={[scan]} label={`Homologs that cover each residue (effective number); ${scan.homologs ? `${scan.homologs.number} found in ${scan.homologs.source}` : "none were sought"}`}
        draw={(Plot, width) => Plot.plot({
          width, height: 130, marginLeft: 140, x: { label: "residue", domain: [1, sequence.length] }, y: { label: "homologs", grid: true }, style: { background: "transparent" },
          marks: [Plot.areaY(depth, { x: "place", y: "depth", fill: COLOURS[0], fillOpacity: 0.6, curve: "step" }), Plot.ruleY([0])],
        })} />}
    </>
  );
}

function Scan({ id, sequence, scan }) {
  const [from, setFrom] = useState(1);
  const WIDE = 120;
  const last = Math.min(sequence.length, from + WIDE - 1);
  const all = useMemo(() => scan.scores.flatMap((row, p) => row.map((score, l) => ({ place: p + 1, residue: scan.letters[l], wild: sequence[p], score }))), [scan]);
  const cells = all.filter((c) => c.place >= from && c.place <= last);
  const most = Math.max(...all.map((c) => Math.abs(c.score)));
  const changes = useMemo(() => all.filter((c) => c.residue !== c.wild), [all]);
  return (
    <>
      <h3>Every substitution</h3>
      <p>Above 0 is likelier than the residue that is there, below 0 less likely (natural logarithm of the ratio). {scan.notes.join(" ")}</p>
      {sequence.length > WIDE && (
        <p class="tools"><label>First residue shown <input type="range" min={1} max={sequence.length - WIDE + 1} value={from} onInput={(e) => setFrom(Number(e.target.value))} /></label> {from} to {last}</p>
      )}
      <Chart depends={[scan, from]} label={`Scores of all substitutions at residues ${from} to ${last}; a dot marks the residue that is there`}
        draw={(Plot, width) => Plot.plot({
          width: Math.max(width, 9 * (last - from + 1)), height: 400, marginLeft: 40, padding: 0, style: { background: "transparent" },
          x: { label: "residue", domain: Array.from({ length: last - from + 1 }, (_, i) => from + i), tickFormat: (p) => ((p - from) % 10 === 0 ? `${sequence[p - 1]}${p}` : "") , tickSize: 0 },
          y: { label: "to", domain: [...scan.letters] },
          color: { type: "diverging", scheme: "PuOr", domain: [-most, most], legend: true, label: "score" },
          marks: [
            Plot.cell(cells, { x: "place", y: "residue", fill: "score", title: (d) => `${d.wild}${d.place}${d.residue}: ${number(d.score)}` }),
            Plot.dot(cells.filter((c) => c.residue === c.wild), { x: "place", y: "residue", r: 1.5, fill: "black" }),
          ],
        })} />
      <Table rows={changes} caption="All substitutions" page={20} columns={[
        { name: "variant", sort: (r) => `${r.wild}${r.place}${r.residue}` },
        { name: "position", sort: (r) => r.place, numeric: true },
        { name: "score", sort: (r) => r.score, numeric: true },
        { name: "homologs here", sort: (r) => scan.depth?.[r.place - 1], numeric: true },
      ]} />
      <p><button type="button" onClick={() => save(new Blob([csv([["variant", "score", "column_homologs"], ...changes.map((r) => [`${r.wild}${r.place}${r.residue}`, r.score, scan.depth?.[r.place - 1]])])], { type: "text/csv" }), `${id.replace(/[^\w.-]/g, "_")}-scan.csv`)}>Download as CSV</button></p>
    </>
  );
}
