// Messages of the kernel, by kind.

// What of the page is shown where one of these panes is.
const SHOWN = Object.fromEntries(
  [
    "prompt",
    "edits",
    "runs",
    "export",
    "text",
    "map",
    "load",
    "ent",
    "coact",
    "trans",
    "attn",
    "lens",
    "insp",
    "cmp",
  ].map((id) => [id, [id]]),
);
Object.assign(SHOWN, {
  rout: ["map", "load", "ent"],
  pairs: ["coact", "trans"],
  exps: ["coact", "trans"],
  rnote: ["map"],
  "p-second": ["map"],
  side: ["insp", "coact", "trans"],
});
const on = {
  model(m) {
    if (M0) {
      // Another view of the same has come, or the kernel is back.
      if (S.state === "lost") S.state = m.running ? "running" : V.done ? "ready" : "empty";
      return all();
    }
    WINDOW = m.window;
    for (const [id, parts] of Object.entries(SHOWN)) $("#" + id).hidden = !parts.some((part) => m.panes.includes(part));
    const rout = { map: "Routing", load: "Expert load", ent: "Router entropy" };
    $("#rhead").textContent = rout[Object.keys(rout).find((id) => m.panes.includes(id))] || "";
    $("#p-load").hidden = !(m.panes.includes("map") && m.panes.includes("load"));
    $("#p-exps").hidden = !$("#p-load").hidden;
    $("#measure [value=recv]").hidden = !m.panes.includes("attn");
    root.classList.toggle("only", !m.panes.includes("prompt"));
    M0 = m;
    L = m.layers;
    E = m.experts;
    H = m.heads;
    BIG = L > 16;
    for (const n of Object.keys(m.taps)) S.taps[n] = ["router_logits", "expert_gate", "resid_post"].includes(n);
    $("#prompt .chips").innerHTML = Object.keys(m.examples)
      .map((x) => `<button class="chip" data-example="${esc(x)}">${esc(x)}</button>`)
      .join("");
    $("#a-l").innerHTML = [...Array(L)].map((_, l) => `<option>${l}</option>`).join("");
    const d = model.get("draft");
    $("#pbox").value = d.prompt;
    $("#f1").value = d.max;
    $("#f2").value = d.top_p;
    $("#f3").value = d.temperature;
    $("#f4").value = d.seed;
    S.edits = d.edits.map((e) => ({ ...e }));
    S.state = m.running ? "running" : "empty"; // of which this page has not heard
    choices();
    palette();
    root.classList.remove("unknown");
    all();
    if (m.panes.includes("prompt")) tell({ kind: "count", text: d.prompt });
  },
  count(m) {
    $("#ptok").textContent = m.pieces.length + m.bos + " tokens";
    $("#pieces").innerHTML = m.pieces.map((p) => `<span>${esc(show(p))}</span>`).join("");
  },
  begin(m, [experts, gates, z]) {
    const run = fresh(m);
    ran(run, i8(experts), m.pieces.length);
    fill(run, m.start, f32(gates), f32(z));
    runs.set(run.id, run);
    run.begun = performance.now();
    S.active = run.id;
    S.state = "running";
    S.follow = !S.edited; // an edited run is looked at where the one before was
    if (S.follow) S.t = run.n - 1;
    go(run, run.n - WINDOW);
  },
  tokens(m, [experts, gates, z]) {
    const run = runs.get(m.run);
    if (!run) return;
    for (const x of m.tokens) {
      run.tok.push(x.piece);
      run.ids.push(x.id);
      run.lp.push(x.logprob);
    }
    const start = run.n;
    ran(run, i8(experts), m.tokens.length);
    fill(run, start, f32(gates), f32(z));
    run.seconds = (performance.now() - run.begun) / 1000;
    ident();
    promptPane();
    if (run !== V) return;
    if (S.follow) run.w0 = run.n - WINDOW;
    use(run);
    if (S.follow) S.t = run.n - 1;
    restore();
    selbar();
    overview();
    strip();
    maps();
    inspector();
  },
  async run(m, [experts]) {
    const old = runs.get(m.run),
      unheard = busy() && !old && !m.running; // it was begun before this page was loaded
    if (old && old.done) return;
    if (!experts.byteLength && (!old || old.n !== m.pieces.length)) return tell({ kind: "whole", run: m.run });
    const run = experts.byteLength
      ? fresh(m)
      : Object.assign(old, { tok: m.pieces, ids: m.ids, lp: m.logprobs, att: new Map() });
    if (experts.byteLength) ran(run, new Int8Array((await unpack(experts)).buffer), m.pieces.length);
    run.done = true;
    run.seconds = m.seconds;
    run.finish = m.finish;
    run.T = run.n;
    run.lensLayers = m.lens_layers;
    runs.set(run.id, run);
    const done = [...runs.keys()].filter((id) => runs.get(id).done);
    for (const id of done.splice(0, done.length - m.kept)) forget(id);
    if (S.A === null) S.A = run.id;
    else S.B = run.id;
    if (!runs.has(S.A)) S.A = done[0];
    if (!m.running) S.state = run.finish === "interrupt" ? "stopped" : "ready";
    again();
    if (want && want.run === run) settle();
    else if (V === old || !V.n || !V.done || unheard) {
      const keep = S.keep !== null && S.keep < run.n ? S.keep : null;
      S.keep = null;
      if (keep === null) go(run, run.w0);
      else go(run, keep >= run.w0 && keep < run.w0 + WINDOW ? run.w0 : keep - WINDOW / 2, { t: keep });
    }
    all();
  },
  cells(m, [gates, z]) {
    const run = runs.get(m.run);
    if (!run) return;
    run.asked.delete("cells" + m.start);
    fill(run, m.start, f32(gates), f32(z));
    if (want) settle();
    else compare();
  },
  async lens(m, buffers) {
    const run = runs.get(m.run);
    if (!run) return;
    run.asked.delete("lens" + m.start);
    const [ids, lp, ranks] = (await Promise.all(buffers.map(unpack))).map(({ buffer }, i) =>
      i === 1 ? new Float32Array(buffer) : new Int32Array(buffer),
    );
    for (let t = 0; t < m.count; t++)
      run.lens[m.start + t] = run.lensLayers.map((_, i) => {
        const at = i * m.count + t,
          top = [...Array(m.best)].map((_, k) => {
            const id = ids[at * m.best + k];
            return [m.words[id], Math.exp(lp[at * m.best + k]), id];
          });
        return { top, rank: ranks[at] };
      });
    if (run !== V || !V.n) return;
    lensGrid();
    inspector();
  },
  async experts(m, buffers) {
    const run = runs.get(m.run);
    if (!run) return;
    run.experts = {};
    for (const [i, [phase, tokens]] of m.phases.entries()) {
      const [entropy, together, moves] = await Promise.all(
        buffers.slice(3 * i, 3 * i + 3).map(async (b) => new Float32Array((await unpack(b)).buffer)),
      );
      run.experts[phase] = { tokens, entropy, together, moves };
    }
    if (run !== V) return;
    drawEntropy();
    experts();
  },
  compare(m) {
    KL.set(`${m.a}.${m.b}`, m.kl);
    ident();
    compare();
  },
  async attention(m, [z]) {
    const run = runs.get(m.run);
    if (!run) return;
    const n = m.size,
      packed = await unpack(z);
    const maps = m.labels.map((found, h) => {
      const M = new Float32Array(n * n);
      for (let i = 0; i < n * n; i++) M[i] = packed[h * n * n + i] / 255;
      M.label = found;
      return M;
    });
    maps.n = n;
    run.att.set(m.layer, maps);
    if (run === V && m.layer === S.l) drawSheet();
  },
  async head(m, [z, readsAt, readsW, byAt, byW, received]) {
    const run = runs.get(m.run);
    if (!run) return;
    const n = m.count,
      values = new Uint16Array((await unpack(z)).buffer),
      M = new Float32Array(n * n);
    let o = 0;
    for (let q = 0; q < n; q++) for (let j = 0; j <= q; j++) M[q * n + j] = values[o++] / 65535;
    const table = (at, w) => ({ at: i32(at), w: f32(w), k: f32(w).length / n });
    for (const key of [...run.att.keys()].slice(0, -40)) run.att.delete(key);
    run.att.set(`${m.layer}.${m.head}.${m.start}`, {
      M,
      n,
      label: m.label,
      reads: table(readsAt, readsW),
      readBy: table(byAt, byW),
      received: f32(received),
    });
    if (run !== V || m.layer !== S.l || m.head !== S.h || m.start !== W0) return;
    strip();
    drawHead();
    lists();
  },
  price(m) {
    const run = runs.get(m.run);
    if (run) run.bytes = m.bytes;
    if (run === V) taps();
  },
  exported(m) {
    S.writing = false;
    S.written = m;
    promptPane();
    edits();
    taps();
  },
  writing(m) {
    S.writing = m;
    taps();
  },
  error(m) {
    const pane = PANE_OF[m.of] || (S.edited ? "edits" : "prompt");
    S.error[pane] = m.text;
    if (m.of === "export") S.writing = false;
    if (m.of === "compare") KL.set(`${m.a}.${m.b}`, FAILED);
    if (m.ended || (m.of === "generate" && S.state === "waiting")) S.state = "error";
    all();
  },
};
function forget(id) {
  runs.delete(id);
  for (const key of [...KL.keys()]) if (key.split(".").includes(String(id))) KL.delete(key);
}
async function handle(m, buffers) {
  try {
    const pane = PANE_OF[m.kind];
    if (S.error[pane]) {
      delete S.error[pane];
      errors();
    }
    await on[m.kind](m, buffers || []);
  } catch (error) {
    console.error("grokscope", error); // the emitter of messages would swallow it
  }
}
let handled = Promise.resolve();
function receive(m, buffers) {
  handled = handled.then(() => handle(m, buffers)); // one after the other, though unpacking waits
}
model.on("msg:custom", receive);
const resized = new ResizeObserver(() => {
  if (root.clientWidth !== width) requestAnimationFrame(all);
});
resized.observe(root);
const themed = new MutationObserver(() => {
  requestAnimationFrame(() => {
    if (!M0) return;
    palette();
    all();
  });
});
themed.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light"] });
const hello = () => tell({ kind: "hello" });
model.on("comm_live_update", hello); // the kernel went, or is back: it answers, or cannot be told
hello();
function leave() {
  model.off("comm_live_update", hello);
  model.off("msg:custom", receive);
  resized.disconnect();
  looking.disconnect();
  themed.disconnect();
  clearInterval(clock);
}
