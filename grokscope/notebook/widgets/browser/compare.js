// Two runs, A and B.

let TA = [],
  TB = [],
  CA = [],
  CB = [],
  FA = [],
  FB = [],
  C0 = 0, // the window of both
  C1 = 1,
  TC = 1;
function pairOf() {
  const a = runs.get(S.A),
    b = runs.get(S.B);
  if (!a || !b || a === b) return null;
  TA = a.tok;
  TB = b.tok;
  CA = a.C;
  CB = b.C;
  FA = a.F;
  FB = b.F;
  TC = Math.min(a.n, b.n);
  C0 = Math.max(0, Math.min(W0, TC - WINDOW));
  C1 = Math.min(TC, C0 + WINDOW);
  return [a, b];
}
// KL of each position, nats, as the kernel has it; null where it is not defined, WAITED or FAILED until it is here. The
// explorer runs the model for it, so it is asked for once the pane is looked at.
const KL = new Map(),
  WAITED = [],
  FAILED = [];
let looked = false;
const looking = new IntersectionObserver(([pane]) => {
  looked = pane.isIntersecting;
  if (looked && M0) compare();
});
looking.observe($("#cmp"));
function klOf() {
  const key = `${S.A}.${S.B}`;
  if (!KL.has(key) && looked && pairOf()) {
    KL.set(key, WAITED);
    tell({ kind: "compare", a: S.A, b: S.B });
    ident();
  }
  return KL.get(key) || [];
}
const comparing = () => [...KL.values()].includes(WAITED);
// What failed, because the model was busy, is asked for again.
function again() {
  for (const [key, kl] of KL) if (kl === FAILED) KL.delete(key);
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
    : S.A !== null && S.A === S.B && runs.size > 1
      ? `Run ${S.A} is both A and B. Mark another one in Runs.`
      : $("#cmp").dataset.empty;
  $("#r-cmp").disabled = !pair;
  if (!pair) {
    $("#ckey").innerHTML = "";
    return;
  }
  const fd = firstDiff(),
    np = pair[0].np,
    word = (run) => (fd < run.n ? esc(show(run.tok[fd])) : "(end)");
  let ch = 0,
    n = 0;
  for (let l = 0; l < L; l++)
    for (let t = 0; t < fd; t++) {
      n++;
      if (FA[l][t][0] !== FB[l][t][0]) ch++;
    }
  $("#ckey").innerHTML =
    `<span><span class="dim">First divergence</span>${fd < Math.max(pair[0].n, pair[1].n) ? `position ${fd}${fd >= np ? `, decode ${fd - np + 1}` : ""}: <span class="code">${word(pair[0])} → ${word(pair[1])}</span>` : "none"}</span><span><span class="dim">First expert changed before it</span>${pct(n ? ch / n : 0)} of ${n.toLocaleString("en").replace(/,/g, NN)}</span>${klFact(fd)}`;
  const g = document.createElement("canvas").getContext("2d");
  g.font = "12px " + css("--code");
  const cwid = g.measureText("M").width,
    avail = Math.floor((el.clientWidth - 24) / cwid);
  const from = C1 - C0 > 120 ? Math.max(C0, Math.min(fd < C1 ? fd : np, C1 - 60) - 20) : C0,
    wd = (i) => Math.max([...show(TA[i])].length, [...show(TB[i])].length) + 1;
  let lines = [],
    cur = [],
    len = 0;
  for (let i = from; i < C1; i++) {
    if (len + wd(i) > avail) {
      lines.push(cur);
      cur = [];
      len = 0;
    }
    cur.push(i);
    len += wd(i);
  }
  lines.push(cur);
  const more = lines.length > 8;
  lines = lines.slice(0, 8);
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
    .join("") + (more ? `<div class="dim">… up to position ${C1 - 1}</div>` : "");
  if (here(pair[0], C0) && here(pair[1], C0)) drawDiff(fd);
}
function klFact(fd) {
  const own = klOf()
    .slice(0, fd)
    .filter((v) => v !== null);
  const mean = own.reduce((s, v) => s + v, 0) / own.length;
  return own.length ? `<span><span class="dim">KL before it</span>${f(mean, 3)} nats a token</span>` : "";
}
// The expert that is isolated, or else that A took where the selection is: the one a ban takes away.
const isoOf = () => (S.iso >= 0 ? S.iso : (CA[S.l]?.[S.t]?.a ?? 0));
function drawDiff(fd) {
  const cv = $("#c-diff"),
    w = cv.parentElement.clientWidth,
    gut = 72,
    top = 20,
    rh = BIG ? 4 : 20,
    mw = w - gut - 2,
    x = (t) => gut + Math.round(((t - C0) * mw) / (C1 - C0)),
    kh = 30,
    kl = klOf(),
    h = top + L * rh + 8 + (kh + 6) * 2 + 14,
    g = fit(cv, w, h),
    gap = mw / (C1 - C0) > 7 ? 1 : 0,
    vg = rh > 8 ? 1 : 0;
  G.diff = { gut, top, rh, mw, x };
  cv.setAttribute("aria-label", "Routing difference, edited minus baseline");
  for (let l = 0; l < L; l++)
    for (let t = C0; t < C1; t++) {
      const a = CA[l][t].p,
        b = CB[l][t].p;
      let c;
      if (S.diff === "x") c = div((gateOf(CB[l][t], isoOf()) - gateOf(CA[l][t], isoOf())) / 0.5);
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
  const step = C1 - C0 > 120 ? 20 : 10;
  for (let t = Math.ceil(C0 / step) * step; t < C1; t += step)
    if (x(t) < x(fd) - 16 || x(t) > x(fd) + 44) label(g, String(t), (x(t) + x(t + 1)) / 2, top - 10, "center", K.ink2);
  const ky = top + L * rh + 8;
  label(g, "apart", gut - 8, ky + 8, "right", K.ink);
  label(g, "0–1, mean", gut - 8, ky + 22, "right", K.ink2, 10);
  g.fillStyle = K.line;
  g.fillRect(gut, ky + kh, mw, 1);
  for (let t = C0; t < C1; t++) {
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
  const y2 = ky + kh + 6,
    most = Math.max(0.01, ...kl.slice(C0, Math.min(fd, C1)).filter((v) => v !== null));
  label(g, "KL", gut - 8, y2 + 8, "right", K.ink);
  label(
    g,
    kl.some((v) => v !== null) ? `0–${most.toFixed(2)} nats` : "not known",
    gut - 8,
    y2 + 22,
    "right",
    K.ink2,
    10,
  );
  g.fillStyle = K.line;
  g.fillRect(gut, y2 + kh, mw, 1);
  for (let t = C0; t < C1; t++) {
    if (kl[t] === null || kl[t] === undefined) continue;
    g.globalAlpha = t >= fd ? 0.45 : 1;
    g.fillStyle = t === S.t ? K.sel : K.ink3;
    const hh = Math.max(1, Math.min(1, kl[t] / most) * kh);
    g.fillRect(x(t), y2 + kh - hh, Math.max(1, x(t + 1) - x(t) - 1), hh);
  }
  g.globalAlpha = 1;
  if (fd < C1 && fd >= C0) {
    g.fillStyle = K.sel;
    g.fillRect(x(fd) - 1, top - 4, 1, L * rh + 18 + 2 * kh);
    label(g, "▾ " + fd, x(fd) - 4, top - 10, "left", K.sel, 11, 600);
    label(g, "same text", x(fd) - 6, h - 8, "right", K.ink2);
    label(g, "texts differ", x(fd) + 5, h - 8, "left", K.ink2);
  }
  if (S.t >= C0 && S.t < C1) {
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

const klTip = (t) => {
  const v = klOf()[t];
  return v === null || v === undefined ? "" : `<div class="dim">KL(A, B) ${f(v, 4)} nats</div>`;
};
$("#c-diff").addEventListener("pointermove", (ev) => {
  const [x, y] = at($("#c-diff"), ev),
    s = G.diff,
    t = C0 + Math.floor(((x - s.gut) / s.mw) * (C1 - C0)),
    l = Math.floor((y - s.top) / s.rh);
  if (!CA[0]?.[t] || !CB[0]?.[t] || t < C0 || t >= C1 || l < 0 || l >= L) {
    hide();
    return;
  }
  const a = CA[l][t],
    b = CB[l][t];
  tipAt(
    ev,
    `<div class="ti">Layer ${l}, position ${t}</div><table><tr><th></th><th>token</th><th>first</th><th class="num">gate of ${isoOf()}</th></tr><tr><th>A</th><td class="code">${esc(show(TA[t]))}</td><td>${a.a}</td><td class="num">${f(gateOf(a, isoOf()), 3)}</td></tr><tr><th>B</th><td class="code">${esc(show(TB[t]))}</td><td>${b.a}</td><td class="num">${f(gateOf(b, isoOf()), 3)}</td></tr></table>${klTip(t)}`,
  );
});
$("#c-diff").addEventListener("pointerleave", hide);
$("#c-diff").addEventListener("click", (ev) => {
  const [x, y] = at($("#c-diff"), ev),
    s = G.diff,
    t = C0 + Math.floor(((x - s.gut) / s.mw) * (C1 - C0)),
    l = Math.floor((y - s.top) / s.rh);
  if (t >= C0 && t < C1 && l >= 0 && l < L) pick({ t, l });
});

seg("#dsel", (v) => {
  S.diff = v;
  compare();
});
