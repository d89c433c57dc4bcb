// Messages of the kernel, by kind.

const on = {
  model(m) {
    for (const pane of ["prompt", "edits", "runs", "export", "text", "rout", "attn", "insp", "cmp"])
      $("#" + pane).hidden = !m.panes.includes(pane);
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
    S.state = m.running ? "waiting" : "empty";
    choices();
    palette();
    all();
    if (m.panes.includes("prompt")) model.send({ kind: "count", text: d.prompt });
  },
  count(m) {
    $("#ptok").textContent = m.pieces.length + m.bos + " tokens";
    $("#pieces").innerHTML = m.pieces.map((p) => `<span>${esc(show(p))}</span>`).join("");
  },
  begin(m, [z]) {
    const run = fresh(m, f32(z));
    runs.set(run.id, run);
    run.begun = performance.now();
    S.state = "running";
    S.follow = true;
    use(run);
    S.t = run.n - 1;
    all();
  },
  tokens(m, [z]) {
    const run = runs.get(m.run);
    if (!run) return;
    for (const x of m.tokens) {
      run.tok.push(x.piece);
      run.ids.push(x.id);
      run.lp.push(x.logprob);
    }
    append(run, f32(z), m.tokens.length);
    run.seconds = (performance.now() - run.begun) / 1000;
    if (run !== V) return;
    use(run);
    if (S.follow) S.t = run.n - 1;
    ident();
    promptPane();
    selbar();
    strip();
    maps();
    inspector();
  },
  run(m, [z, tokens, logprob, rank]) {
    const old = runs.get(m.run);
    if (!z.byteLength && (!old || old.n !== m.pieces.length)) return model.send({ kind: "whole", run: m.run });
    const run = z.byteLength
      ? fresh(m, f32(z))
      : Object.assign(old, { tok: m.pieces, ids: m.ids, lp: m.logprobs, att: new Map() });
    run.done = true;
    run.seconds = m.seconds;
    run.finish = m.finish;
    run.T = run.n;
    if (m.lens_layers.length)
      run.lens = {
        layers: m.lens_layers,
        best: m.best,
        words: m.words,
        tokens: i32(tokens),
        logprob: f32(logprob),
        rank: i32(rank),
      };
    runs.set(run.id, run);
    for (const id of [...runs.keys()].filter((id) => runs.get(id).done).slice(0, -12)) runs.delete(id);
    if (V === old || !V.n || !V.done) use(run);
    if (S.A === null) S.A = run.id;
    else S.B = run.id;
    S.state = run.finish === "interrupt" ? "stopped" : "ready";
    all();
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
  async head(m, [z]) {
    const run = runs.get(m.run);
    if (!run) return;
    const n = run.n,
      values = new Uint16Array((await unpack(z)).buffer),
      M = new Float32Array(n * n);
    let o = 0;
    for (let q = 0; q < n; q++) for (let j = 0; j <= q; j++) M[q * n + j] = values[o++] / 65535;
    M.label = m.label;
    run.att.set(m.layer + "." + m.head, M);
    if (run !== V || m.layer !== S.l || m.head !== S.h) return;
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
    taps();
  },
  error(m) {
    const pane = m.pane === "export" ? "export" : m.pane === "price" || m.pane === "attention" ? "export" : "generate";
    S.error[pane] = m.text;
    if (pane === "export") S.writing = false;
    else S.state = "error";
    all();
  },
};
async function receive(m, buffers) {
  try {
    await on[m.kind](m, buffers || []);
  } catch (error) {
    console.error("grokscope", error); // the emitter of messages would swallow it
  }
}
model.on("msg:custom", receive);
let width = root.clientWidth;
const resized = new ResizeObserver(() => {
  if (root.clientWidth !== width) {
    width = root.clientWidth;
    requestAnimationFrame(all);
  }
});
resized.observe(root);
const themed = new MutationObserver(() => {
  if (M0) {
    palette();
    all();
  }
});
themed.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light"] });
model.send({ kind: "hello" });
function leave() {
  model.off("msg:custom", receive);
  resized.disconnect();
  themed.disconnect();
  clearInterval(clock);
}
