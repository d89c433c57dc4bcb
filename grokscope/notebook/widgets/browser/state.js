// What the page knows: the model, runs and the selection.

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
