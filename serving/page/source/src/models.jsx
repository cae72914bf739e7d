// Models and their cards.
import { useEffect, useState } from "preact/hooks";
import { call, get } from "./api.js";
import { Markdown, Problem, Table, useTask } from "./parts.jsx";

export function Models({ server }) {
  return (
    <>
      <h1>Models</h1>
      <Table rows={server.models} caption="Backbones and heads of this service. Click one for its card." onRow={(m) => { location.hash = `#/models/${encodeURIComponent(m.id)}`; }} columns={[
        { name: "model", sort: (m) => m.id },
        { name: "kind", sort: (m) => m.kind },
        { name: "task", sort: (m) => m.task },
        { name: "also called", sort: (m) => m.aliases.join(", ") },
        { name: "from", sort: (m) => (m.shipped ? "ships with bioseq" : m.owned_by) },
      ]} />
    </>
  );
}

export function Model({ argument: id }) {
  const [card, setCard] = useState(null);
  const [model, setModel] = useState(null);
  const task = useTask();
  useEffect(() => {
    task.run(async (signal) => {
      setModel(await get(`v1/models/${encodeURIComponent(id)}`, { signal }));
      setCard(await (await call(`v1/models/${encodeURIComponent(id)}/card`, { signal })).text());
    });
  }, [id]);
  return (
    <>
      <p><a href="#/models">All models</a></p>
      <Problem error={task.problem} />
      {!card && !task.problem && <h1>{id}</h1>}
      {card && <Markdown text={card} />}
      {model && <p><small>{model.id}, {model.content_hash}, licence {model.licence ?? "not given"}</small></p>}
    </>
  );
}
