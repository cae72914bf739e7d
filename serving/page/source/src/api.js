// The public API, as any script would use it. The key stays in this module's memory: it is gone when the page is.
let key = "";
const listeners = new Set();

export const setKey = (value) => { key = value.trim(); listeners.forEach((f) => f()); };
export const hasKey = () => key !== "";
export const onKey = (f) => { listeners.add(f); return () => listeners.delete(f); };

export class Refused extends Error {
  constructor(status, problem) {
    super(problem.detail || problem.title || `the server answered ${status}`);
    this.status = status;
    this.code = problem.code || "";
    this.retryAfter = problem.retry_after;
  }
}

export async function call(path, { method = "GET", json, body, type, accept, signal } = {}) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (json !== undefined) headers["Content-Type"] = "application/json";
  else if (type) headers["Content-Type"] = type;
  if (accept) headers.Accept = accept;
  let response;
  try {
    response = await fetch(path.replace(/^\//, ""), { method, headers, body: json === undefined ? body : JSON.stringify(json), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, { detail: "The service does not answer. Is it running?", code: "unreachable" });
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let problem = {};
  try { problem = await response.json(); } catch { /* not a problem document */ }
  const after = response.headers.get("Retry-After");
  if (after) problem.retry_after = after;
  return new Refused(response.status, problem);
}

export const get = async (path, options) => (await call(path, options)).json();
export const post = async (path, json, options) => (await call(path, { ...options, method: "POST", json })).json();

// One request at most `max_items` long; what does not fit goes in the next one.
export async function predict(limits, records, heads, options, progress, signal) {
  const size = Math.min(limits.max_items, 200);
  const rows = [];
  for (let at = 0; at < records.length; at += size) {
    const part = records.slice(at, at + size);
    let answer;
    for (let tries = 0; ; tries += 1) {
      try {
        answer = await post("v1/predict", { sequences: part.map((r) => r.sequence), heads, ...options }, { signal });
        break;
      } catch (error) {
        if (![429, 503].includes(error.status) || tries === 5) throw error;
        await new Promise((done) => setTimeout(done, 1000 * (Number(error.retryAfter) || 2 ** tries)));
      }
    }
    answer.data.forEach((item, i) => rows.push({ ...part[i], predictions: item.predictions, notes: item.notes }));
    progress?.(rows.length);
  }
  return rows;
}

// The service takes plain names only.
export const plainName = (name) => name.replace(/[^A-Za-z0-9._+-]/g, "_").replace(/^[^A-Za-z0-9]+/, "").slice(-120) || "file";
export const upload = (file, signal) =>
  call(`v1/files?name=${encodeURIComponent(plainName(file.name))}`, { method: "POST", body: file, type: "application/octet-stream", signal }).then((r) => r.json());

// Server-sent events of a job: `fetch` and not EventSource, which cannot send the key.
export async function follow(id, on, signal) {
  let last = null;
  for (;;) {
    const path = `v1/jobs/${id}/logs?follow=true` + (last ? `&offset=${last}` : "");
    const response = await call(path, { accept: "text/event-stream", signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      held += value.replace(/\r\n/g, "\n");
      const events = held.split("\n\n");
      held = events.pop();
      for (const event of events) {
        let kind = "message";
        const data = [];
        for (const line of event.split("\n")) {
          if (line.startsWith("event:")) kind = line.slice(6).trim();
          else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
          else if (line.startsWith("id:")) last = line.slice(3).trim();
        }
        if (data.length) on(kind, data.join("\n"));
        if (kind === "end") return;
      }
    }
    await new Promise((done) => setTimeout(done, 1000)); // the connection broke: go on from the last line
  }
}

export async function download(path, name) {
  const blob = await (await call(path)).blob();
  save(blob, name);
}

export function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
