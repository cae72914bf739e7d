// The hits of a screen: a table with reasons, filters by range, and how two properties go together.
import { useEffect, useMemo, useState } from "preact/hooks";
import { call } from "./api.js";
import { parseCsv } from "./fasta.js";
import { Chart, Problem, Table, useTask } from "./parts.jsx";
import { number, percent } from "./words.js";

const MOST = 20_000;

export function Hits({ job, files }) {
  const [rows, setRows] = useState(null);
  const [ranges, setRanges] = useState({});
  const [axes, setAxes] = useState([]);
  const task = useTask();
  const file = files.find((f) => f.name === "hits.csv");
  useEffect(() => {
    if (!file) return;
    task.run(async (signal) => {
      const [names, ...body] = parseCsv(await (await call(file.href, { signal })).text());
      const kind = Object.fromEntries(names.map((n, i) => [n, body.length > 0 && body.every((r) => r[i] === "" || !Number.isNaN(Number(r[i]))) && n !== "id"]));
      setRows(body.slice(0, MOST).map((r) => Object.fromEntries(names.map((n, i) => [n, r[i] === "" ? null : kind[n] ? Number(r[i]) : r[i]]))));
    });
  }, [file?.href]);
  const names = rows?.length ? Object.keys(rows[0]) : [];
  const numeric = names.filter((n) => !["row", "rank", "length"].includes(n) && typeof rows.find((r) => r[n] != null)?.[n] === "number");
  const useful = numeric.filter((n) => new Set(rows.map((r) => r[n])).size > 2);
  const shown = useMemo(() => (rows ?? []).filter((r) => Object.entries(ranges).every(([n, low]) => r[n] != null && r[n] >= low)), [rows, ranges]);
  const heads = [...new Set(names.filter((n) => n.endsWith(".ood_percentile")).map((n) => n.slice(0, -15)))];
  if (!file) return null;
  const [x, y] = [axes[0] ?? useful.find((n) => n.endsWith(".ood_percentile")) ?? useful[0], axes[1] ?? useful[0]];
  return (
    <>
      <h2>Hits</h2>
      <Problem error={task.problem} />
      {rows && !rows.length && <p>No record passed the filter. Loosen it: {job.spec.where}</p>}
      {rows?.length === MOST && <p>The first {MOST.toLocaleString("en")} hits are shown; the files below hold all.</p>}
      {rows?.length > 0 && (
        <>
          {useful.length > 1 && (
            <>
              <p class="tools">
                <label>Across <select value={x} onChange={(e) => setAxes([e.target.value, y])}>{useful.map((n) => <option key={n}>{n}</option>)}</select></label>
                <label>Up <select value={y} onChange={(e) => setAxes([x, e.target.value])}>{useful.map((n) => <option key={n}>{n}</option>)}</select></label>
              </p>
              <Chart depends={[shown, x, y]} label={`${shown.length.toLocaleString("en")} hits: ${y} by ${x}`}
                draw={(Plot, width) => Plot.plot({ width: Math.min(width, 720), height: 320, grid: true, style: { background: "transparent" }, x: { label: x }, y: { label: y },
                  marks: [Plot.dot(shown.slice(0, 5000), { x: (r) => r[x], y: (r) => r[y], r: 2.5, fill: "#0072b2", fillOpacity: 0.6, title: (r) => `${r.id}\n${x} ${number(r[x])}\n${y} ${number(r[y])}` })] })} />
              <fieldset><legend>Keep hits with at least</legend>
                {useful.slice(0, 12).map((n) => {
                  const values = rows.map((r) => r[n]).filter((v) => v != null);
                  const [low, high] = [Math.min(...values), Math.max(...values)];
                  return <label class="choice" key={n}>{n} <input type="range" min={low} max={high} step={(high - low) / 100} value={ranges[n] ?? low} onInput={(e) => setRanges({ ...ranges, [n]: Number(e.target.value) })} /> {number(ranges[n] ?? low)}</label>;
                })}
                <button type="button" onClick={() => setRanges({})}>All again</button>
              </fieldset>
            </>
          )}
          <Table rows={shown} caption="Hits, best first" columns={[
            { name: "protein", sort: (r) => r.id },
            { name: "rank", sort: (r) => r.rank, numeric: true },
            { name: "why", sort: (r) => r.rank, cell: (r) => why(r, heads, job) },
            { name: "residues", sort: (r) => r.length, numeric: true },
            ...heads.map((h) => ({ name: h.replaceAll("_", " "), sort: (r) => r[`${h}.value`], numeric: typeof rows[0][`${h}.value`] === "number" })),
          ]} />
        </>
      )}
    </>
  );
}

function why(row, heads, job) {
  const parts = heads.map((h) => {
    const value = row[`${h}.value`];
    const labels = typeof value === "string" ? value.split(";").filter((l) => row[`${h}.${l}`] != null) : [];
    const said = typeof value === "number"
      ? `${h.replaceAll("_", " ")} ${number(value)}${row[`${h}.low`] != null ? ` (${number(row[`${h}.low`])} to ${number(row[`${h}.high`])})` : ""}`
      : labels.length ? labels.map((l) => `${l} ${percent(row[`${h}.${l}`])}`).join(", ") : `no label of ${h.replaceAll("_", " ")}`;
    const place = row[`${h}.ood_percentile`];
    const near = row[`${h}.nearest`];
    return `${said}${place != null && place >= 0.95 ? `, far from its training proteins (further than ${percent(place)})` : ""}${near ? `, nearest ${near} at ${percent(row[`${h}.nearest_identity`])} identity` : ""}`;
  });
  return `${parts.join("; ")}${job.spec.where ? `. Passes: ${job.spec.where}` : ""}`;
}
