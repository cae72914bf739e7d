// One protein: tracks along it, every substitution, and what stands behind the answers.
import { useEffect, useMemo, useState } from "preact/hooks";
import { get, post, predict, save } from "./api.js";
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
      {given && (answer || scan) && <Relatives key={given.sequence} sequence={given.sequence} />}
      {given && (answer || scan) && <Similar key={`s${given.sequence}`} sequence={given.sequence} />}
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

// Residues alike in kind have one colour; letters say the rest (Clustal's groups).
const KINDS = { A: "h", V: "h", L: "h", I: "h", M: "h", F: "h", W: "h", C: "h", K: "p", R: "p", D: "n", E: "n", S: "o", T: "o", N: "o", Q: "o", G: "s", P: "s", H: "a", Y: "a" };

function Relatives({ sequence }) {
  const [found, setFound] = useState(null);
  const [from, setFrom] = useState(1);
  const [most, setMost] = useState(30);
  const task = useTask();
  const WIDE = 80;
  const look = () => task.run(async (signal) => setFound(await post("v1/homologs", { sequence, most: 200 }, { signal })));
  const last = Math.min(sequence.length, from + WIDE - 1);
  const cut = (text) => text.slice(from - 1, last);
  return (
    <>
      <h3>Homologs, aligned</h3>
      {!found && <p><button type="button" disabled={task.busy} onClick={look}>Show its homologs</button> {task.busy && <span role="status">Searching ...</span>}</p>}
      <Problem error={task.problem} />
      {found && !found.number && <p>No homolog in {found.source}: nothing in this set resembles the protein.</p>}
      {found && found.number > 0 && (
        <>
          <p>{found.number.toLocaleString("en")} in {found.source}; the best {Math.min(most, found.data.length)} on the residues of the protein. A dot is the protein's own residue, a dash a gap; what a homolog has between two residues is left out.</p>
          {sequence.length > WIDE && (
            <p class="tools"><label>First residue shown <input type="range" aria-label="first residue of the alignment" min={1} max={sequence.length - WIDE + 1} value={from} onInput={(e) => setFrom(Number(e.target.value))} /></label> {from} to {last}</p>
          )}
          <div class="scroll" tabIndex={0} role="region" aria-label="alignment of the homologs">
            <table class="alignment">
              <caption>Residues {from} to {last}</caption>
              <thead><tr><th scope="col">protein</th><th scope="col">identity</th><th scope="col">covers</th><th scope="col">E-value</th><th scope="col">residues</th></tr></thead>
              <tbody>
                <tr><th scope="row">this one</th><td /><td /><td /><td><Row text={cut(found.query)} /></td></tr>
                {found.data.slice(0, most).map((h) => (
                  <tr key={h.id}><th scope="row">{h.id}</th><td class="num">{Math.round(100 * h.identity)} %</td><td class="num">{Math.round(100 * h.coverage)} %</td><td class="num">{h.e_value.toExponential(0)}</td><td><Row text={cut(h.aligned)} against={cut(found.query)} /></td></tr>
                ))}
              </tbody>
            </table>
          </div>
          <p class="tools">
            {most < found.data.length && <button type="button" onClick={() => setMost(found.data.length)}>Show all {found.data.length}</button>}
            <button type="button" onClick={() => save(new Blob([`>query\n${found.query}\n`, ...found.data.map((h) => `>${h.id}\n${h.aligned}\n`)], { type: "text/plain" }), "alignment.a3m")}>Download as a3m</button>
          </p>
        </>
      )}
    </>
  );
}

function Row({ text, against }) {
  return <code>{[...text].map((a, i) => (against && a === against[i] ? <span key={i} class="same">.</span> : <span key={i} class={`kind-${KINDS[a] ?? "none"}`}>{a}</span>))}</code>;
}

function Similar({ sequence }) {
  const [stores, setStores] = useState(null);
  const [store, setStore] = useState("");
  const [found, setFound] = useState(null);
  const task = useTask();
  useEffect(() => { task.run(async (signal) => { const all = (await get("v1/stores", { signal })).data; setStores(all); setStore(all[0]?.store ?? ""); }); }, []);
  const look = () => task.run(async (signal) => setFound(await post("v1/search", { store, sequences: [sequence], k: 20 }, { signal })));
  return (
    <>
      <h3>Similar proteins</h3>
      {stores?.length === 0 && <p>This service has no vector store. An admin makes one with <code>bioseq vectors add</code> and names it when the service starts.</p>}
      {stores?.length > 0 && (
        <p class="tools">
          <label>Among <select value={store} onChange={(e) => { setStore(e.target.value); setFound(null); }}>{stores.map((s) => <option key={s.store} value={s.store}>{s.store} ({s.vectors.toLocaleString("en")} proteins)</option>)}</select></label>
          <button type="button" disabled={task.busy} onClick={look}>Find the nearest by embedding</button>
        </p>
      )}
      <Problem error={task.problem} />
      {found && (
        <Table rows={found.data[0].hits} page={20} caption={`Nearest of ${found.vectors.toLocaleString("en")} by embedding. Near is alike to the model; it is no proof of a common ancestor.`} columns={[
          { name: "protein", sort: (h) => h.ids.join(", ") },
          { name: "similarity", sort: (h) => h.similarity, numeric: true },
        ]} />
      )}
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
