// API keys, for an admin: make one, see all, revoke one. A key's text is shown once.
import { useEffect, useState } from "preact/hooks";
import { call, get, post } from "./api.js";
import { Problem, Table, useTask } from "./parts.jsx";

const SCOPES = { read: "look at models, files and jobs", predict: "predict, score, search", train: "submit jobs, upload files", admin: "everything, and keys" };

export function Keys() {
  const [all, setAll] = useState(null);
  const [form, setForm] = useState({ name: "", scopes: ["read", "predict"], days: "", tokens: "" });
  const [made, setMade] = useState(null);
  const task = useTask();
  const load = async (signal) => setAll((await get("v1/keys", { signal })).data);
  useEffect(() => { task.run(load); }, []);
  const make = () => task.run(async (signal) => {
    const body = { name: form.name, scopes: form.scopes };
    if (form.days) body.days = Number(form.days);
    if (form.tokens) body.tokens_per_minute = Number(form.tokens);
    setMade(await post("v1/keys", body, { signal }));
    setForm({ ...form, name: "" });
    await load(signal);
  });
  const revoke = (key) => task.run(async (signal) => {
    if (!confirm(`Revoke the key of ${key.name}? What uses it stops working at once.`)) return;
    await call(`v1/keys/${key.id}`, { method: "DELETE", signal });
    await load(signal);
  });
  const state = (k) => (k.revoked ? "revoked" : k.expires && new Date(k.expires) < new Date() ? "expired" : "works");
  return (
    <>
      <h1>Keys</h1>
      <p>Whoever has a key may use this service. {all?.length === 0 && "There is none yet, and this computer needs none. From the first one on everybody does, so the first must be an admin's."}</p>
      <Problem error={task.problem} />
      {made && (
        <div class="key" role="status">
          <p>The key of <strong>{made.name}</strong>. Note it now: it is kept nowhere and not shown again.</p>
          <p><code class="secret">{made.key}</code></p>
          <p><button type="button" onClick={() => setMade(null)}>I have it</button></p>
        </div>
      )}
      {all?.length > 0 && (
        <Table rows={all} caption="All keys, oldest first" columns={[
          { name: "whose", sort: (k) => k.name },
          { name: "may", sort: (k) => k.scopes.join(", ") },
          { name: "tokens a minute", sort: (k) => k.tokens_per_minute, numeric: true },
          { name: "made", sort: (k) => k.created, cell: (k) => new Date(k.created).toLocaleDateString() },
          { name: "until", sort: (k) => k.expires, cell: (k) => (k.expires ? new Date(k.expires).toLocaleDateString() : "it is revoked") },
          { name: "state", sort: state },
          { name: "", sort: (k) => k.id, cell: (k) => (k.revoked ? "" : <button type="button" aria-label={`Revoke the key of ${k.name}`} onClick={() => revoke(k)}>Revoke</button>) },
        ]} />
      )}
      <h2>Make one</h2>
      <div class="field"><label for="key-name">For whom</label>{" "}<input id="key-name" maxLength={200} value={form.name} onInput={(e) => setForm({ ...form, name: e.target.value })} /></div>
      <fieldset>
        <legend>May</legend>
        {Object.entries(SCOPES).map(([scope, what]) => (
          <span class="choice" key={scope}><label><input type="checkbox" checked={form.scopes.includes(scope)} onChange={(e) => setForm({ ...form, scopes: e.target.checked ? [...form.scopes, scope] : form.scopes.filter((s) => s !== scope) })} /> {scope}: {what}</label></span>
        ))}
      </fieldset>
      <div class="field"><label for="key-days">Days until it expires</label>{" "}<input id="key-days" type="number" min={1} value={form.days} onInput={(e) => setForm({ ...form, days: e.target.value })} /><small>None: until it is revoked.</small></div>
      <div class="field"><label for="key-tokens">Tokens a minute</label>{" "}<input id="key-tokens" type="number" min={1} value={form.tokens} onInput={(e) => setForm({ ...form, tokens: e.target.value })} /><small>None: no limit of its own.</small></div>
      <p><button type="button" class="main" disabled={task.busy || !form.name.trim() || !form.scopes.length} onClick={make}>Make the key</button></p>
    </>
  );
}
