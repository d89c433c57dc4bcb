// The selection (token, layer, head, expert), keys and tooltips: what all views share.

function seg(id, fn) {
  $(id).addEventListener("click", (ev) => {
    const b = ev.target.closest("button");
    if (!b) return;
    for (const x of $(id).children) x.setAttribute("aria-pressed", x === b);
    fn(b.dataset.v);
  });
}
function maps() {
  drawMap();
  drawLoad();
}
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
    r = (n, e, gt) =>
      `<tr><th>${n}</th><td><i class="sw" style="background:var(--x${e})"></i> ${e}</td><td class="num">${f(gt, 3)}</td><td class="num">${f(c.z[e], 2)}</td></tr>`;
  return `<div class="ti">Layer ${l}, position ${t} <span class="code">${esc(show(TOK[t]))}</span></div><table><tr><th></th><th>expert</th><th class="num">gate</th><th class="num">logit</th></tr>${r("first", c.a, c.ga)}${r("second", c.b, c.gb)}</table><div class="mini">${[...c.p].map((p, e) => `<i style="height:${Math.max(1, (22 * p) / c.ga)}px;background:var(--x${e})"></i>`).join("")}</div><div class="mn">${[...c.p].map((_, e) => `<span>${e}</span>`).join("")}</div><div class="dim">entropy ${f(c.h)} bits, margin ${f(c.ga - c.gb)}, ${t < NP ? "prefill" : "decode"}</div>`;
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
