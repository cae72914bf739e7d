// The page: one view an address after the #. It speaks the public API only.
import { render } from "preact";
import { useEffect, useState } from "preact/hooks";
import { get, onKey, setKey } from "./api.js";
import { Campaign, Campaigns } from "./campaigns.jsx";
import { Keys } from "./keys.jsx";
import { Library } from "./library.jsx";
import { Job, Jobs } from "./jobs.jsx";
import { Model, Models } from "./models.jsx";
import { Problem } from "./parts.jsx";
import { Predict } from "./predict.jsx";
import { Protein } from "./protein.jsx";
import { Train } from "./train.jsx";

const VIEWS = [
  ["predict", "Predict", Predict],
  ["protein", "One protein", Protein],
  ["library", "Screen a library", Library],
  ["train", "Train a head", Train],
  ["campaigns", "Campaigns", Campaigns],
  ["jobs", "Jobs", Jobs],
  ["models", "Models", Models],
  ["keys", "Keys", Keys],
];

function KeyForm({ asked, onDone }) {
  const [text, setText] = useState("");
  return (
    <form class="key" onSubmit={(e) => { e.preventDefault(); setKey(text); setText(""); onDone(); }}>
      <label>API key <input type="password" autocomplete="off" size={40} value={text} onInput={(e) => setText(e.target.value)} /></label>{" "}
      <button>Use it</button>
      <small>{asked ? " This service asks for a key. " : " "}It is kept in this tab's memory only, and gone when the tab is closed or loaded again.</small>
    </form>
  );
}

function App() {
  const [at, setAt] = useState(location.hash.slice(2) || "predict");
  const [server, setServer] = useState(null);
  const [problem, setProblem] = useState(null);
  const [asking, setAsking] = useState(false);
  const [dark, setDark] = useState(null);
  const load = async () => {
    try {
      const [models, limits] = await Promise.all([get("v1/models"), get("v1/limits")]);
      setServer({ models: models.data, limits });
      setProblem(null);
      setAsking(false);
    } catch (error) {
      if (error.status === 401) setAsking(true);
      setProblem(error);
    }
  };
  useEffect(() => {
    const moved = () => { setAt(location.hash.slice(2) || "predict"); window.scrollTo(0, 0); };
    window.addEventListener("hashchange", moved);
    const off = onKey(load);
    load();
    return () => { window.removeEventListener("hashchange", moved); off(); };
  }, []);
  useEffect(() => { if (dark != null) document.documentElement.dataset.theme = dark ? "dark" : "light"; }, [dark]);
  const [name, ...rest] = at.split("/");
  const [, title, View] = VIEWS.find(([v]) => v === name) ?? VIEWS[0];
  const argument = decodeURIComponent(rest.join("/"));
  useEffect(() => { document.title = `${title} - bioseq`; }, [title]);
  const Shown = name === "models" && argument ? Model : name === "jobs" && argument ? Job : name === "campaigns" && argument ? Campaign : View;
  return (
    <>
      <a class="skip" href="#main" onClick={(e) => { e.preventDefault(); document.getElementById("main").focus(); }}>To the content</a>
      <header>
        <a class="brand" href="#/predict">bioseq</a>
        <nav aria-label="Views">
          {VIEWS.map(([v, label]) => <a key={v} href={`#/${v}`} aria-current={v === name ? "page" : undefined}>{label}</a>)}
          <a href="docs">API</a>
        </nav>
        <span>
          <button type="button" onClick={() => setAsking(!asking)}>Key</button>{" "}
          <button type="button" onClick={() => setDark(!(dark ?? matchMedia("(prefers-color-scheme: dark)").matches))}>Light or dark</button>
        </span>
      </header>
      <main id="main" tabIndex={-1}>
        {asking && <KeyForm asked={problem?.status === 401} onDone={() => setAsking(false)} />}
        {server ? <Shown server={server} argument={argument} reload={load} key={at} /> : problem ? <Problem error={problem} /> : <p role="status">Asking the service ...</p>}
      </main>
    </>
  );
}

render(<App />, document.getElementById("app"));
