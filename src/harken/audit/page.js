"use strict";
{
  const get = (id) => document.getElementById(id);
  const root = document.documentElement;
  const thin = "\u202f";
  const whole = (n) => String(n).replace(/\B(?=(\d{3})+$)/g, thin);
  root.classList.add("js");

  // theme: as the system says, until somebody chooses
  {
    const button = get("theme");
    const isDark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
    const name = () => { button.textContent = isDark() ? "Light theme" : "Dark theme"; };
    try { const kept = localStorage.getItem("harken-theme"); if (kept) root.dataset.theme = kept; } catch { /* no storage here */ }
    button.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      try { localStorage.setItem("harken-theme", root.dataset.theme); } catch { /* chosen for this visit only */ }
      name();
    });
    button.hidden = false;
    name();
  }

  // copying: the clipboard of a page from a disk is not always open to scripts
  const copy = async (text, button) => {
    let isDone = false;
    try { await navigator.clipboard.writeText(text); isDone = true; } catch {
      const area = document.createElement("textarea");
      area.value = text;
      area.className = "away";
      document.body.append(area);
      area.select();
      isDone = document.execCommand("copy");
      area.remove();
      button.focus();
    }
    const before = button.dataset.name || button.textContent;
    button.dataset.name = before;
    button.textContent = isDone ? "Copied" : "Not allowed";
    setTimeout(() => { button.textContent = before; }, 1200);
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-copy]");
    if (button) copy(button.dataset.copy || get(button.dataset.from).value, button);
  });

  // calculator: Manski's bounds
  const calculator = get("calculator");
  if (calculator) {
    const show = () => {
      const value = Number(get("metric").value), missing = Number(get("metric-split").value);
      const isRight = get("metric").value !== "" && value >= 0 && value <= 100;
      const low = value * (1 - missing);
      get("bounds").textContent = isRight
        ? `On the whole list it lies between ${low.toFixed(1)} and ${(low + 100 * missing).toFixed(1)}.`
        : "A metric in percent: 0 to 100.";
    };
    calculator.addEventListener("input", show);
    calculator.addEventListener("submit", (event) => event.preventDefault());
    calculator.hidden = false;
    show();
  }

  // paper shows everything
  addEventListener("beforeprint", () => document.querySelectorAll("details:not(.long)").forEach((d) => { d.open = true; }));

  // missing clips: columns of text, read row by row only where they are shown or searched
  const block = get("missing-data");
  if (block) {
    const data = JSON.parse(block.textContent);
    block.textContent = "";
    const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    const worth = new Uint8Array(128);
    for (let i = 0; i < 64; i++) worth[digits.charCodeAt(i)] = i;
    const number = (text, at, width) => {
      let n = 0;
      for (let i = at * width; i < (at + 1) * width; i++) n = 64 * n + worth[text.charCodeAt(i)];
      return n;
    };
    const parts = data.blocks.map((b) => b.part);
    const total = data.blocks.reduce((n, b) => n + b.n, 0);
    const part = new Uint16Array(total), reason = new Uint16Array(total), starts = [];
    let at = 0;
    data.blocks.forEach((b, k) => {
      starts.push(at);
      part.fill(k, at, at + b.n);
      for (let i = 0; i < b.n; i++) reason[at + i] = number(b.reason, i, data.width);
      at += b.n;
    });
    const id = (row) => {
      const b = data.blocks[part[row]], i = row - starts[part[row]];
      const key = typeof b.keys === "string" ? b.keys.substr(i * b.size, b.size) : b.keys[i];
      return b.head + key + b.tails[number(b.tail, i, b.width)];
    };
    const text = [(row) => parts[part[row]], id, (row) => data.reasons[reason[row]][1], (row) => data.reasons[reason[row]][0]];

    let rows = new Uint32Array(total), page = 0, order = { column: -1, sign: 1 };
    const search = () => {
      const words = get("words").value.toLowerCase().split(/\s+/).filter(Boolean);
      const asked = { part: get("part").value, group: get("group").value, reason: get("reason").value };
      const isPart = parts.map((p) => !asked.part || p === asked.part);
      const isReason = data.reasons.map(([r, g]) => (!asked.group || g === asked.group) && (!asked.reason || r === asked.reason));
      const said = data.reasons.map(([r, g]) => words.map((w) => `${r} ${g}`.toLowerCase().includes(w)));
      const found = new Uint32Array(total);
      let n = 0;
      for (let row = 0; row < total; row++) {
        const r = reason[row];
        if (!isPart[part[row]] || !isReason[r]) continue;
        let fits = true, name = "";
        for (let w = 0; w < words.length && fits; w++) {
          if (!said[r][w]) { name ||= id(row).toLowerCase(); fits = name.includes(words[w]); }
        }
        if (fits) found[n++] = row;
      }
      rows = found.slice(0, n);
      sort();
    };
    const rank = (names) => { // the place of each name among all, so that sorting compares numbers
      const sorted = [...new Set(names)].sort();
      return names.map((name) => sorted.indexOf(name));
    };
    const ranks = [rank(parts), null, rank(data.reasons.map((r) => r[1])), rank(data.reasons.map((r) => r[0]))];
    const sort = () => {
      const { column, sign } = order;
      if (column === 1) {
        const names = new Map();
        for (const row of rows) names.set(row, id(row));
        rows.sort((a, b) => { const x = names.get(a), y = names.get(b); return sign * (x < y ? -1 : x > y ? 1 : a - b); });
      } else if (column >= 0) {
        const key = column === 0 ? (row) => ranks[0][part[row]] : (row) => ranks[column][reason[row]];
        rows.sort((a, b) => sign * (key(a) - key(b)) || a - b);
      }
      page = 0;
      show();
    };
    const cell = (line, content, isCode) => {
      const holder = line.insertCell();
      (isCode ? holder.appendChild(document.createElement("code")) : holder).textContent = content;
      return holder;
    };
    const show = () => {
      const size = Number(get("size").value), last = Math.max(0, Math.ceil(rows.length / size) - 1);
      page = Math.min(Math.max(page, 0), last);
      const lines = [...rows.subarray(page * size, (page + 1) * size)].map((row) => {
        const line = document.createElement("tr"), name = id(row), group = text[2](row);
        cell(line, text[0](row));
        const holder = cell(line, name, true), button = document.createElement("button");
        button.type = "button";
        button.className = "copy";
        button.dataset.copy = name;
        button.textContent = "Copy";
        button.setAttribute("aria-label", `Copy ${name}`);
        holder.append(button);
        const dot = document.createElement("span");
        dot.className = `key g-${group}`;
        cell(line, group).prepend(dot);
        cell(line, text[3](row), true);
        return line;
      });
      get("rows").replaceChildren(...lines);
      const first = page * size + 1, end = Math.min((page + 1) * size, rows.length);
      get("shown").textContent = rows.length === 0 ? "No clip fits."
        : `${whole(first)} to ${whole(end)} of ${whole(rows.length)}${rows.length < total ? ` found among ${whole(total)}` : ""}`;
      get("previous").disabled = get("first").disabled = page === 0;
      get("next").disabled = get("last").disabled = page === last;
      get("save").textContent = `Save ${whole(rows.length)} as CSV`;
      get("save").disabled = rows.length === 0;
    };
    const save = () => {
      const quoted = (s) => `"${s.replaceAll('"', '""')}"`;
      const pieces = ["part,clip_id,group,reason\r\n"];
      for (const row of rows) pieces.push(text.map((of) => quoted(of(row))).join(",") + "\r\n");
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob(pieces, { type: "text/csv" }));
      link.download = "missing.csv";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    };
    let waiting = 0;
    const later = () => { clearTimeout(waiting); waiting = setTimeout(search, total > 50000 ? 150 : 0); };
    const choose = (select, names) => names.forEach((name) => select.add(new Option(name, name)));
    choose(get("part"), parts);
    choose(get("group"), [...new Set(data.reasons.map((r) => r[1]))].sort());
    choose(get("reason"), data.reasons.map((r) => r[0]));
    get("words").addEventListener("input", later);
    ["part", "group", "reason"].forEach((name) => get(name).addEventListener("change", search));
    get("size").addEventListener("change", show);
    get("find").addEventListener("submit", (event) => { event.preventDefault(); search(); });
    get("find").addEventListener("reset", () => setTimeout(search));
    get("save").addEventListener("click", save);
    const turn = { first: () => 0, previous: () => page - 1, next: () => page + 1, last: () => Infinity };
    Object.entries(turn).forEach(([name, to]) => get(name).addEventListener("click", () => { page = to(); show(); }));
    document.querySelectorAll("#missing-table thead th").forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        order = { column, sign: order.column === column ? -order.sign : 1 };
        document.querySelectorAll("#missing-table thead th").forEach((h) => h.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", order.sign > 0 ? "ascending" : "descending");
        sort();
      });
    });
    document.querySelectorAll("a[data-find]").forEach((link) => link.addEventListener("click", () => {
      get("find").reset();
      get("reason").value = link.dataset.find;
      get("part").value = link.dataset.part || "";
      search();
    }));
    for (let row = 0; row < total; row++) rows[row] = row;
    get("find").hidden = get("pages").hidden = false;
    show();
    root.dataset.ready = "missing";
  }
}
