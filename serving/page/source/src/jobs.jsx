// Jobs: the list, one with its live log, and what it left.
import { useEffect, useRef, useState } from "preact/hooks";
import { call, download, follow, get } from "./api.js";
import { Problem, Table, useTask } from "./parts.jsx";
import { Hits } from "./hits.jsx";
import { bytes, percent } from "./words.js";

const ENDED = ["SUCCEEDED", "FAILED", "CANCELLED"];
const when = (t) => (t ? new Date(t).toLocaleString() : "");

export function Jobs() {
  const [jobs, setJobs] = useState(null);
  const task = useTask();
  useEffect(() => { task.run(async (signal) => setJobs((await get("v1/jobs?limit=200", { signal })).data)); }, []);
  return (
    <>
      <h1>Jobs</h1>
      <Problem error={task.problem} />
      {jobs && (jobs.length ? (
        <Table rows={jobs} caption="Your jobs, newest first" onRow={(j) => { location.hash = `#/jobs/${j.id}`; }} columns={[
          { name: "job", sort: (j) => `${j.kind} ${j.name}` },
          { name: "state", sort: (j) => j.state, cell: (j) => <strong class={j.state.toLowerCase()}>{j.state.toLowerCase()}</strong> },
          { name: "progress", sort: (j) => j.progress?.fraction, cell: (j) => (j.progress ? `${j.progress.label} ${percent(j.progress.fraction)}` : "") },
          { name: "created", sort: (j) => j.created, cell: (j) => when(j.created) },
          { name: "what to know", sort: (j) => j.reason },
        ]} />
      ) : <p>No jobs yet. <a href="#/library">Screen a library</a> or <a href="#/train">train a head</a>.</p>)}
    </>
  );
}

export function Job({ argument: id, reload }) {
  const [job, setJob] = useState(null);
  const [lines, setLines] = useState([]);
  const [progress, setProgress] = useState(null);
  const [files, setFiles] = useState(null);
  const task = useTask();
  const log = useRef(null);
  const watch = () => task.run(async (signal) => {
    let now = await get(`v1/jobs/${id}`, { signal });
    setJob(now);
    await follow(id, (kind, data) => {
      if (kind === "message" || kind === "line") setLines((old) => [...old.slice(-499), data]);
      else if (kind === "progress") setProgress(JSON.parse(data));
    }, signal);
    now = await get(`v1/jobs/${id}`, { signal });
    setJob(now);
    setProgress(null);
    if (now.state === "SUCCEEDED") {
      setFiles((await get(`v1/jobs/${id}/result`, { signal })).data);
      if (now.registered) reload();
    }
  });
  useEffect(() => { watch(); }, [id]);
  useEffect(() => { if (log.current) log.current.scrollTop = log.current.scrollHeight; }, [lines]);
  if (!job) return <><h1>Job</h1><Problem error={task.problem} /></>;
  const shown = progress ?? (ENDED.includes(job.state) ? null : job.progress);
  return (
    <>
      <h1>{job.kind}: {job.name}</h1>
      <p role="status"><strong class={job.state.toLowerCase()}>{job.state.toLowerCase()}</strong>{job.attempt > 1 ? `, attempt ${job.attempt}` : ""}. Created {when(job.created)}{job.ended ? `, ended ${when(job.ended)}` : ""}.{" "}
        {job.waiting_before ? `${job.waiting_before} of your jobs are before it. ` : ""}{job.reason}</p>
      {shown && <p><progress max={1} value={shown.fraction} aria-label={shown.label} /> {shown.label} {percent(shown.fraction)}</p>}
      {!ENDED.includes(job.state) && <p><button type="button" onClick={() => call(`v1/jobs/${id}`, { method: "DELETE" }).then(watch)}>Cancel the job</button></p>}
      <Problem error={task.problem} />
      {job.registered && <p>It is registered as <a href={`#/models/${encodeURIComponent(job.registered)}`}>{job.registered}</a>: its card says how good it is.</p>}
      {files && job.kind === "screen" && <Hits job={job} files={files} />}
      {files && (
        <>
          <h2>Files</h2>
          <ul>{files.map((f) => <li key={f.name}><button type="button" class="link" onClick={() => download(f.href, f.name.split("/").pop())}>{f.name}</button> {bytes(f.bytes)}</li>)}</ul>
        </>
      )}
      <h2>Log</h2>
      <pre class="log" ref={log} tabIndex={0} aria-label="log of the job">{lines.join("\n")}</pre>
    </>
  );
}
