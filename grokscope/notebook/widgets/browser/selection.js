// The selection (token, layer, head, expert), keys and tooltips: what all views share.

// Buttons of which one is pressed; where a choice stands twice, both show it.
function seg(selector, fn) {
  const groups = [...root.querySelectorAll(selector)];
  for (const group of groups)
    group.addEventListener("click", (ev) => {
      const b = ev.target.closest("button");
      if (!b) return;
      for (const x of groups.flatMap((one) => [...one.children]))
        x.setAttribute("aria-pressed", x.dataset.v === b.dataset.v);
      fn(b.dataset.v);
    });
}
let width = 0; // that was drawn for
function maps() {
  drawMap();
  drawLoad();
  drawEntropy();
}
function all() {
  width = root.clientWidth;
  if (!M0 || !width) return; // hidden: drawn when it is shown
  use(V);
  root.classList.toggle("blank", !V.n);
  S.t = Math.max(W0, Math.min(W1 - 1, S.t));
  S.l = Math.max(0, Math.min(L - 1, S.l));
  S.h = ((S.h % H) + H) % H;
  ident();
  selbar();
  promptPane();
  strip();
  edits();
  runList();
  taps();
  errors();
  overview();
  compare();
  if (V.n) {
    maps();
    experts();
    lensGrid();
    drawSheet();
    drawHead();
    lists();
    inspector();
  }
}
// What is selected, or is as soon as its window is here.
const next = (name) => (want && want.run === V && want.o[name] !== undefined ? want.o[name] : S[name]);
function pick(o) {
  S.follow = false;
  S.keep = null;
  if (o.t !== undefined) o.t = Math.max(0, Math.min(S.n - 1, o.t));
  if (o.t < W0 || o.t >= W1) return go(V, o.t - WN / 2, o);
  if (want && want.run === V) want = null;
  Object.assign(S, o);
  S.l = Math.max(0, Math.min(L - 1, S.l));
  S.h = (S.h + H) % H;
  selbar();
  strip();
  if (!V.n) return;
  maps();
  if ("l" in o) {
    overview();
    experts();
  }
  if ("l" in o || "h" in o) drawSheet();
  drawHead();
  lists();
  lensGrid();
  inspector();
  compare();
}

// The whole text and the window that is shown of it: each stripe is the most frequent first expert of its positions.
function overview(w0 = W0) {
  $("#over").hidden = V.n <= WINDOW;
  if (V.n <= WINDOW) return;
  const n = (x) => x.toLocaleString("en").replace(/,/g, NN);
  $("#o-w").textContent = `Positions ${n(w0)}–${n(Math.min(V.n, w0 + WN) - 1)} of ${n(V.n)}`;
  const cv = $("#c-over"),
    w = cv.parentElement.clientWidth,
    g = fit(cv, w, 16);
  for (let x = 0; x < w; x++) {
    const count = new Array(E).fill(0);
    for (let t = Math.floor((x * T) / w); t < Math.max((x * T) / w + 1e-9, ((x + 1) * T) / w) && t < V.n; t++)
      if (V.F[S.l][t][0] >= 0) count[V.F[S.l][t][0]]++;
    const most = Math.max(...count);
    g.fillStyle = most ? rgb(K.x[count.indexOf(most)]) : K.well;
    const inside = x >= (w0 * w) / T && x < ((w0 + WN) * w) / T;
    g.globalAlpha = inside ? 1 : 0.35;
    g.fillRect(x, 2, 1, 12);
  }
  g.globalAlpha = 1;
  g.fillStyle = K.sel;
  if (NP < T) g.fillRect((NP * w) / T, 0, 1, 16);
  g.strokeStyle = K.sel;
  g.lineWidth = 2;
  g.strokeRect((w0 * w) / T + 1, 1, (WN * w) / T - 2, 14);
  cv.setAttribute("aria-valuetext", $("#o-w").textContent);
}
const overAt = (ev) => {
  const b = $("#c-over").getBoundingClientRect();
  return Math.max(0, Math.min(T - WN, Math.round(((ev.clientX - b.left) / b.width) * T - WN / 2)));
};
$("#c-over").addEventListener("pointerdown", (ev) => {
  $("#c-over").setPointerCapture(ev.pointerId);
  overview(overAt(ev));
});
$("#c-over").addEventListener("pointermove", (ev) => {
  if (ev.buttons) overview(overAt(ev));
});
$("#c-over").addEventListener("pointerup", (ev) => {
  S.follow = false;
  go(V, overAt(ev));
});
$("#c-over").addEventListener("keydown", (ev) => {
  const by = { ArrowLeft: -WN / 2, ArrowRight: WN / 2 }[ev.key];
  if (!by) return;
  ev.preventDefault();
  ev.stopPropagation();
  S.follow = false;
  go(V, W0 + by);
});

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
function hide() {
  tip.style.display = "none";
}
function cellTip(l, t) {
  const c = C[l][t],
    r = ([e, gt], rank) =>
      `<tr><th>${["first", "second"][rank] ?? ""}</th><td><i class="sw" style="background:${tint(e)}"></i> ${e}</td><td class="num">${f(gt, 3)}</td><td class="num">${f(c.z[e], 2)}</td></tr>`;
  return `<div class="ti">Layer ${l}, position ${t} <span class="code">${esc(show(TOK[t]))}</span></div><table><tr><th></th><th>expert</th><th class="num">gate</th><th class="num">logit</th></tr>${c.chosen.map(r).join("")}</table><div class="mini">${[...c.p].map((p, e) => `<i style="height:${Math.max(1, (22 * p) / Math.max(...c.p))}px;background:${tint(e)}"></i>`).join("")}</div><div class="mn">${[...c.p].map((_, e) => `<span>${e}</span>`).join("")}</div><div class="dim">entropy ${f(c.h)} bits, margin ${f(c.ga - c.gb)}, ${t < NP ? "prefill" : "decode"}</div>`;
}
function at(cv, ev) {
  const b = cv.getBoundingClientRect();
  return [ev.clientX - b.left, ev.clientY - b.top];
}
root.addEventListener("click", (ev) => {
  const on = (s) => ev.target.closest(s);
  const step = on("[data-k]"),
    key = on("#xkey button"),
    ab = on("[data-r]"),
    row = on("tr[data-run]"),
    quick = on("[data-q]");
  if (ab) {
    S[ab.dataset.r] = +ab.dataset.id;
    again();
    runList();
    compare();
    return;
  }
  if (row) {
    const run = runs.get(+row.dataset.run);
    S.written = null;
    if (idle()) S.state = run.finish === "interrupt" ? "stopped" : "ready";
    S.follow = !run.done;
    go(run, run.done ? run.w0 : run.n - WINDOW);
    return;
  }
  if (on("[data-t]")) pick({ t: +on("[data-t]").dataset.t });
  if (on("tr[data-l]")) pick({ l: +on("tr[data-l]").dataset.l });
  if (step) {
    const [name, sign] = step.dataset.k;
    pick({ [name]: next(name) + (sign === "+" ? 1 : -1) });
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
    experts();
    compare();
  }
}
$("#r-l").oninput = (e) => pick({ l: +e.target.value });
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
  if (ev.altKey || ev.ctrlKey || ev.metaKey) return;
  const move = {
    ArrowLeft: { t: next("t") - 1 },
    ArrowRight: { t: next("t") + 1 },
    ArrowUp: { l: S.l - 1 },
    ArrowDown: { l: S.l + 1 },
    "[": { h: S.h - 1 },
    "]": { h: S.h + 1 },
  }[ev.key];
  if (move) {
    ev.preventDefault();
    pick(move);
  } else if (/^[0-9]$/.test(ev.key) && +ev.key < E) isolate(+ev.key);
  else if (ev.key === "Escape") isolate(S.iso);
});
