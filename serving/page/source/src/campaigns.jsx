// Campaigns: which variants next. Start one, propose a plate, drop its results in, see what it found.
import { useEffect, useState } from "preact/hooks";
import { call, download, get, post } from "./api.js";
import { parse, parseCsv } from "./fasta.js";
import { Chart, FileDrop, Problem, Table, useTask } from "./parts.jsx";
import { number } from "./words.js";

export function Campaigns() {
  const [all, setAll] = useState(null);
  const [form, setForm] = useState({ name: "", wild: "", objectives: "fitness", sites: "", mutations: "", batch: 96 });
  const list = useTask();
  const task = useTask();
  useEffect(() => { list.run(async (signal) => setAll((await get("v1/campaigns", { signal })).data)); }, []);
  const set = (name) => (e) => setForm({ ...form, [name]: e.target.value });
  const start = () => task.run(async (signal) => {
    const words = (text) => text.split(/[\s,]+/).filter(Boolean);
    const body = { wild_type: parse(form.wild)[0]?.sequence ?? "", objectives: words(form.objectives), sites: words(form.sites).map(Number), batch: Number(form.batch) };
    if (form.name) body.name = form.name;
    if (form.mutations) body.mutations = Number(form.mutations);
    const made = await post("v1/campaigns", body, { signal });
    location.hash = `#/campaigns/${made.id}`;
  });
  return (
    <>
      <h1>Campaigns</h1>
      <p>A plate of variants is proposed, you measure it, and what it says decides the next one.</p>
      <Problem error={list.problem} />
      {all?.length > 0 && (
        <Table rows={all} caption="Your campaigns, newest first" onRow={(c) => { location.hash = `#/campaigns/${c.id}`; }} columns={[
          { name: "campaign", sort: (c) => c.name },
          { name: "created", sort: (c) => c.created, cell: (c) => new Date(c.created).toLocaleString() },
        ]} />
      )}
      <h2>Start one</h2>
      <div class="field"><label for="campaign-name">Name</label>{" "}<input id="campaign-name" value={form.name} onInput={set("name")} /></div>
      <div class="field"><label for="campaign-wild">Wild type</label><textarea id="campaign-wild" rows={3} spellcheck={false} value={form.wild} onInput={set("wild")} /></div>
      <div class="field"><label for="campaign-objectives">What is measured</label>{" "}<input id="campaign-objectives" value={form.objectives} onInput={set("objectives")} />
        <small>Names of the columns of your results; several with commas. fitness:min is lowered, fitness:&gt;=2 a threshold.</small></div>
      <div class="field"><label for="campaign-sites">Positions that may change</label>{" "}<input id="campaign-sites" value={form.sites} onInput={set("sites")} /><small>As 39, 40, 41, 54; none for all of them.</small></div>
      <div class="field"><label for="campaign-mutations">At most so many mutations</label>{" "}<input id="campaign-mutations" type="number" min={1} value={form.mutations} onInput={set("mutations")} /><small>None for all combinations of the positions.</small></div>
      <div class="field"><label for="campaign-batch">Wells a round, controls included</label>{" "}<input id="campaign-batch" type="number" min={1} value={form.batch} onInput={set("batch")} /></div>
      <p><button type="button" class="main" disabled={task.busy || !form.wild.trim()} onClick={start}>Start the campaign</button> {task.busy && <span role="status">Scoring every substitution ...</span>}</p>
      <Problem error={task.problem} />
    </>
  );
}

// {round/well: {event, round, well, variant, values}} of a ledger: of a well the last row counts.
function fold(text) {
  const [names, ...rows] = parseCsv(text);
  const objectives = names.slice(5).filter((n, i, all) => i < all.length / 2);
  const wells = {};
  for (const r of rows) {
    if (r[0] === "commit" || r.length < 5) continue;
    wells[`${r[1]}/${r[2]}`] = { event: r[0], round: Number(r[1]), well: r[2], variant: r[3], values: Object.fromEntries(objectives.map((o, i) => [o, r[5 + i] === "" ? null : Number(r[5 + i])])) };
  }
  return { objectives, wells: Object.values(wells) };
}

export function Campaign({ argument: id }) {
  const [info, setInfo] = useState(null);
  const [ledger, setLedger] = useState(null);
  const [round, setRound] = useState(0);
  const [said, setSaid] = useState("");
  const look = useTask();
  const task = useTask();
  const load = () => look.run(async (signal) => {
    const [now, text] = await Promise.all([get(`v1/campaigns/${id}`, { signal }), call(`v1/campaigns/${id}/ledger`, { signal }).then((r) => r.text())]);
    setInfo(now);
    setLedger(fold(text));
    setRound(now.rounds);
  });
  useEffect(() => { load(); }, [id]);
  if (!info || !ledger) return <><h1>Campaign</h1><Problem error={look.problem} /></>;
  const propose = () => task.run(async (signal) => {
    const job = await post("v1/jobs", { kind: "propose", spec: { campaign: id } }, { signal });
    location.hash = `#/jobs/${job.id}`;
  });
  const ingest = (file) => task.run(async (signal) => {
    setSaid("");
    const taken = await (await call(`v1/campaigns/${id}/ingest`, { method: "POST", body: file, type: "text/csv", signal })).json();
    setSaid(`${file.name}: ${taken.measured} wells measured, ${taken.failed} failed, ${taken.unproposed} that were not proposed.`);
    await load();
  });
  const plate = ledger.wells.filter((w) => w.round === round && /^[A-Z]+\d+$/.test(w.well));
  const first = ledger.objectives[0];
  return (
    <>
      <h1>Campaign: {info.name}</h1>
      <p role="status">{info.space.toLocaleString("en")} variants in the space; {info.rounds === 1 ? "1 round" : `${info.rounds} rounds`} so far. Wells: {Object.entries(info.wells).filter(([, n]) => n).map(([event, n]) => `${n} ${event}`).join(", ") || "none yet"}.</p>
      {Object.entries(info.best).map(([objective, b]) => b && <p key={objective}>Best {objective.split(":")[0]}: <strong>{b.variant}</strong> {number(b.value)}</p>)}
      <p class="tools">
        <button type="button" class="main" disabled={task.busy} onClick={propose}>Propose the next plate</button>
        <FileDrop label="Drop the results here: CSV with well or variant, and a column of values" accept=".csv" onFile={ingest} id="results-file" />
        <button type="button" onClick={() => task.run(() => download(`v1/campaigns/${id}/report`, "report.html"))}>Download the report</button>
      </p>
      {said && <p role="status">{said}</p>}
      <Problem error={task.problem ?? look.problem} />
      {info.rounds > 0 && <Best ledger={ledger} info={info} />}
      {info.rounds > 0 && (
        <>
          <h2>Plate</h2>
          <p class="tools">
            <label>Round <select value={round} onChange={(e) => setRound(Number(e.target.value))}>{Array.from({ length: info.rounds }, (_, i) => <option key={i} value={i + 1}>{i + 1}</option>)}</select></label>
            <button type="button" onClick={() => download(`v1/campaigns/${id}/plates/${round}`, `plate-${round}.csv`)}>Download plate.csv</button>
          </p>
          <Map plate={plate} objective={first} />
          <Table rows={plate} caption={`Wells of round ${round}`} columns={[
            { name: "well", sort: (w) => w.well },
            { name: "variant", sort: (w) => w.variant },
            { name: "state", sort: (w) => w.event },
            ...ledger.objectives.map((o) => ({ name: o, numeric: true, sort: (w) => w.values[o] })),
          ]} />
        </>
      )}
    </>
  );
}

function Map({ plate, objective }) {
  const rows = plate.map((w) => ({ ...w, row: w.well.match(/^[A-Z]+/)[0], column: Number(w.well.match(/\d+/)[0]), value: w.values[objective] }));
  const measured = rows.filter((w) => w.value != null);
  return (
    <Chart depends={[plate]} label={`Plate map: ${rows.length} wells, ${measured.length} with ${objective}`}
      draw={(Plot, width) => Plot.plot({
        width: Math.min(width, 760), height: 300, padding: 0.08, style: { background: "transparent" }, x: { axis: "top", label: null }, y: { label: null },
        color: { type: "linear", scheme: "viridis", legend: measured.length > 0, label: objective },
        marks: [
          Plot.cell(rows, { x: "column", y: "row", fill: "var(--soft)", stroke: "currentColor", strokeOpacity: 0.35, title: (w) => `${w.well} ${w.variant}\n${w.event}` }),
          Plot.cell(measured, { x: "column", y: "row", fill: (w) => w.value, title: (w) => `${w.well} ${w.variant}\n${objective} ${number(w.value)}` }),
          Plot.text(rows.filter((w) => w.variant === "WT"), { x: "column", y: "row", text: () => "WT", fill: "currentColor", stroke: "var(--paper)", strokeWidth: 3, fontSize: 9 }),
        ],
      })} />
  );
}

function Best({ ledger, info }) {
  const lines = [];
  for (const spec of info.settings.objectives) {
    const [name, goal] = spec.split(":");
    if (goal && goal !== "max" && goal !== "min") continue;
    let best = null;
    for (let r = 1; r <= info.rounds; r += 1) {
      for (const w of ledger.wells) {
        const v = w.round === r && w.event === "measured" ? w.values[name] : null;
        if (v != null && (best == null || (goal === "min" ? v < best : v > best))) best = v;
      }
      if (best != null) lines.push({ round: r, best, name });
    }
  }
  if (!lines.length) return null;
  return (
    <>
      <h2>Best well so far</h2>
      <Chart depends={[ledger]} label={`Best by round: ${lines.map((l) => `${l.name} ${number(l.best)} after round ${l.round}`).join("; ")}`}
        draw={(Plot, width) => Plot.plot({ width: Math.min(width, 560), height: 220, grid: true, style: { background: "transparent" }, x: { label: "round", ticks: Array.from({ length: info.rounds }, (_, i) => i + 1), tickFormat: "d" }, y: { label: "best" }, color: { scheme: "observable10", legend: ledger.objectives.length > 1 },
          marks: [Plot.lineY(lines, { x: "round", y: "best", stroke: "name" }), Plot.dot(lines, { x: "round", y: "best", fill: "name", r: 4 })] })} />
    </>
  );
}
