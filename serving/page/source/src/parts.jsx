// What every view is made of: problems in words, busy buttons, files, tables, charts, cards.
import { marked } from "marked";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { number } from "./words.js";

// Runs one thing at a time; `stop` ends it.
export function useTask() {
  const [state, set] = useState({ busy: false, problem: null });
  const running = useRef(null);
  const stop = () => running.current?.abort();
  const run = async (work) => {
    const controller = (running.current = new AbortController());
    set({ busy: true, problem: null });
    try {
      await work(controller.signal);
      set({ busy: false, problem: null });
    } catch (error) {
      set({ busy: false, problem: error.name === "AbortError" ? null : error });
    }
  };
  useEffect(() => stop, []);
  return { ...state, run, stop };
}

export function Problem({ error }) {
  if (!error) return null;
  return (
    <p class="problem" role="alert">
      {error.message} {error.status === 429 && error.retryAfter ? `Try again in ${error.retryAfter} s.` : ""}
      {error.code && <small> ({error.code})</small>}
    </p>
  );
}

export function FileDrop({ label, accept, onFile, id }) {
  const [over, setOver] = useState(false);
  return (
    <label
      class={`drop${over ? " over" : ""}`}
      onDragOver={(e) => { e.preventDefault(); setOver(true); }}
      onDragLeave={() => setOver(false)}
      onDrop={(e) => { e.preventDefault(); setOver(false); if (e.dataTransfer.files[0]) onFile(e.dataTransfer.files[0]); }}
    >
      {label} <input type="file" id={id} accept={accept} onChange={(e) => e.target.files[0] && onFile(e.target.files[0])} />
    </label>
  );
}

export function Heads({ models, chosen, onChange }) {
  const heads = models.filter((m) => m.kind === "head");
  if (!heads.length) return <p>This service has no heads yet. <a href="#/train">Train one</a> on labels of your own.</p>;
  return (
    <fieldset>
      <legend>Properties</legend>
      {heads.map((m) => {
        const name = m.aliases.length ? m.aliases[0] : m.name;
        return (
          <span class="choice" key={m.id}>
            <label>
              <input type="checkbox" checked={chosen.includes(name)} onChange={(e) => onChange(e.target.checked ? [...chosen, name] : chosen.filter((c) => c !== name))} />
              {" "}{name.replaceAll("_", " ")}
            </label>
            <a href={`#/models/${encodeURIComponent(m.id)}`} aria-label={`card of ${name}`}>card</a>
          </span>
        );
      })}
    </fieldset>
  );
}

const value = (row, column) => column.sort(row);

// columns: {name, cell(row), sort(row), numeric}. Sorts by a click, filters by a text, shows `page` rows at a time.
export function Table({ rows, columns, caption, page = 100, onRow }) {
  const [by, setBy] = useState(null);
  const [up, setUp] = useState(false);
  const [text, setText] = useState("");
  const [shown, setShown] = useState(page);
  const found = useMemo(() => {
    const wanted = text.trim().toLowerCase();
    let some = wanted ? rows.filter((r) => columns.some((c) => String(value(r, c) ?? "").toLowerCase().includes(wanted))) : rows.slice();
    const column = columns[by];
    if (column) {
      some.sort((a, b) => {
        const [x, y] = [value(a, column), value(b, column)];
        if (x == null || y == null) return (x == null) - (y == null);
        return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
      });
    }
    return some;
  }, [rows, columns, by, up, text]);
  const order = (i) => { setUp(by === i ? !up : !columns[i].numeric); setBy(i); };
  return (
    <div>
      <div class="tools">
        <label>Find in the table <input type="search" value={text} onInput={(e) => setText(e.target.value)} /></label>
        <span role="status">{found.length.toLocaleString("en")} of {rows.length.toLocaleString("en")} rows</span>
      </div>
      <div class="scroll" tabIndex={0} role="region" aria-label={caption}>
        <table>
          <caption>{caption}</caption>
          <thead>
            <tr>
              {columns.map((c, i) => (
                <th key={c.name} scope="col" aria-sort={by === i ? (up ? "ascending" : "descending") : "none"}>
                  <button type="button" class="sort" onClick={() => order(i)}>{c.name}{by === i ? (up ? " ↑" : " ↓") : ""}</button>
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {found.slice(0, shown).map((row, i) => (
              <tr key={i}>
                {columns.map((c, j) => {
                  const cell = c.cell ? c.cell(row) : c.numeric ? number(value(row, c)) : value(row, c);
                  return j === 0
                    ? <th key={c.name} scope="row">{onRow ? <button type="button" class="link" onClick={() => onRow(row)}>{cell}</button> : cell}</th>
                    : <td key={c.name} class={c.numeric ? "num" : ""}>{cell}</td>;
                })}
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      {found.length > shown && <button type="button" onClick={() => setShown(shown + 10 * page)}>Show more rows</button>}
    </div>
  );
}

// A chart: `draw(Plot, width)` makes the figure once the charting library is there. `label` tells it to who cannot see it.
export function Chart({ draw, label, depends = [] }) {
  const place = useRef(null);
  const [problem, setProblem] = useState(null);
  useEffect(() => {
    let gone = false;
    import("@observablehq/plot").then((Plot) => {
      if (gone || !place.current) return;
      try {
        const figure = draw(Plot, Math.max(320, place.current.clientWidth));
        // Plot names its groups; a group without a role may have no name, and the picture's own says it all.
        figure.querySelectorAll("g[aria-label]").forEach((group) => group.removeAttribute("aria-label"));
        place.current.replaceChildren(figure);
      } catch (error) { setProblem(error); }
    });
    return () => { gone = true; };
  }, depends);
  return (
    <figure>
      <div class="scroll" tabIndex={0} role="img" aria-label={label} ref={place} />
      <figcaption>{label}</figcaption>
      <Problem error={problem} />
    </figure>
  );
}

// A model's card. Its Markdown becomes elements; HTML in it stays text.
export function Markdown({ text }) {
  const block = (t, i) => {
    switch (t.type) {
      case "heading": { const Tag = `h${t.depth}`; return <Tag key={i}>{inline(t.tokens)}</Tag>; }
      case "paragraph": return <p key={i}>{inline(t.tokens)}</p>;
      case "list": { const Tag = t.ordered ? "ol" : "ul"; return <Tag key={i}>{t.items.map((item, j) => <li key={j}>{item.tokens.map((x, k) => (x.type === "text" ? inline(x.tokens ?? [x]) : block(x, k)))}</li>)}</Tag>; }
      case "code": return <pre key={i} tabIndex={0}>{t.text}</pre>;
      case "table": return (
        <div class="scroll" key={i} tabIndex={0} role="region" aria-label="table of the card"><table>
          <thead><tr>{t.header.map((c, j) => <th scope="col" key={j}>{inline(c.tokens)}</th>)}</tr></thead>
          <tbody>{t.rows.map((r, j) => <tr key={j}>{r.map((c, k) => <td key={k}>{inline(c.tokens)}</td>)}</tr>)}</tbody>
        </table></div>
      );
      case "space": return null;
      default: return <p key={i}>{t.raw}</p>;
    }
  };
  const inline = (tokens) => (tokens ?? []).map((t, i) => {
    switch (t.type) {
      case "strong": return <strong key={i}>{inline(t.tokens)}</strong>;
      case "em": return <em key={i}>{inline(t.tokens)}</em>;
      case "codespan": return <code key={i}>{t.text}</code>;
      case "link": return <span key={i}>{inline(t.tokens)}</span>;
      case "br": return <br key={i} />;
      case "text": return t.tokens ? inline(t.tokens) : unescape(t.text);
      default: return t.raw;
    }
  });
  const unescape = (s) => s.replace(/&(amp|lt|gt|quot|#39);/g, (_, n) => ({ amp: "&", lt: "<", gt: ">", quot: '"', "#39": "'" })[n]);
  return <div class="card">{marked.lexer(text).map(block)}</div>;
}
