// What the page knows: the model, runs and the selection.

el.innerHTML = `<div class="gs" tabindex="-1" data-lm-suppress-shortcuts="true"><div class="body">${HTML}</div><div class="tip" id="tip" role="status"></div></div>`;
const root = el.querySelector(".gs");
root.classList.add("unknown"); // until the kernel has said what it shows: what is typed before would be lost
const $ = (s) => root.querySelector(s);
const css = (n) => getComputedStyle(root).getPropertyValue(n).trim();
let M0 = null; // the model, as the kernel describes it
let L = 0,
  E = 8,
  H = 0,
  BIG = false;
const runs = new Map(); // id -> run, in the order they were made
const EMPTY = {
  tok: [],
  ids: [],
  lp: [],
  C: [],
  F: [],
  lens: [],
  n: 0,
  T: 1,
  np: 0,
  w0: 0,
  att: new Map(),
  done: false,
};
let V = EMPTY; // the run that is shown
let TOK = [],
  T = 1,
  NP = 0,
  LP = [],
  C = [];
let WINDOW = 256, // positions that are shown at once
  WN = 1, // those of this run: all of a short text
  W0 = 0, // the first of them
  W1 = 0; // after the last that is there
let want = null; // a run or a window that is shown as soon as its cells are here
const S = {
  t: 0,
  keep: null, // the position that an edited run is looked at, as soon as it has it
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
  active: null, // the run that was begun last
  error: {},
  message: "",
};

// All that the kernel is told. Where there is none any more the page says so, and stays as it is.
function tell(message) {
  try {
    model.send(message);
  } catch {
    if (S.state === "lost") return;
    S.state = "lost";
    S.writing = null;
    if (M0) all();
  }
}

// Runs

function use(run) {
  V = run;
  TOK = V.tok;
  T = Math.max(1, V.T);
  NP = V.np;
  LP = V.lp;
  C = V.C;
  S.n = V.n;
  WN = Math.min(T, WINDOW);
  W0 = V.w0 = Math.max(0, Math.min(T - WN, V.w0));
  W1 = Math.min(S.n, W0 + WN);
}
// The gate of an expert at a position and layer: 0 where it did not run.
const gateOf = (c, e) => c.chosen.find(([one]) => one === e)?.[1] ?? 0;
// One position at one layer: the chosen experts with their gates, of these the first two as a and b (-1 where only one
// ran), and what the router said.
function cellOf(z, o, experts, gates) {
  const p = new Float32Array(E),
    own = z.slice(o, o + E);
  let m = -Infinity,
    s = 0,
    h = 0;
  for (let e = 0; e < E; e++) m = Math.max(m, own[e]);
  for (let e = 0; e < E; e++) s += p[e] = Math.exp(own[e] - m);
  for (let e = 0; e < E; e++) p[e] /= s;
  for (const v of p) if (v > 0) h -= v * Math.log2(v);
  const chosen = [...experts].map((e, k) => [e, gates[k]]).filter(([e]) => e >= 0),
    [[a, ga] = [-1, 0], [b, gb] = [-1, 0]] = chosen;
  return { chosen, a, b, ga, gb, h, p, z: own };
}
// Which experts ran: of all positions, and it is little. K a token, or as many as an edit has it take; two places at least.
function ran(run, experts, count) {
  const k = experts.length / (L * count);
  for (let l = 0; l < L; l++) {
    run.F[l] = run.F[l] || [];
    for (let i = 0; i < count; i++) {
      const o = k * (l * count + i);
      run.F[l].push([...experts.subarray(o, o + k)]);
    }
  }
  run.n += count;
}
// Gates and logits: of the positions that were asked for.
function fill(run, start, gates, z) {
  const count = z.length / (L * E),
    k = gates.length / (L * count);
  for (let l = 0; l < L; l++) {
    run.C[l] = run.C[l] || [];
    for (let i = 0; i < count; i++) {
      const o = l * count + i;
      run.C[l][start + i] = cellOf(z, o * E, run.F[l][start + i], gates.subarray(k * o, k * (o + 1)));
    }
  }
}
function fresh(m) {
  return {
    id: m.run,
    name: m.name,
    tok: m.pieces,
    ids: m.ids,
    lp: m.logprobs,
    np: m.prompt_length,
    T: m.total,
    n: 0,
    w0: 0,
    C: [],
    F: [],
    lens: [],
    att: new Map(),
    asked: new Set(),
    done: false,
    max: m.max,
    seconds: 0,
  };
}
// The first position of a window that a list lacks, or -1.
function gap(list, w0, end) {
  for (let t = w0; t < end; t++) if (!list[t]) return t;
  return -1;
}
function ask(run, kind, start) {
  if (run.asked.has(kind + start)) return;
  run.asked.add(kind + start);
  tell({ kind, run: run.id, start });
}
// Whether the cells of a window are here; asks if not.
function here(run, w0) {
  const start = gap(run.C[0] || [], w0, Math.min(run.n, w0 + WINDOW));
  if (start >= 0 && run.done) ask(run, "cells", start);
  return start < 0;
}
// Shows a run from a position on, with a selection in it.
function go(run, w0, o = {}) {
  want = { run, w0: Math.max(0, Math.min(run.T - Math.min(run.T, WINDOW), Math.round(w0))), o };
  settle();
}
// The position that was selected before an edited run, once the run shows it; one that it shows until then.
function restore() {
  if (S.keep !== null && S.keep >= W0 && S.keep < W1) {
    S.t = S.keep;
    S.keep = null;
  }
  S.t = Math.max(W0, Math.min(W1 - 1, S.t));
}
function settle() {
  if (!want || !here(want.run, want.w0)) return;
  const { run, w0, o } = want;
  want = null;
  run.w0 = w0;
  if (run !== V) for (const pane of ["attn", "exps", "lens", "rout"]) delete S.error[pane]; // of the one before
  use(run);
  Object.assign(S, o);
  all();
}
const asks = () => V.done && M0.panes.includes("attn");
// Thumbnails of a layer's heads, at most 64 x 64 each; null until they are here.
function sheet(l) {
  const found = V.att.get(l);
  if (found && found !== "asked") return found;
  if (asks() && !found) {
    V.att.set(l, "asked");
    tell({ kind: "attention", run: V.id, layer: l });
  }
  return null;
}
// One head in the window [n x n], what each position reads and who reads it; blank until it is here.
function attn(l, h) {
  const key = `${l}.${h}.${W0}`,
    found = V.att.get(key);
  if (found && found !== "asked") return found;
  if (asks() && !found) {
    V.att.set(key, "asked");
    tell({ kind: "head", run: V.id, layer: l, head: h, start: W0 });
  }
  if (!V.blank || V.blank.n !== WN) V.blank = { M: new Float32Array(WN * WN), n: WN, label: null };
  return V.blank;
}
// Predictions at a position, [{ top: [[word, probability, id]], rank }] for each layer of the lens; null until here.
function lensAt(t) {
  if (!V.lens[t] && V.done && V.lensLayers.length) {
    const start = gap(V.lens, W0, W1);
    ask(V, "lens", start < 0 ? t : start);
  }
  return V.lens[t] || null;
}
function nextOf(t) {
  const found = lensAt(t);
  if (!found || V.lensLayers[found.length - 1] !== L - 1) return { top: [], rank: "–" };
  const { top, rank } = found[found.length - 1];
  return { top: top.map(([w, p, id]) => [w, p, id === V.ids[t + 1]]), rank: rank < 0 ? "–" : rank + 1 };
}
