// Routing map with its tracks, and the load of experts beside it.

let G = {};
function mapGeom() {
  const w = $("#c-map").parentElement.clientWidth,
    gut = 60,
    top = 34,
    rh = BIG ? 7 : root.clientWidth >= 1560 ? 28 : 24,
    mh = L * rh,
    tk = [
      [MINUS + "log p", (t) => LP[t] / -8, "0–8 nats"],
      ["entropy", (t) => C[S.l][t].h / Math.log2(E), `0–${f(Math.log2(E), Math.log2(E) % 1 ? 1 : 0)} bits`],
      ["margin", (t) => C[S.l][t].ga - C[S.l][t].gb, "0–1"],
    ];
  const mw = w - gut - 1,
    x = (t) => gut + Math.round(((t - W0) * mw) / WN),
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
  const gap = M.mw / WN > 7 ? 1 : 0,
    vg = M.rh > 12 ? 1 : 0;
  for (let l = 0; l < L; l++)
    for (let t = W0; t < W1; t++) {
      const c = C[l][t],
        x = M.x(t),
        w = M.x(t + 1) - x - gap,
        y = M.y(l),
        h = M.rh - vg;
      const put = (e, ga, yy, hh) => {
        g.fillStyle = S.iso >= 0 && e !== S.iso ? K.well : rgb(mix(K.x[e], K.bg, gateW(ga)));
        g.fillRect(x, yy, w, hh);
      };
      if (S.second) {
        const h1 = Math.round(h * 0.62);
        put(c.a, c.ga, y, h1);
        if (c.b >= 0) put(c.b, c.gb, y + h1, h - h1);
      } else put(c.a, c.ga, y, h);
    }
  if (W1 < W0 + WN) {
    g.fillStyle = K.well;
    g.fillRect(M.x(W1), M.top, M.x(W0 + WN) - M.x(W1), M.mh);
  }
  // layer axis
  label(g, "layer", M.gut - 8, M.top - 10, "right", K.ink2);
  for (let l = 0; l < L; l++)
    if (!BIG || l % 8 === 0 || l === S.l) {
      if (BIG && l !== S.l && Math.abs(l - S.l) < 2) continue;
      label(g, String(l), M.gut - 8, M.y(l) + M.rh / 2, "right", l === S.l ? K.sel : K.ink2, 11, l === S.l ? 600 : 400);
    }
  // tracks
  M.tk.forEach(([name, v, mx], i) => {
    const y = M.ty(i);
    label(g, name, M.gut - 8, y + 7, "right", K.ink);
    label(g, mx, M.gut - 8, y + 19, "right", K.ink2, 10);
    g.fillStyle = K.line;
    g.fillRect(M.gut, y + M.th, M.mw, 1);
    for (let t = W0; t < W1; t++) {
      const h = Math.max(1, Math.max(0, Math.min(1, v(t))) * M.th);
      g.fillStyle = t === S.t ? K.sel : K.ink3;
      g.fillRect(M.x(t), y + M.th - h, Math.max(1, M.x(t + 1) - M.x(t) - 1), h);
    }
  });
  // position axis, phases
  const xb = M.x(Math.max(W0, Math.min(W0 + WN, NP))),
    selx = (M.x(S.t) + M.x(S.t + 1)) / 2,
    txt = `${S.t} ${show(TOK[S.t])}`;
  font(g, 11, 600);
  const tw = g.measureText(txt).width + 10,
    px = Math.max(M.gut, Math.min(M.w - tw, selx - tw / 2));
  const stepT = WN > 120 ? 20 : 10;
  for (let t = Math.ceil(W0 / stepT) * stepT; t < W0 + WN; t += stepT) {
    const xx = M.x(t) + (M.x(t + 1) - M.x(t)) / 2;
    if (xx > px - 14 && xx < px + tw + 14) continue;
    label(g, String(t), xx, M.top - 10, "center", K.ink2);
  }
  if (NP > W0) label(g, `prefill, ${NP}`, M.gut, 8, "left", K.ink2);
  if (T > NP && NP < W0 + WN) label(g, `decode, ${T - NP}`, xb + 5, 8, "left", K.ink2);
  g.fillStyle = K.sel;
  for (let y = 1; y < M.h - 4 && NP > W0 && NP < W0 + WN; y += 5) {
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
  if (!BIG && M.mw / WN > 9) {
    for (let t = W0; t < W1; t++) {
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
      for (const e of V.F[l][t]) if (e >= 0) n[e]++;
    }
  const s = n.reduce((a, b) => a + b, 0);
  return { n, s, share: n.map((v) => (s ? v / s : null)) };
}
// Phases whose load is drawn: the chosen one beside the map, prefill and decode apart where there is none.
const loadPhases = () => (M0.panes.includes("map") ? [S.phase] : NP < S.n ? ["prefill", "decode"] : ["prefill"]);
const LOAD = 208; // px of one matrix
// Layer numbers at the left, where no map has them.
function layerAxis(g, x, M) {
  for (let l = 0; l < L; l++)
    if (!BIG || l === S.l || (l % 8 === 0 && Math.abs(l - S.l) > 1))
      label(g, String(l), x, M.y(l) + M.rh / 2, "right", l === S.l ? K.sel : K.ink2, 11, l === S.l ? 600 : 400);
}
function loadMatrix(g, x0, phase) {
  const M = G.map,
    cw = G.load.cw;
  for (let e = 0; e < E; e++) {
    const cx = x0 + e * cw + cw / 2 - 0.5;
    g.fillStyle = rgb(K.x[e]);
    g.fillRect(cx - 10, M.top - 14, 8, 8);
    label(g, String(e), cx + 4, M.top - 10, "center", K.ink);
  }
  for (let l = 0; l < L; l++) {
    const d = loadOf(l, phase);
    for (let e = 0; e < E; e++) {
      const sh = d.share[e],
        c = sh === null ? hex(plain("--well")) : div((sh - 1 / E) * E);
      g.fillStyle = rgb(c);
      if (S.iso >= 0 && e !== S.iso) g.globalAlpha = 0.35;
      g.fillRect(x0 + e * cw, M.y(l), cw - 1, M.rh - (BIG ? 0 : 1));
      if (!BIG && sh !== null)
        label(g, String(Math.round(100 * sh)), x0 + e * cw + cw - 6, M.y(l) + M.rh / 2, "right", onto(c));
      g.globalAlpha = 1;
    }
  }
  g.globalAlpha = 0.55;
  g.fillStyle = K.sel;
  g.fillRect(x0, M.y(S.l) - 1, E * cw - 1, 1);
  g.fillRect(x0, M.y(S.l) + M.rh - (BIG ? 0 : 1), E * cw - 1, 1);
  g.globalAlpha = 1;
}
function drawLoad() {
  const phases = loadPhases(),
    step = LOAD + 24,
    gut = M0.panes.includes("map") ? 0 : 20,
    cv = $("#c-load"),
    M = G.map,
    w = LOAD,
    cw = Math.floor((w - 1) / E),
    g = fit(cv, gut + phases.length * step - 24, M.h);
  G.load = { cw, step, gut };
  if (gut) layerAxis(g, gut - 6, M);
  g.translate(gut, 0);
  cv.setAttribute("aria-label", "Expert load by layer against an even share");
  const title = (phase, n) => (M0.panes.includes("map") ? "Expert load, %" : `${phase}, ${n} tokens, %`);
  phases.forEach((phase, i) => {
    label(g, title(phase, phase === "decode" ? S.n - NP : Math.min(NP, S.n)), i * step, 8, "left", K.ink2);
    loadMatrix(g, i * step, phase);
  });
  for (let i = 0; i < 56; i++) {
    g.fillStyle = rgb(div((i / 55) * 2 - 1));
    g.fillRect(w - 80 + i, 4, 1, 8);
  }
  label(g, "0", w - 84, 8, "right", K.ink2, 10);
  label(g, String(200 / E), w - 2, 8, "right", K.ink2, 10);
  g.fillStyle = K.sel;
  g.fillRect(w - 52, 2, 1, 12);
  const y0 = M.ty(0),
    bh = M.h - y0 - 34,
    base = y0 + 14 + bh,
    a = loadOf(S.l, "prefill"),
    b = loadOf(S.l, "decode"),
    mx = Math.max(0.3, ...a.share, ...b.share);
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
      h1 = Math.min(1, a.share[e] / mx) * bh,
      h2 = Math.min(1, b.share[e] / mx) * bh;
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
const mapHit = (ev) => {
  const [x, y] = at($("#c-map"), ev),
    M = G.map,
    t = W0 + Math.floor(((x - M.gut) / M.mw) * WN),
    l = Math.floor((y - M.top) / M.rh);
  return x >= M.gut && t < W1 && y >= M.top ? { t, l: l < L ? l : null } : null;
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
      `<div class="ti">Position ${h.t} <span class="code">${esc(show(TOK[h.t]))}</span></div><table><tr><th>log-probability</th><td class="num">${known(LP[h.t])}</td></tr><tr><th>entropy, layer ${S.l}</th><td class="num">${f(C[S.l][h.t].h)}</td></tr><tr><th>margin, layer ${S.l}</th><td class="num">${f(C[S.l][h.t].ga - C[S.l][h.t].gb)}</td></tr></table>`,
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
const loadExpert = (x) => Math.floor(((x - G.load.gut) % G.load.step) / G.load.cw);
$("#c-load").addEventListener("pointermove", (ev) => {
  const [x, y] = at($("#c-load"), ev),
    M = G.map,
    e = loadExpert(x);
  let l = Math.floor((y - M.top) / M.rh);
  if (e < 0 || e >= E || y < M.top) {
    hide();
    return;
  }
  if (l >= L) l = S.l;
  const r = ["prefill", "decode", "all"]
    .map((p) => {
      const d = loadOf(l, p);
      return `<tr><th>${p}</th><td class="num">${d.n[e]} of ${d.s}</td><td class="num">${d.s ? pct(d.share[e]) : "–"}</td></tr>`;
    })
    .join("");
  tipAt(
    ev,
    `<div class="ti">Layer ${l}, <i class="sw" style="background:${tint(e)}"></i> expert ${e}</div><table>${r}<tr><th>uniform</th><td></td><td class="num">${pct(1 / E)}</td></tr></table>`,
  );
});
$("#c-load").addEventListener("pointerleave", hide);
$("#c-load").addEventListener("click", (ev) => {
  const [x, y] = at($("#c-load"), ev),
    l = Math.floor((y - G.map.top) / G.map.rh),
    e = loadExpert(x);
  if (e >= E) return;
  if (y < G.map.top) {
    S.iso = S.iso === e ? -1 : e;
    selbar();
    strip();
    maps();
  } else if (l < L) pick({ l });
});
$("#second").onchange = (e) => {
  S.second = e.target.checked;
  if (V.n) drawMap();
};
seg(".phase", (v) => {
  S.phase = v;
  if (!V.n) return;
  drawLoad();
  experts();
});
