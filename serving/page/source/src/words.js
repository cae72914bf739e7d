// What a number means, in a sentence.
export const percent = (x) => `${Math.round(100 * x)} %`;
export const number = (x) => (x == null ? "" : Math.abs(x) >= 1e4 ? Math.round(x).toLocaleString("en") : Number(x.toPrecision(3)).toString());
export const seconds = (s) => (s < 1 ? "under a second" : s < 90 ? `about ${Math.ceil(s)} s` : s < 5400 ? `about ${Math.ceil(s / 60)} min` : `about ${(s / 3600).toFixed(1)} h`);
export const bytes = (n) => (n < 1e3 ? `${n} B` : n < 1e6 ? `${(n / 1e3).toFixed(0)} kB` : n < 1e9 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e9).toFixed(1)} GB`);

export function told(p) {
  // the answer of one head as text
  if (p.task === "regression" && typeof p.value === "object") return Object.entries(p.value).map(([target, v]) => `${target} ${number(v)}`).join(", ");
  if (p.task === "regression") return `${number(p.value)}${p.units ? ` ${p.units}` : ""}`;
  if (Array.isArray(p.value)) return p.value.length ? p.value.join(", ") : "none of its labels";
  if (p.task === "per_residue") return "by residue";
  return String(p.value);
}

export function certainty(p) {
  if (p.interval && !Array.isArray(p.interval)) return Object.entries(p.interval).map(([target, [low, high]]) => `${target} ${number(low)} to ${number(high)}`).join(", ");
  if (p.interval) return `${number(p.interval[0])} to ${number(p.interval[1])}`;
  if (!p.probabilities || Array.isArray(p.probabilities)) return "";
  const values = Array.isArray(p.value) ? p.value : [p.value];
  const shown = values.length ? values : [Object.keys(p.probabilities).reduce((a, b) => (p.probabilities[a] > p.probabilities[b] ? a : b))];
  return shown.map((label) => `${label} ${percent(p.probabilities[label])}`).join(", ");
}

// "high", "some" or "low", and why. Distance from the training proteins first, then the nearest of them.
export function trust(p) {
  const place = p.ood_percentile;
  const near = p.nearest?.[0];
  const far = place == null ? "" : place >= 0.99
    ? "It is unlike nearly everything that the head was trained on"
    : `It is ${place < 0.5 ? "well inside" : place < 0.95 ? "inside" : "at the edge of"} what the head was trained on (further out than ${percent(place)} of it)`;
  const relative = near
    ? ` The nearest training protein, ${near.id}, is ${percent(near.identity)} identical over ${percent(near.coverage)} of it.`
    : p.homologs ? " No training protein is a homolog, so the model answers alone." : "";
  const level = place >= 0.99 ? "low" : place >= 0.95 || (p.homologs && !near) ? "some" : "high";
  const advice = { high: "The head's measured quality applies.", some: "Expect less than the head's measured quality.", low: "Treat it as a guess." }[level];
  return { level, sentence: `${far ? `${far}.` : ""}${relative} ${advice}`.trim() };
}
