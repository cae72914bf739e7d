// A table of labels becomes a head, as a job.
import { useState } from "preact/hooks";
import { post, upload } from "./api.js";
import { parse, parseCsv } from "./fasta.js";
import { FileDrop, Problem, useTask } from "./parts.jsx";

export function Train() {
  const [file, setFile] = useState(null);
  const [columns, setColumns] = useState([]);
  const [count, setCount] = useState(0);
  const [target, setTarget] = useState("");
  const [name, setName] = useState("");
  const [wild, setWild] = useState("");
  const task = useTask();
  const take = async (f) => {
    setFile(f);
    const rows = parseCsv((await f.slice(0, 1 << 20).text()).replaceAll("\t", ","));
    const names = rows[0] ?? [];
    setColumns(names);
    setCount(Math.round(((rows.length - 1) * f.size) / Math.min(f.size, 1 << 20)));
    const numeric = names.filter((_, i) => rows.slice(1, 50).every((r) => r[i] === undefined || r[i] === "" || !Number.isNaN(Number(r[i]))));
    setTarget(numeric.at(-1) ?? names.at(-1) ?? "");
    setName(f.name.replace(/\.[^.]*$/, "").replace(/[^A-Za-z0-9_.-]/g, "_").toLowerCase());
  };
  const start = () => task.run(async (signal) => {
    const stored = await upload(file, signal);
    const spec = { labels: `file:${stored.id}`, targets: [target], register: name };
    const protein = parse(wild)[0];
    if (protein?.sequence) {
      const text = new File([`>wild_type\n${protein.sequence}\n`], "wild_type.fasta");
      spec.wild_type = `file:${(await upload(text, signal)).id}`;
    }
    const job = await post("v1/jobs", { kind: "finetune", spec, name }, { signal });
    location.hash = `#/jobs/${job.id}`;
  });
  return (
    <>
      <h1>Train a head</h1>
      <p>A table of measured values becomes a property that this service predicts, with a card that says how good it is beside
        what is used today. A head that does not beat those is not registered.</p>
      <FileDrop label="Drop a CSV table here: a column of sequences or variants, and columns of values" accept=".csv,.tsv" onFile={take} id="label-file" />
      {file && (
        <>
          <p role="status">{file.name}: about {count.toLocaleString("en")} rows; columns {columns.join(", ")}.</p>
          <div class="field"><label for="target">Predict the column</label>{" "}<select id="target" value={target} onChange={(e) => setTarget(e.target.value)}>{columns.map((c) => <option key={c}>{c}</option>)}</select></div>
          <div class="field"><label for="head-name">Name of the head</label>{" "}<input id="head-name" value={name} onInput={(e) => setName(e.target.value)} /></div>
          <div class="field"><label for="wild">Wild type, where the rows are variants of one protein</label><textarea id="wild" rows={3} spellcheck={false} value={wild} onInput={(e) => setWild(e.target.value)} /></div>
          <p><button type="button" class="main" disabled={task.busy || !target || !name} onClick={start}>Train</button> {task.busy && <span role="status">Uploading ...</span>}</p>
        </>
      )}
      <Problem error={task.problem} />
    </>
  );
}
