// Sequences as people paste them: FASTA, or one sequence a line. Checked again by the server, which says what is wrong.
export function parse(text) {
  const records = [];
  let current = null;
  for (const raw of text.split(/\r?\n/)) {
    const line = raw.trim();
    if (!line) continue;
    if (line.startsWith(">")) {
      const header = line.slice(1).trim();
      const id = header.split(/\s+/)[0] || `sequence ${records.length + 1}`;
      records.push((current = { id, description: header.slice(id.length).trim(), sequence: "" }));
    } else if (current) current.sequence += line.replace(/\s+/g, "");
    else records.push({ id: `sequence ${records.length + 1}`, description: "", sequence: line.replace(/\s+/g, "") });
  }
  return records;
}

export const residues = (records) => records.reduce((n, r) => n + r.sequence.length, 0);

export function csv(rows) {
  // a text that a spreadsheet would take for a formula is kept a text
  const cell = (v) => {
    const text = v == null ? "" : typeof v === "string" && /^[=+\-@\t]/.test(v) ? `'${v}` : String(v);
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map((row) => row.map(cell).join(",")).join("\n") + "\n";
}

export function parseCsv(text) {
  const rows = [];
  let row = [], cell = "", quoted = false;
  for (let i = 0; i < text.length; i += 1) {
    const c = text[i];
    if (quoted) {
      if (c === '"' && text[i + 1] === '"') { cell += '"'; i += 1; }
      else if (c === '"') quoted = false;
      else cell += c;
    } else if (c === '"') quoted = true;
    else if (c === ",") { row.push(cell); cell = ""; }
    else if (c === "\n") { row.push(cell); rows.push(row); row = []; cell = ""; }
    else if (c !== "\r") cell += c;
  }
  if (cell || row.length) { row.push(cell); rows.push(row); }
  return rows;
}
