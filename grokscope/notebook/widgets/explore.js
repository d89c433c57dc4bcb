// The explorer's page. Views and the selection live here; runs live in the kernel (explore.py), which sends arrays as
// binary buffers. One selection for all views: token, layer, head, and at most one isolated expert.

const HTML = `<div class="frame">
 <div class="line" role="banner" id="ident"></div>
 <div class="line" id="selbar" role="toolbar" aria-label="Selection">
  <span class="ctl"><span class="dim">Token</span><span class="step"><button data-k="t-" aria-label="Previous token">‹</button><output id="o-t"></output><button data-k="t+" aria-label="Next token">›</button></span><span class="piece" id="o-p"></span></span>
  <span class="ctl"><label class="dim" for="r-l">Layer</label><input type="range" id="r-l" min="0"><span class="step"><button data-k="l-" aria-label="Previous layer">‹</button><output id="o-l"></output><button data-k="l+" aria-label="Next layer">›</button></span></span>
  <span class="ctl"><span class="dim">Head</span><span class="step"><button data-k="h-" aria-label="Previous head">‹</button><output id="o-h"></output><button data-k="h+" aria-label="Next head">›</button></span></span>
  <span class="sp"></span>
  <span class="ctl"><span class="dim">Expert</span><span class="xkey" id="xkey" role="group" aria-label="Experts: press to isolate one"></span></span>
 </div>
 <div class="grid">
  <aside class="rail">
   <section class="pane" id="prompt"><div class="head"><h2>Prompt</h2><span class="sp"></span><span class="dim keep" id="ptok"></span></div>
    <textarea id="pbox" spellcheck="false" aria-label="Prompt"></textarea><div class="pieces" id="pieces" aria-label="Tokens of the prompt"></div>
    <div class="chips" style="margin-top:6px" role="group" aria-label="Example prompts"></div>
    <div class="fields"><label for="f1">Max tokens</label><input id="f1" type="number" min="1"><label for="f2">Top-p</label><input id="f2" type="number" step=".01"><label for="f3">Temperature</label><input id="f3" type="number" step=".1"><label for="f4">Seed</label><input id="f4" type="number"></div>
    <div class="row"><button class="btn go" id="b-gen">Generate</button><button class="btn" id="b-stop" disabled>Stop</button><span class="sp" style="flex:1"></span><span class="dim" style="font-size:11px">Ctrl+Enter</span></div>
    <div class="prog" style="margin:10px 0 4px" role="progressbar" aria-label="Generation"><i id="pg"></i></div><div class="dim" id="pgt"></div><div id="perr"></div>
   </section>
   <section class="pane" id="edits"><div class="head"><h2>Edits</h2><span class="dim" id="ecount"></span><span class="sp"></span><button class="lnk" id="e-clear">Clear</button></div>
    <div id="elist"></div>
    <div class="addrow"><select id="a-k" aria-label="Kind of edit"><option value="ban">Ban expert</option><option value="force">Force expert</option><option value="scale">Scale head</option><option value="steer">Steer A − B</option></select><select id="a-x" aria-label="Expert or head"></select><input id="a-f" type="number" step="0.5" value="0" aria-label="Factor" style="width:44px"><span class="dim">layer</span><select id="a-l" aria-label="Layer"></select><button class="btn" id="a-add">Add</button></div>
    <div class="row"><button class="btn go" id="b-run">Run edited</button><span class="dim" id="e-note">Same prompt and seed</span></div><div id="eerr"></div>
   </section>
   <section class="pane" id="runs"><div class="head"><h2>Runs</h2><span class="sp"></span><span class="dim">A and B are compared</span></div><div class="scroll" tabindex="0" role="group" aria-label="Runs of this session"><table id="trun"></table></div></section>
   <section class="pane" id="export"><div class="head"><h2>Export</h2><span class="sp"></span><span class="dim" id="xbudget"></span></div>
    <table class="taps" id="taps"></table>
    <div class="row" style="margin-top:8px;gap:6px"><label class="dim" for="dest">To</label><input type="text" id="dest" class="code" value="runs/explored" style="font:11px/16px var(--code)"><button class="btn" id="b-exp" style="padding:0 8px">Write dump</button></div>
    <div class="prog" style="margin:10px 0 4px" role="progressbar" aria-label="Export"><i id="xg"></i></div><div class="dim" id="xgt"></div><pre class="out" id="xout" hidden></pre><div id="xerr"></div>
   </section>
  </aside>
  <section class="pane" id="text"><div class="head"><h2>Text</h2><span class="dim" id="tcount"></span><span class="sp"></span><span class="scale" id="tscale"></span><label class="ctl"><span class="dim">Colour by</span><select id="measure"><option value="expert">Top expert</option><option value="entropy">Routing entropy</option><option value="margin">Margin, first − second</option><option value="logp">Log-probability</option><option value="recv">Attention received</option></select></label><label class="ctl"><input type="checkbox" id="digits"><span class="dim">Numbers</span></label></div>
   <div class="strip" id="strip" role="listbox" aria-label="Tokens" tabindex="0"></div></section>
  <section class="pane" id="rout" data-empty="Each token's experts appear here, layer by layer, as it is computed."><div class="head"><h2>Routing</h2><span class="dim">layer by position, colour = first expert, strength = gate</span><span class="sp"></span><label class="ctl"><input type="checkbox" id="second"><span class="dim">Second expert</span></label><span class="ctl"><span class="dim">Load in</span><span class="seg" id="phase" role="group" aria-label="Phase of the load"><button aria-pressed="true" data-v="all">all</button><button aria-pressed="false" data-v="prefill">prefill</button><button aria-pressed="false" data-v="decode">decode</button></span></span></div>
   <div class="rwrap"><div><canvas id="c-map" class="hit" tabindex="0" role="img"></canvas></div><div><canvas id="c-load" class="hit" tabindex="0" role="img"></canvas></div></div></section>
  <section class="pane" id="attn" data-empty="Who reads whom, one head at a time."><div class="head"><h2>Attention</h2><span class="dim" id="atitle"></span><span class="sp"></span><span class="scale" id="ascale"></span></div>
   <div class="awrap"><div><canvas id="c-sheet" class="hit" tabindex="0" role="img"></canvas></div><div><canvas id="c-head" class="hit" tabindex="0" role="img"></canvas></div><div class="lists" id="lists"><div><h3 id="l-r"></h3><table id="t-r"></table></div><div><h3 id="l-b"></h3><table id="t-b"></table></div></div></div></section>
  <section class="pane" id="insp" data-empty="Pick a token to see its route, its predictions and its reads."><div class="head"><h2>Token</h2><span class="dim" id="iwhere"></span></div>
   <div id="ibig"></div><div class="kv" id="ikv"></div>
   <div class="blk"><h3 id="rtitle">Route through the layers</h3><canvas id="c-route" class="hit" tabindex="0" role="img"></canvas></div>
   <div class="blk"><h3>Next token, five most probable</h3><table id="t-next"></table></div>
   <div class="blk"><h3>Logit lens, best guess after a layer</h3><table id="t-lens"></table></div>
   <div id="ilists"></div>
   <div class="blk" id="quick"></div></section>
  <section class="pane" id="cmp" data-empty="Mark two runs A and B to compare them."><div class="head"><h2>Compare</h2><span class="dim" id="cname"></span><span class="sp"></span><span class="key" id="ckey"></span></div>
   <div class="cmpgrid"><div class="al" id="align"></div><div><div class="row" style="margin-bottom:4px;flex-wrap:wrap"><span class="dim">Routing, B − A</span><span class="sp" style="flex:1"></span><span class="seg" id="dsel" role="group" aria-label="Difference shown"><button aria-pressed="true" data-v="tv">all experts</button><button aria-pressed="false" data-v="x" id="d-x">one expert</button></span><span class="scale" id="dscale"></span></div><canvas id="c-diff" class="hit" tabindex="0" role="img"></canvas></div></div></section>
 </div>
</div>`;

const f32 = (view) => new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
const i32 = (view) => new Int32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
async function unpack(view) {
  const stream = new Blob([view]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const NN = "\u202f",
  MINUS = "\u2212";
const f = (x, d = 2) => (x < 0 ? MINUS : "") + Math.abs(x).toFixed(d);
const prob = (p) => (p > 0 && p < 0.005 ? "<0.01" : f(p));
const pct = (x, d = 1) => (100 * x).toFixed(d) + NN + "%";
const bytes = (b) => {
  const u = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (b >= 999.5 && i < 4) {
    b /= 1000;
    i++;
  }
  return (i ? (b < 9.995 ? b.toFixed(2) : b < 99.95 ? b.toFixed(1) : Math.round(b)) : b) + NN + u[i];
};
const esc = (s) => s.replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
const show = (p) => p.replace(/\n/g, "⏎").replace(/ /g, "·");

function render({ model, el }) {
  el.innerHTML = `<div class="gs" tabindex="-1" data-lm-suppress-shortcuts="true"><div class="body">${HTML}</div><div class="tip" id="tip" role="status"></div></div>`;
  const root = el.querySelector(".gs");
  const $ = (s) => root.querySelector(s);
  const css = (n) => getComputedStyle(root).getPropertyValue(n).trim();
  let M0 = null; // the model, as the kernel describes it
  let L = 0,
    E = 8,
    H = 0,
    BIG = false;
  const runs = new Map(); // id -> run, in the order they were made
  const EMPTY = { tok: [], ids: [], lp: [], C: [], n: 0, T: 1, np: 0, att: new Map(), done: false };
  let V = EMPTY; // the run that is shown
  let TOK = [],
    T = 1,
    NP = 0,
    LP = [],
    C = [];
  const S = {
    t: 0,
    l: 0,
    h: 0,
    iso: -1,
    n: 0,
    state: "empty",
    measure: "expert",
    phase: "all",
    second: false,
    digits: false,
    diff: "tv",
    hover: null,
    A: null,
    B: null,
    edits: [],
    taps: {},
    follow: false,
    error: {},
    message: "",
  };

  // Runs

  function use(run) {
    V = run;
    TOK = V.tok;
    T = Math.max(1, V.T);
    NP = V.np;
    LP = V.lp;
    C = V.C;
    S.n = V.n;
  }
  function cellOf(z, o) {
    const p = new Float32Array(E),
      own = z.slice(o, o + E);
    let m = -Infinity,
      s = 0,
      a = 0,
      b = -1,
      h = 0;
    for (let e = 0; e < E; e++) m = Math.max(m, own[e]);
    for (let e = 0; e < E; e++) s += p[e] = Math.exp(own[e] - m);
    for (let e = 0; e < E; e++) p[e] /= s;
    for (let e = 1; e < E; e++) if (p[e] > p[a]) a = e;
    for (let e = 0; e < E; e++) if (e !== a && (b < 0 || p[e] > p[b])) b = e;
    for (const v of p) if (v > 0) h -= v * Math.log2(v);
    return { a, b, ga: p[a], gb: p[b], h, p, z: own };
  }
  function append(run, z, count) {
    for (let l = 0; l < L; l++) {
      run.C[l] = run.C[l] || [];
      for (let t = 0; t < count; t++) run.C[l].push(cellOf(z, (l * count + t) * E));
    }
    run.n += count;
  }
  function fresh(m, z) {
    const run = {
      id: m.run,
      name: m.name,
      tok: m.pieces,
      ids: m.ids,
      lp: m.logprobs,
      np: m.prompt_length,
      T: m.total,
      n: 0,
      C: [],
      att: new Map(),
      done: false,
      max: m.max,
      seconds: 0,
    };
    append(run, z, m.pieces.length);
    return run;
  }
  const asks = () => V.done && M0.panes.includes("attn");
  // Thumbnails of a layer's heads, at most 64 x 64 each; null until they are here.
  function sheet(l) {
    const found = V.att.get(l);
    if (found && found !== "asked") return found;
    if (asks() && !found) {
      V.att.set(l, "asked");
      model.send({ kind: "attention", run: V.id, layer: l });
    }
    return null;
  }
  // One head [T x T]; blank until it is here.
  function attn(l, h) {
    const key = l + "." + h,
      found = V.att.get(key);
    if (found && found !== "asked") return found;
    if (asks() && !found) {
      V.att.set(key, "asked");
      model.send({ kind: "head", run: V.id, layer: l, head: h });
    }
    if (!V.blank || V.blank.length !== T * T) {
      V.blank = new Float32Array(T * T);
      V.blank.label = null;
    }
    return V.blank;
  }
  const recv = (l, h) => {
    const M = attn(l, h);
    return TOK.map((_, j) => {
      let s = 0;
      for (let q = j + 1; q < S.n; q++) s += M[q * T + j];
      return j >= S.n - 1 ? 0 : s / (S.n - 1 - j);
    });
  };
  function nextOf(t) {
    const x = V.lens;
    if (!x) return { top: [], rank: "–" };
    const o = ((x.layers.length - 1) * T + t) * x.best,
      top = [];
    for (let k = 0; k < x.best; k++) {
      const id = x.tokens[o + k];
      top.push([x.words[id], Math.exp(x.logprob[o + k]), id === V.ids[t + 1]]);
    }
    const r = x.rank[(x.layers.length - 1) * T + t];
    return { top, rank: r < 0 ? "–" : r + 1 };
  }

  // Colour and drawing

  let K = {};
  const probe = document.createElement("canvas").getContext("2d");
  function plain(n) {
    probe.fillStyle = css(n);
    const c = probe.fillStyle;
    if (c[0] === "#") return c;
    return (
      "#" +
      c
        .match(/[\d.]+/g)
        .slice(0, 3)
        .map((x) => Math.round(+x).toString(16).padStart(2, "0"))
        .join("")
    );
  }
  const hex = (h) => {
    h = h.replace("#", "");
    return [0, 2, 4].map((i) => parseInt(h.slice(i, i + 2), 16));
  };
  function lut(stops) {
    const s = stops.split(",").map((x) => hex(x.trim()).map((v) => (v / 255) ** 2.2)),
      o = [];
    for (let i = 0; i < 256; i++) {
      const u = (i / 255) * (s.length - 1),
        k = Math.min(s.length - 2, u | 0),
        w = u - k;
      o.push([0, 1, 2].map((c) => Math.round(255 * (s[k][c] * (1 - w) + s[k + 1][c] * w) ** (1 / 2.2))));
    }
    return o;
  }
  function palette() {
    K = {
      floor: +css("--floor"),
      bg: hex(plain("--bg")),
      x: [...Array(E)].map((_, e) => hex(css("--x" + (e % 8)))),
      o: [...Array(E)].map((_, e) =>
        mix(hex(css("--x" + (e % 8))), lum(hex(plain("--sel"))) > 0.5 ? [255, 255, 255] : [0, 0, 0], 0.74),
      ),
      seq: lut(css("--seq")),
      div: lut(css("--div")),
      sel: css("--sel"),
      ink: css("--ink"),
      ink2: css("--ink2"),
      ink3: css("--ink3"),
      line: css("--line"),
      edge: css("--edge"),
      well: css("--well"),
      ui: css("--ui"),
    };
  }
  const rgb = (c) => `rgb(${c[0]},${c[1]},${c[2]})`,
    mix = (a, b, w) => a.map((v, i) => Math.round(v * w + b[i] * (1 - w)));
  const seq = (v) => K.seq[Math.max(0, Math.min(255, Math.round(v * 255)))],
    div = (v) => K.div[Math.max(0, Math.min(255, Math.round(((v + 1) / 2) * 255)))];
  const gateW = (g) => K.floor + (1 - K.floor) * Math.max(0, Math.min(1, (g - 0.125) / 0.675));
  const lum = (c) => c.map((v) => (v / 255) ** 2.2).reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
  const onto = (c) => (lum(c) > 0.2 ? "#111" : "#fff");
  const bgcss = () => rgb(K.bg);
  function fit(cv, w, h) {
    const d = window.devicePixelRatio || 1;
    cv.width = Math.round(w * d);
    cv.height = Math.round(h * d);
    cv.style.width = w + "px";
    cv.style.height = h + "px";
    const g = cv.getContext("2d");
    g.scale(d, d);
    g.clearRect(0, 0, w, h);
    g.textBaseline = "middle";
    return g;
  }
  const font = (g, px, w = 400) => (g.font = `${w} ${px}px ${K.ui}`);
  function label(g, s, x, y, al, col, px = 11, w = 400) {
    font(g, px, w);
    g.textAlign = al;
    g.fillStyle = col;
    g.fillText(s, x, y);
  }
  function frameRect(g, x, y, w, h) {
    g.lineWidth = 1;
    g.strokeStyle = bgcss();
    g.strokeRect(x - 1.5, y - 1.5, w + 3, h + 3);
    g.strokeStyle = bgcss();
    g.strokeRect(x + 1.5, y + 1.5, w - 3, h - 3);
    g.lineWidth = 2;
    g.strokeStyle = K.sel;
    g.strokeRect(x, y, w, h);
  }

  // Views
  const MEAS = {
    entropy: { r: [0, 3], u: "bits" },
    margin: { r: [0, 1], u: "" },
    logp: { r: [-8, 0], u: "nats" },
    recv: { r: [0, 0.5], u: "" },
  };
  function measure(t) {
    const c = C[S.l][t];
    return { entropy: c.h, margin: c.ga - c.gb, logp: LP[t], recv: (S.rc || (S.rc = recv(S.l, S.h)))[t] }[S.measure];
  }
  function strip() {
    S.rc = null;
    const el = $("#strip");
    let h = "";
    if (!S.n) {
      el.innerHTML = '<div class="empty">No run yet. Type a prompt and press Generate.</div>';
      $("#tcount").textContent = "";
      return;
    }
    for (let t = 0; t < S.n; t++) {
      const p = TOK[t],
        brk = p.endsWith("\n");
      let sty,
        cls = "tok";
      if (S.measure === "expert") {
        const c = C[S.l][t];
        sty = `--c:var(--x${c.a});--a:calc(var(--tint)*${gateW(c.ga).toFixed(2)})`;
        if (S.iso >= 0 && c.a !== S.iso) cls += " off";
      } else {
        const m = MEAS[S.measure];
        let v = (measure(t) - m.r[0]) / (m.r[1] - m.r[0]);
        if (S.measure === "logp") v = 1 - v;
        if (S.measure === "recv") v = Math.sqrt(Math.max(0, Math.min(1, v)));
        sty = `--c:${rgb(seq(0.06 + 0.94 * Math.max(0, Math.min(1, v))))};--a:55%`;
      }
      if (t === S.t) cls += " sel";
      if (p.trim() === "" && brk) cls += " nl";
      const dg =
        S.digits || t === S.t
          ? S.measure === "expert"
            ? `<sub>${C[S.l][t].a}</sub>`
            : S.digits
              ? `<sub>${f(measure(t), 1)}</sub>`
              : ""
          : "";
      const bound = t === NP ? '<span class="bound">decode</span>' : "";
      const glue = t > 0 && t !== NP && !/^([ \n]|<\d+>$)/.test(p) && !TOK[t - 1].endsWith("\n");
      if (!glue) h += (t ? "</span>" : "") + bound + '<span class="w">';
      h += `<span class="${cls}" role="option" aria-selected="${t === S.t}" data-t="${t}" style="${sty}">${esc(p.replace(/\n/g, "⏎"))}${dg}</span>`;
      if (brk) {
        h += '</span>\n<span class="w">';
      }
    }
    el.innerHTML = h + "</span>";
    $("#tcount").textContent = `${S.n} tokens: ${Math.min(NP, S.n)} prefill, ${Math.max(0, S.n - NP)} decode`;
    const m = MEAS[S.measure];
    $("#tscale").innerHTML = m
      ? `<span>${S.measure === "logp" ? "0" : f(m.r[0], 0)}</span><i style="background:linear-gradient(90deg,${css("--seq")})"></i><span>${S.measure === "logp" ? MINUS + "8" : m.r[1] < 1 ? m.r[1] : m.r[1]}${m.u ? " " + m.u : ""}</span>`
      : "";
    const s = el.querySelector(".sel");
    if (s) {
      const a = s.offsetTop - el.offsetTop;
      if (a < el.scrollTop || a > el.scrollTop + el.clientHeight - 28) el.scrollTop = Math.max(0, a - 56);
    }
  }

  let G = {};
  function mapGeom() {
    const w = $("#c-map").parentElement.clientWidth,
      gut = 60,
      top = 34,
      rh = BIG ? 7 : root.clientWidth >= 1560 ? 28 : 24,
      mh = L * rh,
      tk = [
        [MINUS + "log p", LP.slice(0, S.n).map((v, i) => (i ? v / -8 : 0)), "0–8 nats"],
        ["entropy", C[S.l].map((c) => c.h / Math.log2(E)), "0–3 bits"],
        ["margin", C[S.l].map((c) => c.ga - c.gb), "0–1"],
      ];
    const mw = w - gut - 1,
      x = (t) => gut + Math.round((t * mw) / T),
      y = (l) => top + l * rh,
      th = 26,
      ty = (i) => top + mh + 10 + i * (th + 6);
    return { w, gut, top, rh, mh, mw, x, y, tk, th, ty, h: top + mh + 10 + 3 * (th + 6) + 4 };
  }
  function drawMap() {
    const cv = $("#c-map"),
      M = (G.map = mapGeom()),
      g = fit(cv, M.w, M.h);
    cv.setAttribute(
      "aria-label",
      `Routing map, ${L} layers by ${T} positions. Selected: layer ${S.l}, position ${S.t}, expert ${C[S.l][S.t].a}`,
    );
    const gap = M.mw / T > 7 ? 1 : 0,
      vg = M.rh > 12 ? 1 : 0;
    for (let l = 0; l < L; l++)
      for (let t = 0; t < S.n; t++) {
        const c = C[l][t],
          x = M.x(t),
          w = M.x(t + 1) - x - gap,
          y = M.y(l),
          h = M.rh - vg,
          hid = S.iso >= 0 && c.a !== S.iso && !(S.second && c.b === S.iso);
        const put = (e, ga, yy, hh) => {
          g.fillStyle = S.iso >= 0 && e !== S.iso ? K.well : rgb(mix(K.x[e], K.bg, gateW(ga)));
          g.fillRect(x, yy, w, hh);
        };
        if (S.second) {
          const h1 = Math.round(h * 0.62);
          put(c.a, c.ga, y, h1);
          put(c.b, c.gb, y + h1, h - h1);
        } else put(c.a, c.ga, y, h);
      }
    if (S.n < T) {
      g.fillStyle = K.well;
      g.fillRect(M.x(S.n), M.top, M.x(T) - M.x(S.n), M.mh);
    }
    // layer axis
    label(g, "layer", M.gut - 8, M.top - 10, "right", K.ink2);
    for (let l = 0; l < L; l++)
      if (!BIG || l % 8 === 0 || l === S.l) {
        if (BIG && l !== S.l && Math.abs(l - S.l) < 2) continue;
        label(
          g,
          String(l),
          M.gut - 8,
          M.y(l) + M.rh / 2,
          "right",
          l === S.l ? K.sel : K.ink2,
          11,
          l === S.l ? 600 : 400,
        );
      }
    // tracks
    M.tk.forEach(([name, v, mx], i) => {
      const y = M.ty(i);
      label(g, name, M.gut - 8, y + 7, "right", K.ink);
      label(g, mx, M.gut - 8, y + 19, "right", K.ink2, 10);
      g.fillStyle = K.line;
      g.fillRect(M.gut, y + M.th, M.mw, 1);
      for (let t = 0; t < S.n; t++) {
        const h = Math.max(1, Math.max(0, Math.min(1, v[t] || 0)) * M.th);
        g.fillStyle = t === S.t ? K.sel : K.ink3;
        g.fillRect(M.x(t), y + M.th - h, Math.max(1, M.x(t + 1) - M.x(t) - 1), h);
      }
    });
    // position axis, phases
    const xb = M.x(NP),
      selx = (M.x(S.t) + M.x(S.t + 1)) / 2,
      txt = `${S.t} ${show(TOK[S.t])}`;
    font(g, 11, 600);
    const tw = g.measureText(txt).width + 10,
      px = Math.max(M.gut, Math.min(M.w - tw, selx - tw / 2));
    const stepT = T > 120 ? 20 : 10;
    for (let t = 0; t < T; t += stepT) {
      const xx = M.x(t) + (M.x(t + 1) - M.x(t)) / 2;
      if (xx > px - 14 && xx < px + tw + 14) continue;
      label(g, String(t), xx, M.top - 10, "center", K.ink2);
    }
    label(g, `prefill, ${NP}`, M.gut, 8, "left", K.ink2);
    if (T > NP) label(g, `decode, ${T - NP}`, xb + 5, 8, "left", K.ink2);
    g.fillStyle = K.sel;
    for (let y = 1; y < M.h - 4; y += 5) {
      if (y > M.top - 18 && y < M.top - 2 && xb > px - 2 && xb < px + tw + 2) continue;
      g.fillRect(xb - 1, y, 1, 3);
    }
    // selection
    const x0 = M.x(S.t),
      x1 = M.x(S.t + 1) - gap;
    g.fillStyle = K.sel;
    const colTop = M.top,
      colBot = M.ty(2) + M.th;
    for (const xx of [x0 - 1, x1]) {
      g.fillStyle = K.sel;
      g.globalAlpha = 0.55;
      g.fillRect(xx, colTop, 1, colBot - colTop);
      g.globalAlpha = 1;
    }
    g.globalAlpha = 0.55;
    g.fillStyle = K.sel;
    g.fillRect(M.gut, M.y(S.l) - 1, M.mw, 1);
    g.fillRect(M.gut, M.y(S.l) + M.rh - vg, M.mw, 1);
    g.globalAlpha = 1;
    if (!BIG && M.mw / T > 9) {
      for (let t = 0; t < S.n; t++) {
        const c = C[S.l][t];
        if (S.iso >= 0 && c.a !== S.iso) continue;
        const col = mix(K.x[c.a], K.bg, gateW(c.ga));
        label(
          g,
          String(c.a),
          (M.x(t) + M.x(t + 1) - 1) / 2,
          M.y(S.l) + (S.second ? 8 : M.rh / 2),
          "center",
          onto(col),
          9,
        );
      }
      for (let l = 0; l < L; l++)
        if (l !== S.l && !(S.iso >= 0 && C[l][S.t].a !== S.iso)) {
          const c = C[l][S.t],
            col = mix(K.x[c.a], K.bg, gateW(c.ga));
          label(g, String(c.a), (x0 + x1) / 2, M.y(l) + (S.second ? 8 : M.rh / 2), "center", onto(col), 9);
        }
    }
    frameRect(g, x0 - 1, M.y(S.l) - 1, x1 - x0 + 2, M.rh - vg + 2);
    if (S.hover && S.hover.v === "map") {
      const { t, l } = S.hover;
      g.lineWidth = 1;
      g.strokeStyle = K.ink;
      g.strokeRect(M.x(t) - 0.5, M.y(l) - 0.5, M.x(t + 1) - M.x(t) - gap + 1, M.rh - vg + 1);
    }
    g.fillStyle = K.sel;
    g.fillRect(px, M.top - 18, tw, 15);
    label(g, txt, px + tw / 2, M.top - 10, "center", bgcss(), 11, 600);
  }
  function loadOf(l, ph) {
    const n = new Array(E).fill(0);
    for (let t = 0; t < S.n; t++)
      if (ph === "all" || (ph === "prefill") === t < NP) {
        n[C[l][t].a]++;
        n[C[l][t].b]++;
      }
    const s = n.reduce((a, b) => a + b, 0);
    return { n, s: s || 1 };
  }
  function drawLoad() {
    const cv = $("#c-load"),
      M = G.map,
      w = 208,
      cw = Math.floor((w - 1) / E),
      g = fit(cv, w, M.h);
    G.load = { cw };
    cv.setAttribute("aria-label", "Expert load by layer against an even share");
    label(g, "Expert load, %", 0, 8, "left", K.ink2);
    for (let i = 0; i < 56; i++) {
      g.fillStyle = rgb(div((i / 55) * 2 - 1));
      g.fillRect(w - 80 + i, 4, 1, 8);
    }
    label(g, "0", w - 84, 8, "right", K.ink2, 10);
    label(g, String(200 / E), w - 2, 8, "right", K.ink2, 10);
    g.fillStyle = K.sel;
    g.fillRect(w - 52, 2, 1, 12);
    for (let e = 0; e < E; e++) {
      const cx = e * cw + cw / 2 - 0.5;
      g.fillStyle = rgb(K.x[e]);
      g.fillRect(cx - 10, M.top - 14, 8, 8);
      label(g, String(e), cx + 4, M.top - 10, "center", K.ink);
    }
    for (let l = 0; l < L; l++) {
      const d = loadOf(l, S.phase);
      for (let e = 0; e < E; e++) {
        const sh = d.n[e] / d.s,
          c = div((sh - 1 / E) * E);
        g.fillStyle = rgb(c);
        if (S.iso >= 0 && e !== S.iso) g.globalAlpha = 0.35;
        g.fillRect(e * cw, M.y(l), cw - 1, M.rh - (BIG ? 0 : 1));
        if (!BIG) label(g, String(Math.round(100 * sh)), e * cw + cw - 6, M.y(l) + M.rh / 2, "right", onto(c));
        g.globalAlpha = 1;
      }
    }
    g.globalAlpha = 0.55;
    g.fillStyle = K.sel;
    g.fillRect(0, M.y(S.l) - 1, E * cw - 1, 1);
    g.fillRect(0, M.y(S.l) + M.rh - (BIG ? 0 : 1), E * cw - 1, 1);
    g.globalAlpha = 1;
    const y0 = M.ty(0),
      bh = M.h - y0 - 34,
      base = y0 + 14 + bh,
      a = loadOf(S.l, "prefill"),
      b = loadOf(S.l, "decode"),
      mx = Math.max(0.3, ...a.n.map((v) => v / a.s), ...b.n.map((v) => v / b.s));
    label(g, `layer ${S.l}: prefill`, 0, y0 + 1, "left", K.ink2);
    font(g, 11);
    const wx = g.measureText(`layer ${S.l}: prefill`).width;
    g.strokeStyle = K.ink2;
    g.lineWidth = 1;
    g.strokeRect(wx + 6.5, y0 - 3.5, 8, 8);
    label(g, "decode", wx + 24, y0 + 1, "left", K.ink2);
    font(g, 11);
    const w2 = wx + 24 + g.measureText("decode").width;
    g.fillStyle = K.ink2;
    g.fillRect(w2 + 6, y0 - 4, 9, 9);
    for (let e = 0; e < E; e++) {
      const x = e * cw,
        h1 = Math.min(1, a.n[e] / a.s / mx) * bh,
        h2 = Math.min(1, b.n[e] / b.s / mx) * bh;
      if (S.iso >= 0 && e !== S.iso) g.globalAlpha = 0.3;
      g.strokeStyle = rgb(K.o[e]);
      g.lineWidth = 1;
      g.strokeRect(x + 3.5, base - h1 + 0.5, 7, Math.max(0, h1 - 0.5));
      g.fillStyle = rgb(K.x[e]);
      g.fillRect(x + 13, base - h2, 8, h2);
      g.globalAlpha = 1;
      label(g, String(a.n[e] + b.n[e]), x + cw - 4, base + 9, "right", K.ink2, 10);
    }
    g.fillStyle = K.edge;
    g.fillRect(0, base, E * cw - 1, 1);
    g.fillStyle = K.sel;
    const y8 = base - (1 / E / mx) * bh;
    for (let x = 0; x < E * cw - 1; x += 4) g.fillRect(x, Math.round(y8), 2, 1);
    label(g, "1/" + E, w - 1, y8 - 7, "right", K.ink2, 10);
  }
  function drawSheet() {
    const cv = $("#c-sheet"),
      w = cv.parentElement.clientWidth,
      wide = root.clientWidth >= 1560,
      nc = BIG ? (wide ? 8 : w > 560 ? 12 : 8) : wide ? 4 : 8,
      gap = BIG && !wide ? 4 : 10,
      tw = Math.floor((w - (nc - 1) * gap) / nc),
      lh = BIG ? 12 : 16,
      rows = Math.ceil(H / nc),
      h = rows * (tw + lh + (BIG ? 2 : 6)),
      g = fit(cv, w, h + 4);
    G.sheet = { nc, gap, tw, lh, rh: tw + lh + (BIG ? 2 : 6) };
    cv.setAttribute("aria-label", `${H} heads of layer ${S.l}`);
    const maps = sheet(S.l);
    for (let i = 0; i < H; i++) {
      const x = (i % nc) * (tw + gap),
        y = 2 + Math.floor(i / nc) * G.sheet.rh,
        M = maps ? maps[i] : null;
      g.fillStyle = rgb(seq(0));
      g.fillRect(x, y, tw, tw);
      const oc = document.createElement("canvas");
      oc.width = oc.height = tw;
      const o = oc.getContext("2d"),
        im = o.createImageData(tw, tw);
      for (let r = 0; r < tw; r++)
        for (let c = 0; c < tw; c++) {
          const n = maps ? maps.n : 1,
            q = Math.floor((r * n) / tw),
            k = Math.floor((c * n) / tw),
            co = !M || c > r ? K.bg : seq(0.03 + 0.97 * M[q * n + k]),
            p = (r * tw + c) * 4;
          im.data[p] = co[0];
          im.data[p + 1] = co[1];
          im.data[p + 2] = co[2];
          im.data[p + 3] = 255;
        }
      o.putImageData(im, 0, 0);
      g.drawImage(oc, x, y, tw, tw);
      g.strokeStyle = K.line;
      g.lineWidth = 1;
      g.beginPath();
      g.moveTo(x + 0.5, y);
      g.lineTo(x + 0.5, y + tw - 0.5);
      g.lineTo(x + tw, y + tw - 0.5);
      g.stroke();
      const on = i === S.h;
      label(g, String(i), x, y + tw + lh / 2, "left", on ? K.sel : K.ink2, BIG ? 9 : 11, on ? 600 : 400);
      if (tw >= 68 && M && M.label)
        label(
          g,
          `${{ previous: "prev", duplicate: "dup", induction: "induct" }[M.label[0]] || M.label[0]} ${f(M.label[1])}`,
          x + tw,
          y + tw + lh / 2,
          "right",
          K.ink2,
          10,
        );
      if (on) {
        g.strokeStyle = K.sel;
        g.lineWidth = 2;
        g.strokeRect(x, y, tw, tw);
      }
    }
  }
  function drawHead() {
    const cv = $("#c-head"),
      w = cv.parentElement.clientWidth,
      gut = 26,
      top = 6,
      bot = 18,
      n = Math.min(w - gut - 2, 440),
      g = fit(cv, w, n + top + bot),
      M = attn(S.l, S.h),
      k = n / T;
    G.head = { gut, top, k, n };
    cv.setAttribute("aria-label", `Attention of head ${S.l}.${S.h}, reading position by read position`);
    const oc = document.createElement("canvas");
    oc.width = oc.height = T;
    const o = oc.getContext("2d"),
      im = o.createImageData(T, T);
    for (let q = 0; q < T; q++)
      for (let j = 0; j < T; j++) {
        const co = j > q || q >= S.n ? K.bg : seq(0.03 + 0.97 * Math.sqrt(M[q * T + j])),
          p = (q * T + j) * 4;
        im.data[p] = co[0];
        im.data[p + 1] = co[1];
        im.data[p + 2] = co[2];
        im.data[p + 3] = 255;
      }
    o.putImageData(im, 0, 0);
    g.imageSmoothingEnabled = false;
    g.drawImage(oc, gut, top, n, n);
    g.strokeStyle = K.edge;
    g.lineWidth = 1;
    g.beginPath();
    g.moveTo(gut + 0.5, top);
    g.lineTo(gut + 0.5, top + n + 0.5);
    g.lineTo(gut + n, top + n + 0.5);
    g.stroke();
    const sx = T > 120 ? 40 : 10;
    for (let t = 0; t < T; t += sx) {
      if (Math.abs(t - S.t) * k > (T > 100 ? 28 : 18))
        label(g, String(t), gut + (t + 0.5) * k, top + n + 10, "center", K.ink2, 10);
      if (Math.abs(t - S.t) * k > 10) label(g, String(t), gut - 5, top + (t + 0.5) * k, "right", K.ink2, 10);
    }
    label(g, String(S.t), gut + (S.t + 0.5) * k, top + n + 10, "center", K.sel, 10, 600);
    label(g, String(S.t), gut - 5, top + (S.t + 0.5) * k, "right", K.sel, 10, 600);
    const b = gut + NP * k;
    g.fillStyle = K.ink3;
    for (let y = 0; y < n; y += 5) {
      if (y / k >= NP) g.fillRect(b, top + y, 1, 3);
    }
    for (let x = 0; x < NP * k; x += 5) g.fillRect(gut + x, top + NP * k, 3, 1);
    g.globalAlpha = 0.6;
    g.fillStyle = K.sel;
    const q = S.t;
    g.fillRect(gut, top + q * k - 1, (q + 1) * k, 1);
    g.fillRect(gut, top + (q + 1) * k, (q + 1) * k, 1);
    g.fillRect(gut + q * k - 1, top + q * k, 1, n - q * k);
    g.fillRect(gut + (q + 1) * k, top + q * k, 1, n - q * k);
    g.globalAlpha = 1;
    if (n > 220) {
      const x = gut + n * 0.52,
        y = top + 16;
      label(g, `head ${S.l}.${S.h}`, gut + n, y, "right", K.ink, 12, 600);
      label(
        g,
        M.label
          ? `${{ previous: "previous token", first: "first token", induction: "induction", duplicate: "same token" }[M.label[0]]} ${f(M.label[1])}`
          : V.done
            ? "no simple pattern"
            : "when the run is done",
        gut + n,
        y + 16,
        "right",
        K.ink2,
      );
      label(g, "row reads column", gut + n, y + 32, "right", K.ink2);
    }
  }
  function lists() {
    const M = attn(S.l, S.h),
      q = S.t,
      row = [],
      col = [];
    for (let j = 0; j <= q; j++) row.push([j, M[q * T + j]]);
    for (let r = q + 1; r < S.n; r++) col.push([r, M[r * T + q]]);
    const tab = (a) => {
      a.sort((x, y) => y[1] - x[1]);
      return (
        a
          .slice(0, 8)
          .map(
            ([j, v]) =>
              `<tr class="pick" data-t="${j}"><td class="num dim" style="width:30px;padding:0 8px 0 0">${j}</td><td class="p bar" style="--w:${(100 * v).toFixed(1)}%">${esc(show(TOK[j]))}</td><td class="num" style="width:42px">${prob(v)}</td></tr>`,
          )
          .join("") || '<tr><td class="dim">Nothing: this is the last token</td></tr>'
      );
    };
    $("#l-r").innerHTML = `Position ${q} reads`;
    $("#l-b").innerHTML = `Position ${q} is read by`;
    $("#t-r").innerHTML = tab(row);
    $("#t-b").innerHTML = tab(col);
    $("#atitle").textContent = `layer ${S.l}, ${H} heads`;
    $("#ascale").innerHTML =
      `<span>0</span><i style="background:linear-gradient(90deg,${css("--seq")})"></i><span>1</span><span>square root</span>`;
  }
  function inspector() {
    const t = S.t,
      c = C[S.l][t],
      nx = nextOf(t);
    $("#iwhere").textContent = `position ${t}, ${t < NP ? "prefill" : "decode"}`;
    $("#ibig").innerHTML =
      `<div class="big"><span class="t" style="--c:var(--x${c.a})">${esc(show(TOK[t]))}</span><span class="dim">id ${V.ids[t]}</span></div>`;
    const pr = nextOf(Math.max(0, t - 1));
    $("#ikv").innerHTML = [
      ["Log-prob.", t ? f(LP[t]) : "–"],
      ["Rank", t ? pr.rank : "–"],
      ["Entropy", f(c.h) + " bits"],
      ["Margin", f(c.ga - c.gb)],
    ]
      .map(([k, v]) => `<div><span>${k}</span><b>${v}</b></div>`)
      .join("");
    $("#t-next").innerHTML = nx.top
      .map(
        ([w, p, a]) =>
          `<tr><td class="num" style="width:24px;padding:0 8px 0 0">${a ? "▸" : ""}</td><td class="p bar" style="--w:${(100 * p).toFixed(1)}%;${a ? "font-weight:600" : ""}">${esc(show(w))}</td><td class="num" style="width:42px;${a ? "font-weight:600" : ""}">${prob(p)}</td></tr>`,
      )
      .join("");
    const X = V.lens;
    $("#t-lens").innerHTML = X
      ? X.layers
          .map((l, i) => {
            const o = (i * T + t) * X.best,
              w = X.words[X.tokens[o]],
              q = Math.exp(X.logprob[o]);
            return `<tr class="pick" data-l="${l}"><td class="num ${l === S.l ? "" : "dim"}" style="width:24px;padding:0 8px 0 0;${l === S.l ? "font-weight:600" : ""}">${l}</td><td class="p bar" style="--w:${(100 * q).toFixed(1)}%">${esc(show(w))}</td><td class="num" style="width:42px">${prob(q)}</td></tr>`;
          })
          .join("")
      : `<tr><td class="dim">${V.done ? "No lens was captured" : "When the run is done"}</td></tr>`;
    if (!X)
      $("#t-next").innerHTML =
        `<tr><td class="dim">${V.done ? "No lens was captured" : "When the run is done"}</td></tr>`;
    const wide = root.clientWidth >= 1560,
      box = wide ? $("#ilists") : $(".awrap");
    if ($("#lists").parentElement !== box) box.append($("#lists"));
    $("#quick").innerHTML =
      `<h3>Edit here</h3><div class="chips"><button class="chip" data-q="ban">Ban expert ${c.a} @ layer ${S.l}</button><button class="chip" data-q="force">Force expert ${c.b} @ layer ${S.l}</button><button class="chip" data-q="scale">Head ${S.l}.${S.h} × 0</button></div>`;
    route();
  }
  function route() {
    const cv = $("#c-route"),
      w = cv.parentElement.clientWidth,
      wd = w > 320,
      rh = BIG ? (wd ? 7 : 6) : wd ? 24 : 18,
      top = 18,
      gut = 24,
      cw = wd ? 22 : 16,
      cx = (e) => gut + e * cw,
      g = fit(cv, w, top + L * rh + 2),
      t = S.t,
      nx = gut + E * cw + 14;
    G.route = { rh, top };
    cv.setAttribute("aria-label", `Route of position ${t} through ${L} layers`);
    for (let e = 0; e < E; e++) label(g, String(e), cx(e) + cw / 2, 8, "center", K.ink2, 10);
    const c1 = nx,
      c2 = nx + (w - nx) / 2 + 4;
    label(g, "first", c1, 8, "left", K.ink2, 10);
    label(g, "second", c2, 8, "left", K.ink2, 10);
    g.strokeStyle = K.ink3;
    g.lineWidth = 1;
    g.beginPath();
    for (let l = 0; l < L; l++) {
      const c = C[l][t],
        x = cx(c.a) + cw / 2,
        y = top + l * rh + rh / 2;
      l ? g.lineTo(x, y) : g.moveTo(x, y);
    }
    g.stroke();
    for (let l = 0; l < L; l++) {
      const c = C[l][t],
        y = top + l * rh,
        on = l === S.l;
      if (!BIG || l % 8 === 0 || on) {
        if (!(BIG && !on && Math.abs(l - S.l) < 2))
          label(g, String(l), gut - 8, y + rh / 2, "right", on ? K.sel : K.ink2, BIG ? 10 : 11, on ? 600 : 400);
      }
      if (!BIG)
        for (let e = 0; e < E; e++) {
          g.fillStyle = K.line;
          g.fillRect(cx(e) + cw / 2 - 1, y + rh / 2 - 1, 2, 2);
        }
      const pt = (e, ga, hollow) => {
        const s = BIG ? (hollow ? 3 : rh - 1) : Math.round((hollow ? 5 : 6) + (wd ? 10 : 8) * ga),
          x = cx(e) + cw / 2 - s / 2,
          yy = y + rh / 2 - s / 2;
        g.fillStyle = hollow ? bgcss() : rgb(K.x[e]);
        g.fillRect(x, yy, s, s);
        if (hollow) {
          g.strokeStyle = rgb(K.o[e]);
          g.lineWidth = BIG ? 1 : 2;
          g.strokeRect(x + 0.5, yy + 0.5, s - 1, s - 1);
        }
      };
      pt(c.b, c.gb, true);
      pt(c.a, c.ga, false);
      if (!BIG || on) {
        const yy = BIG ? Math.max(top + 6, y + rh / 2) : y + rh / 2;
        label(g, `${c.a}`, c1, yy, "left", K.ink, 11, 600);
        label(g, f(c.ga), c1 + 14, yy, "left", K.ink);
        label(g, `${c.b}`, c2, yy, "left", K.ink, 11, 600);
        label(g, f(c.gb), c2 + 14, yy, "left", K.ink2);
      }
      if (on) {
        g.globalAlpha = 0.55;
        g.fillStyle = K.sel;
        g.fillRect(gut - 4, y, E * cw + 8, 1);
        g.fillRect(gut - 4, y + rh - 1, E * cw + 8, 1);
        g.globalAlpha = 1;
      }
    }
  }

  // Compare

  let TA = [],
    TB = [],
    CA = [],
    CB = [],
    TC = 1;
  function pairOf() {
    const a = runs.get(S.A),
      b = runs.get(S.B);
    if (!a || !b || a === b) return null;
    TA = a.tok;
    TB = b.tok;
    CA = a.C;
    CB = b.C;
    TC = Math.min(a.n, b.n);
    return [a, b];
  }
  function firstDiff() {
    for (let i = 0; i < TC; i++) if (TA[i] !== TB[i]) return i;
    return TC;
  }
  function compare() {
    const pair = pairOf(),
      al = $("#align"),
      el = al;
    $(".cmpgrid").style.display = pair ? "" : "none";
    $("#cname").textContent = pair
      ? `A: run ${pair[0].id}, ${pair[0].name}. B: run ${pair[1].id}, ${pair[1].name}`
      : "Mark two runs A and B to compare them.";
    if (!pair) {
      $("#ckey").innerHTML = "";
      return;
    }
    const fd = firstDiff(),
      np = pair[0].np;
    let ch = 0,
      n = 0;
    for (let l = 0; l < L; l++)
      for (let t = 0; t < fd; t++) {
        n++;
        if (CA[l][t].a !== CB[l][t].a) ch++;
      }
    $("#ckey").innerHTML =
      `<span><span class="dim">First divergence</span>${fd < TC ? `position ${fd}${fd >= np ? `, decode ${fd - np + 1}` : ""}: <span class="code">${esc(show(TA[fd]))} → ${esc(show(TB[fd]))}</span>` : "none"}</span><span><span class="dim">First expert changed before it</span>${pct(n ? ch / n : 0)} of ${n.toLocaleString("en").replace(/,/g, NN)}</span>`;
    const g = document.createElement("canvas").getContext("2d");
    g.font = "12px " + css("--code");
    const cwid = g.measureText("M").width,
      avail = Math.floor((el.clientWidth - 24) / cwid);
    const from = TC > 120 ? Math.max(0, Math.min(np, fd) - 20) : 0,
      wd = (i) => Math.max([...show(TA[i])].length, [...show(TB[i])].length) + 1;
    let lines = [],
      cur = [],
      len = 0;
    for (let i = from; i < TC; i++) {
      if (len + wd(i) > avail) {
        lines.push(cur);
        cur = [];
        len = 0;
      }
      cur.push(i);
      len += wd(i);
    }
    lines.push(cur);
    if (lines.length > 8) lines = lines.slice(0, 8);
    el.innerHTML = lines
      .map((ix) => {
        let off = 0,
          ps = "",
          a = "",
          b = "",
          last = -9;
        ix.forEach((i, k) => {
          const x = off * cwid,
            w = wd(i);
          if (i === fd) {
            ps += `<span class="mk" style="left:${x}px">▾ ${i}</span>`;
            last = off + 3;
          } else if (off - last >= 4 && (k === 0 || i % 5 === 0) && !(fd > i && fd < i + 2 && ix.includes(fd))) {
            ps += `<span style="left:${x}px">${i}</span>`;
            last = off;
          }
          const s = TA[i] === TB[i],
            cl = (s ? (i < fd ? "" : "same") : "d") + (i === S.t ? " cur" : "");
          const pad = (p) => {
            const q = show(p);
            return [esc(q), " ".repeat(w - [...q].length)];
          };
          const [a1, a2] = pad(TA[i]),
            [b1, b2] = pad(TB[i]);
          a += `<span class="${cl}" data-t="${i}" style="--c:${rgb(div(-0.72))}">${a1}</span>${a2}`;
          b += `<span class="${cl}" data-t="${i}" style="--c:${rgb(div(0.72))}">${b1}</span>${b2}`;
          off += w;
        });
        return `<div class="ln"><span class="lb"></span><div class="ps">${ps}</div><span class="lb">A</span><div class="rw">${a}</div><span class="lb">B</span><div class="rw">${b}</div></div>`;
      })
      .join("");
    drawDiff(fd);
  }
  const isoOf = () => (S.iso >= 0 ? S.iso : V.n ? C[S.l][S.t].a : 0);
  function drawDiff(fd) {
    const cv = $("#c-diff"),
      w = cv.parentElement.clientWidth,
      gut = 48,
      top = 20,
      rh = BIG ? 4 : 20,
      mw = w - gut - 2,
      x = (t) => gut + Math.round((t * mw) / TC),
      kh = 30,
      h = top + L * rh + 8 + kh + 20,
      g = fit(cv, w, h),
      gap = mw / TC > 7 ? 1 : 0,
      vg = rh > 8 ? 1 : 0;
    G.diff = { gut, top, rh, mw, x };
    cv.setAttribute("aria-label", "Routing difference, edited minus baseline");
    for (let l = 0; l < L; l++)
      for (let t = 0; t < TC; t++) {
        const a = CA[l][t].p,
          b = CB[l][t].p;
        let c;
        if (S.diff === "x") c = div((b[isoOf()] - a[isoOf()]) / 0.5);
        else {
          let v = 0;
          for (let e = 0; e < E; e++) v += Math.abs(a[e] - b[e]);
          c = seq(0.03 + 0.97 * Math.min(1, v / 2));
        }
        if (t >= fd) g.globalAlpha = 0.45;
        g.fillStyle = rgb(c);
        g.fillRect(x(t), top + l * rh, x(t + 1) - x(t) - gap, rh - vg);
        g.globalAlpha = 1;
      }
    label(g, "layer", gut - 8, top - 10, "right", K.ink2);
    for (let l = 0; l < L; l++)
      if (!BIG || l % 8 === 0)
        label(
          g,
          String(l),
          gut - 8,
          top + l * rh + rh / 2,
          "right",
          l === S.l ? K.sel : K.ink2,
          BIG ? 10 : 11,
          l === S.l ? 600 : 400,
        );
    for (let t = 0; t < TC; t += TC > 120 ? 20 : 10)
      if (x(t) < x(fd) - 16 || x(t) > x(fd) + 44)
        label(g, String(t), (x(t) + x(t + 1)) / 2, top - 10, "center", K.ink2);
    const ky = top + L * rh + 8;
    label(g, "apart", gut - 8, ky + 8, "right", K.ink);
    label(g, "0–1, mean", gut - 8, ky + 22, "right", K.ink2, 10);
    g.fillStyle = K.line;
    g.fillRect(gut, ky + kh, mw, 1);
    for (let t = 0; t < TC; t++) {
      let v = 0;
      for (let l = 0; l < L; l++) {
        const a = CA[l][t].p,
          b = CB[l][t].p;
        for (let e = 0; e < E; e++) v += Math.abs(a[e] - b[e]) / 2;
      }
      v /= L;
      g.globalAlpha = t >= fd ? 0.45 : 1;
      g.fillStyle = t === S.t ? K.sel : K.ink3;
      const hh = Math.max(1, v * kh);
      g.fillRect(x(t), ky + kh - hh, Math.max(1, x(t + 1) - x(t) - 1), hh);
    }
    g.globalAlpha = 1;
    if (fd < TC) {
      g.fillStyle = K.sel;
      g.fillRect(x(fd) - 1, top - 4, 1, L * rh + 12 + kh);
      label(g, "▾ " + fd, x(fd) - 4, top - 10, "left", K.sel, 11, 600);
      label(g, "same text", x(fd) - 6, h - 8, "right", K.ink2);
      label(g, "texts differ", x(fd) + 5, h - 8, "left", K.ink2);
    }
    if (S.t < TC) {
      g.globalAlpha = 0.55;
      g.fillStyle = K.sel;
      g.fillRect(x(S.t) - 1, top, 1, L * rh);
      g.fillRect(x(S.t + 1) - gap, top, 1, L * rh);
      g.fillRect(gut, top + S.l * rh - 1, mw, 1);
      g.fillRect(gut, top + (S.l + 1) * rh - vg, mw, 1);
      g.globalAlpha = 1;
      frameRect(g, x(S.t) - 1, top + S.l * rh - 1, x(S.t + 1) - x(S.t) - gap + 2, rh - vg + 2);
    }
    $("#d-x").textContent = `gate of expert ${isoOf()}`;
    $("#dscale").innerHTML =
      S.diff === "x"
        ? `<span>${MINUS}0.5</span><i style="background:linear-gradient(90deg,${css("--div")})"></i><span>+0.5</span>`
        : `<span>0</span><i style="background:linear-gradient(90deg,${css("--seq")})"></i><span>1</span>`;
  }

  const ICON = {
    ready: ['<circle cx="5" cy="5" r="4" fill="none" stroke="currentColor" stroke-width="2"/>', "Ready"],
    empty: ['<circle cx="5" cy="5" r="4" fill="none" stroke="currentColor" stroke-width="2"/>', "Ready"],
    waiting: ['<circle cx="5" cy="5" r="4" fill="none" stroke="currentColor" stroke-width="2"/>', "Compiling"],
    running: ['<path d="M1 0L10 5L1 10Z"/>', "Generating"],
    stopped: ['<path d="M1 1H9V9H1Z"/>', "Stopped"],
    error: ['<path d="M5 0L10 10H0Z"/>', "Failed"],
  };
  const busy = () => S.state === "running" || S.state === "waiting";
  const speed = () => (V.n > V.np && V.seconds > 0 ? (V.n - V.np) / V.seconds : 0);
  const three = (x) => (x >= 100 ? x.toFixed(0) : x.toFixed(1));

  function ident() {
    const [icon, word] = ICON[S.state];
    const facts = M0.facts.map((x) => `<span class="fact dim opt">${x}</span>`).join("");
    const v = speed();
    $("#ident").innerHTML =
      `<b>grokscope</b><span class="fact"><b>${esc(M0.name)}</b></span>${facts}<span class="fact"><span class="dim">numerics</span>${M0.numerics}</span><span class="sp"></span><span class="fact">${v ? three(v) + " tokens/s" : ""}</span><span class="state" role="status" id="state"${S.state === "error" ? ' style="color:var(--bad)"' : ""}><svg viewBox="0 0 10 10">${icon}</svg>${word}</span>`;
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
    k.innerHTML = [...Array(E)]
      .map(
        (_, e) =>
          `<button aria-pressed="${S.iso === e}" data-e="${e}" title="Show only expert ${e}"><i class="sw" style="background:var(--x${e % 8})"></i>${e}</button>`,
      )
      .join("");
  }
  const message = (text) => (text ? `<div class="msg" role="alert">${esc(text)}</div>` : "");
  function promptPane() {
    $("#b-gen").disabled = busy();
    $("#b-stop").disabled = !busy();
    const made = Math.max(0, V.n - V.np),
      all = V.max || 1;
    $("#pg").style.width = (100 * made) / all + "%";
    $("#pg").parentElement.classList.toggle("done", !busy());
    const end = V.finish === "eos" ? "Ended by EOS at" : "Done:";
    $("#pgt").textContent = {
      ready: V.n ? `${end} ${made} of ${all} tokens in ${f(V.seconds)} s` : "No run yet",
      empty: "No run yet",
      waiting: `Compiling, ${S.message || "0"} s`,
      running: `${made} of ${all} tokens, ${three(speed())} tokens/s`,
      stopped: `Stopped at ${made} of ${all} tokens`,
      error: "Nothing was generated",
    }[S.state];
    $("#perr").innerHTML = message(S.error.generate);
  }
  function edits() {
    const name = (e) =>
      e.kind === "scale"
        ? `Scale head ${e.layer}.${e.number} × ${e.factor}`
        : e.kind === "steer"
          ? `Steer ${e.a} − ${e.b} × ${e.factor} @ layer ${e.layer}`
          : `${e.kind === "ban" ? "Ban" : "Force"} expert <i class="sw" style="background:var(--x${e.number % 8})"></i>${e.number} @ layer ${e.layer}`;
    $("#elist").innerHTML =
      S.edits
        .map(
          (e, i) =>
            `<div class="edit${e.on ? "" : " mute"}"><input type="checkbox" id="ed${i}" data-i="${i}"${e.on ? " checked" : ""}><label for="ed${i}">${name(e)}</label><button class="xbtn" data-i="${i}" aria-label="Remove this edit">×</button></div>`,
        )
        .join("") || '<div class="dim" style="padding:4px 0">No edits. Add one below, or from a token.</div>';
    const n = S.edits.filter((e) => e.on).length;
    $("#ecount").textContent = S.edits.length ? `${n} of ${S.edits.length} on` : "";
    $("#b-run").disabled = !n || busy();
    $("#eerr").innerHTML = message(S.error.edit);
  }
  function runList() {
    const rows = [...runs.values()].filter((r) => r.done).reverse();
    $("#trun").innerHTML =
      rows
        .map(
          (r) =>
            `<tr class="pick" data-run="${r.id}"><td class="dim num" style="width:18px">${r.id}</td><td class="nm" title="${esc(r.name)}"${r === V ? ' style="font-weight:600"' : ""}>${esc(r.name)}</td><td class="num dim">${r.n - r.np}</td><td class="ab" style="padding-left:8px!important;white-space:nowrap"><button data-r="A" data-id="${r.id}" aria-pressed="${S.A === r.id}" aria-label="Run ${r.id} as A">A</button><button data-r="B" data-id="${r.id}" aria-pressed="${S.B === r.id}" aria-label="Run ${r.id} as B">B</button></td></tr>`,
        )
        .join("") || '<tr><td class="dim">No runs yet</td></tr>';
  }
  function taps() {
    if (V.done && !V.bytes && M0.panes.includes("export")) {
      V.bytes = {};
      model.send({ kind: "price", run: V.id });
    }
    let total = 0;
    $("#taps").innerHTML =
      Object.entries(M0.taps)
        .map(([n, d]) => {
          const b = V.bytes && V.bytes[n];
          if (S.taps[n] && b) total += b;
          return `<tr title="${d}"><td><input type="checkbox" id="tp-${n}" data-n="${n}"${S.taps[n] ? " checked" : ""}></td><td class="code"><label for="tp-${n}">${n}</label></td><td class="num${S.taps[n] ? "" : " dim"}">${b === undefined ? "–" : bytes(b)}</td></tr>`;
        })
        .join("") +
      `<tr class="tot"><td colspan="2">Total on disk</td><td class="num"><b style="font-weight:600">${bytes(total)}</b></td></tr>`;
    $("#b-exp").disabled = !V.done || busy() || S.writing;
    $("#xgt").textContent = S.writing
      ? "Writing"
      : S.written
        ? `Written: ${bytes(S.written.bytes)}`
        : V.done
          ? ""
          : "Run once to export";
    $("#xg").style.width = S.written ? "100%" : "0";
    $("#xg").parentElement.classList.add("done");
    $("#xout").hidden = !S.written;
    if (S.written)
      $("#xout").textContent =
        `dump = gs.open("${S.written.path}")\ndump[0]["${S.written.taps[0] || "router_logits"}"]\ndump.to_pandas("${S.written.taps.includes("router_logits") ? "router" : "tokens"}")`;
    $("#xerr").innerHTML = message(S.error.export);
  }
  const maps = () => {
    drawMap();
    drawLoad();
  };
  function all() {
    if (!M0) return;
    use(V);
    root.classList.toggle("blank", !V.n);
    S.t = Math.max(0, Math.min(V.n - 1, S.t));
    ident();
    selbar();
    promptPane();
    strip();
    edits();
    runList();
    taps();
    compare();
    if (V.n) {
      maps();
      drawSheet();
      drawHead();
      lists();
      inspector();
    }
  }
  function pick(o) {
    Object.assign(S, o);
    S.follow = false;
    S.t = Math.max(0, Math.min(S.n - 1, S.t));
    S.l = Math.max(0, Math.min(L - 1, S.l));
    S.h = (S.h + H) % H;
    selbar();
    strip();
    if (!V.n) return;
    maps();
    if ("l" in o || "h" in o) drawSheet();
    drawHead();
    lists();
    inspector();
    compare();
  }

  // Pointer

  const tip = $("#tip");
  function tipAt(ev, html) {
    tip.innerHTML = html;
    tip.style.display = "block";
    const b = root.getBoundingClientRect(),
      w = tip.offsetWidth,
      h = tip.offsetHeight;
    let x = ev.clientX - b.left + 14,
      y = ev.clientY - b.top + 14;
    if (x + w > b.width) x = ev.clientX - b.left - w - 14;
    if (ev.clientY + h + 20 > innerHeight) y = ev.clientY - b.top - h - 14;
    tip.style.left = Math.max(0, x) + "px";
    tip.style.top = Math.max(0, y) + "px";
  }
  const hide = () => {
    tip.style.display = "none";
  };
  function cellTip(l, t) {
    const c = C[l][t],
      r = (n, e, gt) =>
        `<tr><th>${n}</th><td><i class="sw" style="background:var(--x${e})"></i> ${e}</td><td class="num">${f(gt, 3)}</td><td class="num">${f(c.z[e], 2)}</td></tr>`;
    return `<div class="ti">Layer ${l}, position ${t} <span class="code">${esc(show(TOK[t]))}</span></div><table><tr><th></th><th>expert</th><th class="num">gate</th><th class="num">logit</th></tr>${r("first", c.a, c.ga)}${r("second", c.b, c.gb)}</table><div class="mini">${[...c.p].map((p, e) => `<i style="height:${Math.max(1, (22 * p) / c.ga)}px;background:var(--x${e})"></i>`).join("")}</div><div class="mn">${[...c.p].map((_, e) => `<span>${e}</span>`).join("")}</div><div class="dim">entropy ${f(c.h)} bits, margin ${f(c.ga - c.gb)}, ${t < NP ? "prefill" : "decode"}</div>`;
  }
  function at(cv, ev) {
    const b = cv.getBoundingClientRect();
    return [ev.clientX - b.left, ev.clientY - b.top];
  }
  const mapHit = (ev) => {
    const [x, y] = at($("#c-map"), ev),
      M = G.map,
      t = Math.floor(((x - M.gut) / M.mw) * T),
      l = Math.floor((y - M.top) / M.rh);
    return x >= M.gut && t >= 0 && t < S.n && y >= M.top ? { t, l: l < L ? l : null } : null;
  };
  $("#c-map").addEventListener("pointermove", (ev) => {
    const h = mapHit(ev);
    if (!h) {
      hide();
      S.hover = null;
      drawMap();
      return;
    }
    if (h.l === null) {
      S.hover = null;
      tipAt(
        ev,
        `<div class="ti">Position ${h.t} <span class="code">${esc(show(TOK[h.t]))}</span></div><table><tr><th>log-probability</th><td class="num">${f(LP[h.t])}</td></tr><tr><th>entropy, layer ${S.l}</th><td class="num">${f(C[S.l][h.t].h)}</td></tr><tr><th>margin, layer ${S.l}</th><td class="num">${f(C[S.l][h.t].ga - C[S.l][h.t].gb)}</td></tr></table>`,
      );
      return;
    }
    S.hover = { v: "map", ...h };
    drawMap();
    tipAt(ev, cellTip(h.l, h.t));
  });
  $("#c-map").addEventListener("pointerleave", () => {
    S.hover = null;
    hide();
    drawMap();
  });
  $("#c-map").addEventListener("click", (ev) => {
    const h = mapHit(ev);
    if (h) pick(h.l === null ? { t: h.t } : { t: h.t, l: h.l });
  });
  $("#c-load").addEventListener("pointermove", (ev) => {
    const [x, y] = at($("#c-load"), ev),
      M = G.map,
      e = Math.floor(x / G.load.cw);
    let l = Math.floor((y - M.top) / M.rh);
    if (e < 0 || e >= E || y < M.top) {
      hide();
      return;
    }
    if (l >= L) l = S.l;
    const r = ["prefill", "decode", "all"]
      .map((p) => {
        const d = loadOf(l, p);
        return `<tr><th>${p}</th><td class="num">${d.n[e]} of ${d.s}</td><td class="num">${pct(d.n[e] / d.s)}</td></tr>`;
      })
      .join("");
    tipAt(
      ev,
      `<div class="ti">Layer ${l}, <i class="sw" style="background:var(--x${e})"></i> expert ${e}</div><table>${r}<tr><th>uniform</th><td></td><td class="num">${pct(1 / E)}</td></tr></table>`,
    );
  });
  $("#c-load").addEventListener("pointerleave", hide);
  $("#c-load").addEventListener("click", (ev) => {
    const [x, y] = at($("#c-load"), ev),
      l = Math.floor((y - G.map.top) / G.map.rh),
      e = Math.floor(x / G.load.cw);
    if (y < G.map.top) {
      S.iso = S.iso === e ? -1 : e;
      selbar();
      strip();
      maps();
    } else if (l < L) pick({ l });
  });
  const sheetHit = (ev) => {
    const [x, y] = at($("#c-sheet"), ev),
      s = G.sheet,
      i = Math.floor((y - 2) / s.rh) * s.nc + Math.floor(x / (s.tw + s.gap));
    return i >= 0 && i < H ? i : null;
  };
  $("#c-sheet").addEventListener("click", (ev) => {
    const h = sheetHit(ev);
    if (h !== null) pick({ h });
  });
  $("#c-sheet").addEventListener("pointermove", (ev) => {
    const h = sheetHit(ev);
    if (h === null) {
      hide();
      return;
    }
    const maps = sheet(S.l),
      M = maps ? maps[h] : { label: null };
    tipAt(
      ev,
      `<div class="ti">Head ${S.l}.${h}</div><div class="dim">reads key-value head ${Math.floor(h / (H / M0.kv_heads))}</div>${M.label ? `<div>${M.label[0]} score ${f(M.label[1])}</div>` : ""}`,
    );
  });
  $("#c-sheet").addEventListener("pointerleave", hide);
  const headHit = (ev) => {
    const [x, y] = at($("#c-head"), ev),
      s = G.head,
      j = Math.floor((x - s.gut) / s.k),
      q = Math.floor((y - s.top) / s.k);
    return j >= 0 && q >= 0 && j < T && q < T && j <= q ? { q, j } : null;
  };
  $("#c-head").addEventListener("pointermove", (ev) => {
    const h = headHit(ev);
    if (!h) {
      hide();
      return;
    }
    tipAt(
      ev,
      `<div class="ti">${f(attn(S.l, S.h)[h.q * T + h.j], 3)}</div><div><span class="dim">from</span> ${h.q} <span class="code">${esc(show(TOK[h.q]))}</span></div><div><span class="dim">to</span> ${h.j} <span class="code">${esc(show(TOK[h.j]))}</span></div>`,
    );
  });
  $("#c-head").addEventListener("pointerleave", hide);
  $("#c-head").addEventListener("click", (ev) => {
    const h = headHit(ev);
    if (h) pick({ t: h.q });
  });
  $("#c-route").addEventListener("click", (ev) => {
    const [, y] = at($("#c-route"), ev),
      l = Math.floor((y - G.route.top) / G.route.rh);
    if (l >= 0 && l < L) pick({ l });
  });
  $("#c-route").addEventListener("pointermove", (ev) => {
    const [, y] = at($("#c-route"), ev),
      l = Math.floor((y - G.route.top) / G.route.rh);
    if (l >= 0 && l < L) tipAt(ev, cellTip(l, S.t));
    else hide();
  });
  $("#c-route").addEventListener("pointerleave", hide);
  $("#c-diff").addEventListener("pointermove", (ev) => {
    const [x, y] = at($("#c-diff"), ev),
      s = G.diff,
      t = Math.floor(((x - s.gut) / s.mw) * TC),
      l = Math.floor((y - s.top) / s.rh);
    if (t < 0 || t >= TC || l < 0 || l >= L) {
      hide();
      return;
    }
    const a = CA[l][t],
      b = CB[l][t];
    tipAt(
      ev,
      `<div class="ti">Layer ${l}, position ${t}</div><table><tr><th></th><th>token</th><th>first</th><th class="num">expert ${isoOf()}</th></tr><tr><th>A</th><td class="code">${esc(show(TA[t]))}</td><td>${a.a}</td><td class="num">${f(a.p[isoOf()], 3)}</td></tr><tr><th>B</th><td class="code">${esc(show(TB[t]))}</td><td>${b.a}</td><td class="num">${f(b.p[isoOf()], 3)}</td></tr></table>`,
    );
  });
  $("#c-diff").addEventListener("pointerleave", hide);
  $("#c-diff").addEventListener("click", (ev) => {
    const [x, y] = at($("#c-diff"), ev),
      s = G.diff,
      t = Math.floor(((x - s.gut) / s.mw) * TC),
      l = Math.floor((y - s.top) / s.rh);
    if (t >= 0 && t < TC && l >= 0 && l < L) pick({ t, l });
  });

  root.addEventListener("click", (ev) => {
    const on = (s) => ev.target.closest(s);
    const step = on("[data-k]"),
      key = on("#xkey button"),
      ab = on("[data-r]"),
      row = on("tr[data-run]"),
      quick = on("[data-q]");
    if (ab) {
      S[ab.dataset.r] = +ab.dataset.id;
      runList();
      compare();
      return;
    }
    if (row) {
      use(runs.get(+row.dataset.run));
      S.written = null;
      S.state = V.finish === "interrupt" ? "stopped" : "ready";
      all();
      return;
    }
    if (on("[data-t]")) pick({ t: +on("[data-t]").dataset.t });
    if (on("tr[data-l]")) pick({ l: +on("tr[data-l]").dataset.l });
    if (step) {
      const [name, sign] = step.dataset.k;
      pick({ [name]: S[name] + (sign === "+" ? 1 : -1) });
    }
    if (key) isolate(+key.dataset.e);
    if (on(".xbtn")) {
      S.edits.splice(+on(".xbtn").dataset.i, 1);
      changed();
    }
    if (quick) {
      const c = C[S.l][S.t],
        kind = quick.dataset.q;
      S.edits.push({
        kind,
        number: kind === "scale" ? S.h : kind === "ban" ? c.a : c.b,
        layer: S.l,
        factor: 0,
        on: true,
      });
      changed();
    }
    if (on("[data-example]")) {
      $("#pbox").value = M0.examples[on("[data-example]").dataset.example];
      typed();
    }
  });
  function isolate(e) {
    S.iso = S.iso === e ? -1 : e;
    selbar();
    strip();
    if (V.n) {
      maps();
      compare();
    }
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
      model.send({ kind: "count", text: $("#pbox").value });
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
    S.error.edit = kind === "steer" && !pairOf() ? "Steering needs two runs: mark one A and another B." : "";
    if (kind === "steer") Object.assign(e, { a: S.A, b: S.B });
    if (!S.error.edit) S.edits.push(e);
    changed();
  };
  $("#taps").addEventListener("change", (ev) => {
    S.taps[ev.target.dataset.n] = ev.target.checked;
    taps();
  });
  $("#measure").onchange = (e) => {
    S.measure = e.target.value;
    strip();
  };
  $("#digits").onchange = (e) => {
    S.digits = e.target.checked;
    strip();
  };
  $("#second").onchange = (e) => {
    S.second = e.target.checked;
    if (V.n) drawMap();
  };
  $("#r-l").oninput = (e) => pick({ l: +e.target.value });
  function seg(id, fn) {
    $(id).addEventListener("click", (ev) => {
      const b = ev.target.closest("button");
      if (!b) return;
      for (const x of $(id).children) x.setAttribute("aria-pressed", x === b);
      fn(b.dataset.v);
    });
  }
  seg("#phase", (v) => {
    S.phase = v;
    if (V.n) drawLoad();
  });
  seg("#dsel", (v) => {
    S.diff = v;
    compare();
  });

  let clock;
  function generate(edited) {
    if (busy()) return;
    const { prompt, edits: _, ...options } = draft();
    S.error = {};
    S.written = null;
    S.state = "waiting";
    S.message = "0";
    const begun = Date.now();
    clearInterval(clock);
    clock = setInterval(() => {
      if (S.state !== "waiting") return clearInterval(clock);
      S.message = ((Date.now() - begun) / 1000).toFixed(0);
      promptPane();
    }, 500);
    model.send({ kind: "generate", prompt, options, edits: edited ? S.edits.filter((e) => e.on) : [] });
    all();
  }
  $("#b-gen").onclick = () => generate(false);
  $("#b-run").onclick = () => generate(true);
  $("#b-stop").onclick = () => model.send({ kind: "stop" });
  $("#b-exp").onclick = () => {
    S.writing = true;
    S.written = null;
    S.error.export = "";
    model.send({
      kind: "export",
      run: V.id,
      taps: Object.keys(S.taps).filter((n) => S.taps[n]),
      directory: $("#dest").value,
    });
    taps();
  };
  root.addEventListener("keydown", (ev) => {
    hide();
    S.hover = null;
    const tg = ev.target;
    if (tg.id === "pbox") {
      if (ev.key === "Enter" && (ev.ctrlKey || ev.metaKey)) {
        ev.preventDefault();
        generate(false);
      }
      return;
    }
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(tg.tagName) && tg.type !== "checkbox") return;
    const move = {
      ArrowLeft: { t: S.t - 1 },
      ArrowRight: { t: S.t + 1 },
      ArrowUp: { l: S.l - 1 },
      ArrowDown: { l: S.l + 1 },
      "[": { h: S.h - 1 },
      "]": { h: S.h + 1 },
    }[ev.key];
    if (move) {
      ev.preventDefault();
      pick(move);
    } else if (/^[0-7]$/.test(ev.key)) isolate(+ev.key);
    else if (ev.key === "Escape") isolate(S.iso);
  });

  // Messages of the kernel

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
      const pane =
        m.pane === "export" ? "export" : m.pane === "price" || m.pane === "attention" ? "export" : "generate";
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
  return () => {
    model.off("msg:custom", receive);
    resized.disconnect();
    themed.disconnect();
    clearInterval(clock);
  };
}

export default { render };
