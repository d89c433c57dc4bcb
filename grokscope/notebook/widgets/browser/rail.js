// What one does: the first line, prompt, edits, runs, export.

const ICON = {
  ready: ['<circle cx="5" cy="5" r="4" fill="none" stroke="currentColor" stroke-width="2"/>', "Ready"],
  empty: ['<circle cx="5" cy="5" r="4" fill="none" stroke="currentColor" stroke-width="2"/>', "Ready"],
  waiting: ['<circle cx="5" cy="5" r="4" fill="none" stroke="currentColor" stroke-width="2"/>', "Compiling"],
  running: ['<path d="M1 0L10 5L1 10Z"/>', "Generating"],
  stopped: ['<path d="M1 1H9V9H1Z"/>', "Stopped"],
  error: ['<path d="M5 0L10 10H0Z"/>', "Failed"],
  comparing: ['<path d="M1 5H9" stroke="currentColor" stroke-width="2"/>', "Comparing"],
  lost: ['<path d="M1 1L9 9M9 1L1 9" stroke="currentColor" stroke-width="2"/>', "No kernel"],
};
const busy = () => S.state === "running" || S.state === "waiting";
const idle = () => !busy() && S.state !== "lost";
// Tokens a second, behind the first: what came before that was the prompt.
const speed = (run) => (run.n > run.np + 1 && run.seconds > 0 ? (run.n - run.np - 1) / run.seconds : 0);
// The run that is told of: while one is under way that one, whichever is looked at.
const told = () => (busy() ? runs.get(S.active) || EMPTY : V);
// Replaces what a box holds, and leaves the focus on what it was on: that has the same data.
function rewrite(box, html) {
  const name = (x) => x.tagName + JSON.stringify(x.dataset),
    held = root.getRootNode().activeElement,
    focused = box.contains(held) && name(held);
  box.innerHTML = html;
  if (!focused) return;
  const again = [...box.querySelectorAll("button, input")].find((x) => name(x) === focused);
  if (again) again.focus({ preventScroll: true });
}
const RECONNECT = "Run the cell again to reconnect";
const three = (x) => (x >= 100 ? x.toFixed(0) : x.toFixed(1));

function ident() {
  const [icon, word] = ICON[idle() && comparing() ? "comparing" : S.state];
  const facts = M0.facts.map((x) => `<span class="fact dim opt">${x}</span>`).join("");
  const v = speed(told());
  $("#ident").innerHTML =
    `<b>grokscope</b><span class="fact"><b>${esc(M0.name)}</b></span>${facts}<span class="fact"><span class="dim">numerics</span>${M0.numerics}</span><span class="sp"></span><span class="fact">${v ? three(v) + " tokens/s" : ""}</span><span class="state" role="status" id="state"${S.state === "lost" ? ` title="${RECONNECT}"` : ""}${S.state === "error" ? ' style="color:var(--bad)"' : ""}><svg viewBox="0 0 10 10">${icon}</svg>${word}</span>`;
}
function selbar() {
  $("#o-t").textContent = V.n ? S.t : "–";
  $("#o-p").textContent = V.n ? show(TOK[S.t]) : "";
  $("#o-l").textContent = S.l;
  $("#o-h").textContent = S.l + "." + S.h;
  $("#r-l").max = L - 1;
  $("#r-l").value = S.l;
  const k = $("#xkey");
  k.classList.toggle("iso", S.iso >= 0);
  rewrite(
    k,
    [...Array(E)]
      .map(
        (_, e) =>
          `<button aria-pressed="${S.iso === e}" data-e="${e}" title="Show only expert ${e}"><i class="sw" style="background:${tint(e)}"></i>${e}</button>`,
      )
      .join(""),
  );
}
// Where it is said that something asked of the kernel failed.
const PANE_OF = {
  export: "export",
  price: "export",
  writing: "export",
  exported: "export",
  attention: "attn",
  head: "attn",
  experts: "exps",
  lens: "lens",
  cells: "rout",
  compare: "cmp",
};
function errors() {
  const shown = [...root.querySelectorAll(".pane")].filter((pane) => !pane.hidden);
  for (const pane of shown) pane.querySelector(".err").innerHTML = message(S.error[pane.id]);
  const lost = Object.keys(S.error).filter((id) => S.error[id] && $("#" + id).hidden);
  if (lost.length && shown.length) shown[0].querySelector(".err").innerHTML = message(S.error[lost[0]]);
}
for (const pane of root.querySelectorAll(".pane")) pane.insertAdjacentHTML("beforeend", '<div class="err"></div>');
const message = (text) => (text ? `<div class="msg" role="alert">${esc(text)}</div>` : "");
function promptPane() {
  $("#b-gen").disabled = !idle() || !!S.writing;
  $("#b-stop").disabled = !busy();
  const run = told(),
    made = Math.max(0, run.n - run.np),
    all = run.max || 1;
  $("#pg").style.width = (100 * made) / all + "%";
  $("#pg").parentElement.classList.toggle("done", !busy());
  const end = { eos: "Ended by EOS at", interrupt: "Stopped at" }[run.finish] || "Done:";
  const ended = run.n ? `${end} ${made} of ${all} tokens in ${f(run.seconds)} s` : "No run yet";
  $("#pgt").textContent = {
    ready: ended,
    empty: "No run yet",
    waiting: `Compiling, ${S.message || "0"} s`,
    running: run.n ? `${made} of ${all} tokens, ${three(speed(run))} tokens/s` : "Under way",
    stopped: ended,
    error: made && !run.done ? `Failed behind ${made} tokens` : "Nothing was generated",
    lost: RECONNECT,
  }[S.state];
}
function edits() {
  const name = (e) =>
    e.kind === "scale"
      ? `Scale head ${e.layer}.${e.number} × ${e.factor}`
      : e.kind === "steer"
        ? `Steer ${e.a} − ${e.b} × ${e.factor} @ layer ${e.layer}`
        : `${e.kind === "ban" ? "Ban" : "Force"} expert <i class="sw" style="background:${tint(e.number)}"></i>${e.number} @ layer ${e.layer}`;
  rewrite(
    $("#elist"),
    S.edits
      .map(
        (e, i) =>
          `<div class="edit${e.on ? "" : " mute"}"><label><input type="checkbox" data-i="${i}"${e.on ? " checked" : ""}>${name(e)}</label><button class="xbtn" data-i="${i}" aria-label="Remove this edit">×</button></div>`,
      )
      .join("") || '<div class="dim" style="padding:4px 0">No edits. Add one below, or from a token.</div>',
  );
  const n = S.edits.filter((e) => e.on).length;
  $("#ecount").textContent = S.edits.length ? `${n} of ${S.edits.length} on` : "";
  $("#b-run").disabled = !n || !idle() || !!S.writing;
}
function runList() {
  const rows = [...runs.values()].filter((r) => r.done || (busy() && r.id === S.active)).reverse();
  const mark = (r, side) =>
    `<button data-r="${side}" data-id="${r.id}" aria-pressed="${S[side] === r.id}" aria-label="Run ${r.id} as ${side}">${side}</button>`;
  rewrite(
    $("#trun"),
    rows
      .map(
        (r) =>
          `<tr class="pick" data-run="${r.id}"><td class="dim num" style="width:18px">${r.id}</td><td class="nm" title="${esc(r.name)}"${r === V ? ' style="font-weight:600"' : ""}><button data-of="${r.id}">${esc(r.name)}</button></td><td class="num dim">${r.done ? r.n - r.np : "…"}</td><td class="ab" style="padding-left:8px!important;white-space:nowrap">${r.done ? mark(r, "A") + mark(r, "B") : ""}</td></tr>`,
      )
      .join("") || '<tr><td class="dim">No runs yet</td></tr>',
  );
}
function taps() {
  if (V.done && !V.bytes && M0.panes.includes("export")) {
    V.bytes = {};
    tell({ kind: "price", run: V.id });
  }
  const chosen = Object.keys(S.taps).filter((n) => S.taps[n]),
    along = chosen.length ? ["router_logits", "expert_index", "expert_gate"] : []; // routing comes along
  let total = 0;
  for (const n of new Set([...chosen, ...along])) total += V.bytes?.[n] || 0;
  const rows = Object.entries(M0.taps).map(([n, d]) => {
    const b = V.bytes && V.bytes[n];
    return `<tr title="${d}"><td class="code"><label><input type="checkbox" data-n="${n}"${S.taps[n] ? " checked" : ""}>${n}</label></td><td class="num${S.taps[n] ? "" : " dim"}">${b === undefined ? "–" : bytes(b)}</td></tr>`;
  });
  rewrite(
    $("#taps"),
    rows.join("") +
      `<tr class="tot"><td title="Arrays, those of routing with any other; tables come on top">Total on disk</td><td class="num"><b style="font-weight:600">${bytes(total)}</b></td></tr>`,
  );
  $("#b-exp").disabled = !V.done || !idle() || !!S.writing || !chosen.length;
  $("#xgt").textContent = S.writing
    ? S.writing.total
      ? `Writing: ${bytes(S.writing.bytes)} of about ${bytes(S.writing.total)}`
      : "Computing"
    : S.written
      ? `Written: ${bytes(S.written.bytes)}`
      : V.done
        ? ""
        : busy()
          ? "When the run is done"
          : "Run once to export";
  const { bytes: written, total: planned } = S.writing || {};
  $("#xg").style.width = S.written ? "100%" : planned ? `${Math.min(99, (100 * written) / planned)}%` : "0";
  $("#xg").parentElement.classList.toggle("done", !S.writing);
  $("#xout").hidden = !S.written;
  if (S.written)
    $("#xout").textContent =
      `dump = gs.open("${S.written.path}")\ndump[0]["${S.written.taps[0]}"]\ndump.to_pandas("${S.written.taps.includes("router_logits") ? "router" : "tokens"}")`;
}
const draft = () => ({
  prompt: $("#pbox").value,
  max: +$("#f1").value,
  top_p: +$("#f2").value,
  temperature: +$("#f3").value,
  seed: +$("#f4").value,
  edits: S.edits,
});
function save() {
  model.set("draft", draft());
  model.save_changes();
}
function changed() {
  edits();
  save();
}
let typing;
function typed() {
  clearTimeout(typing);
  typing = setTimeout(() => {
    tell({ kind: "count", text: $("#pbox").value });
    save();
  }, 150);
}
$("#pbox").addEventListener("input", typed);
for (const id of ["#f1", "#f2", "#f3", "#f4"]) $(id).addEventListener("change", save);
$("#elist").addEventListener("change", (ev) => {
  S.edits[+ev.target.dataset.i].on = ev.target.checked;
  changed();
});
$("#e-clear").onclick = () => {
  S.edits = [];
  changed();
};
$("#a-k").onchange = choices;
function choices() {
  const kind = $("#a-k").value,
    heads = kind === "scale",
    steer = kind === "steer";
  $("#a-x").innerHTML = [...Array(heads ? H : E)].map((_, i) => `<option>${i}</option>`).join("");
  $("#a-x").style.display = steer ? "none" : "";
  $("#a-f").style.display = heads || steer ? "" : "none";
  $("#a-f").value = steer ? 1 : 0;
}
$("#a-add").onclick = () => {
  const kind = $("#a-k").value,
    e = { kind, number: +$("#a-x").value, layer: +$("#a-l").value, factor: +$("#a-f").value, on: true };
  S.error.edits = kind === "steer" && !pairOf() ? "Steering needs two runs: mark one A and another B." : "";
  if (kind === "steer") Object.assign(e, { a: S.A, b: S.B });
  if (!S.error.edits) S.edits.push(e);
  errors();
  changed();
};
$("#taps").addEventListener("change", (ev) => {
  S.taps[ev.target.dataset.n] = ev.target.checked;
  taps();
});
let clock;
function generate(edited) {
  if (!idle() || S.writing) return;
  const { prompt, edits: _, ...options } = draft();
  S.error = {};
  S.written = null;
  S.active = null;
  S.edited = edited;
  S.keep = edited ? S.t : null;
  S.state = "waiting";
  S.message = "0";
  const begun = Date.now();
  clearInterval(clock);
  clock = setInterval(() => {
    if (S.state !== "waiting") return clearInterval(clock);
    S.message = ((Date.now() - begun) / 1000).toFixed(0);
    promptPane();
  }, 500);
  tell({ kind: "generate", prompt, options, edits: edited ? S.edits.filter((e) => e.on) : [] });
  all();
}
$("#b-gen").onclick = () => generate(false);
$("#b-run").onclick = () => generate(true);
$("#r-cmp").onclick = () => $("#cmp").scrollIntoView({ behavior: "smooth" });
$("#b-stop").onclick = () => tell({ kind: "stop" });
$("#b-exp").onclick = () => {
  S.writing = { bytes: 0, total: 0 };
  S.written = null;
  delete S.error.export;
  errors();
  promptPane();
  edits();
  tell({
    kind: "export",
    run: V.id,
    taps: Object.keys(S.taps).filter((n) => S.taps[n]),
    directory: $("#dest").value,
  });
  taps();
};
