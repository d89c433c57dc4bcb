// One token: route through the layers, predictions, lens.

function noLens() {
  if (!V.done) return S.state === "error" ? "The run failed" : "When the run is done";
  return V.lensLayers.length ? "…" : "No lens was captured";
}
function inspector() {
  const t = S.t,
    c = C[S.l][t],
    nx = nextOf(t);
  $("#iwhere").textContent = `position ${t}, ${t < NP ? "prefill" : "decode"}`;
  $("#ibig").innerHTML =
    `<div class="big"><span class="t" style="--c:${tint(c.a)}">${esc(show(TOK[t]))}</span><span class="dim">id ${V.ids[t]}</span></div>`;
  const pr = nextOf(Math.max(0, t - 1));
  $("#ikv").innerHTML = [
    ["Log-prob.", known(LP[t])],
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
  const X = lensAt(t);
  $("#t-lens").innerHTML = X
    ? X.map(({ top: [[w, q]] }, i) => {
        const l = V.lensLayers[i];
        return `<tr class="pick" data-l="${l}"><td class="num ${l === S.l ? "" : "dim"}" style="width:24px;padding:0 8px 0 0;${l === S.l ? "font-weight:600" : ""}">${l}</td><td class="p bar" style="--w:${(100 * q).toFixed(1)}%">${esc(show(w))}</td><td class="num" style="width:42px">${prob(q)}</td></tr>`;
      }).join("")
    : `<tr><td class="dim">${noLens()}</td></tr>`;
  const none = X ? "No lens of the last layer" : noLens();
  if (!nx.top.length) $("#t-next").innerHTML = `<tr><td class="dim">${none}</td></tr>`;
  const wide = root.clientWidth >= 1560,
    box = wide ? $("#ilists") : $(".awrap");
  if ($("#lists").parentElement !== box) box.append($("#lists"));
  $("#quick").innerHTML =
    `<h3>Edit here</h3><div class="chips"><button class="chip" data-q="ban">Ban expert ${c.a} @ layer ${S.l}</button>${c.b < 0 ? "" : `<button class="chip" data-q="force">Force expert ${c.b} @ layer ${S.l}</button>`}<button class="chip" data-q="scale">Head ${S.l}.${S.h} × 0</button></div>`;
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
    for (const [e, gate] of c.chosen.slice(1)) pt(e, gate, true);
    pt(c.a, c.ga, false);
    if (!BIG || on) {
      const yy = BIG ? Math.max(top + 6, y + rh / 2) : y + rh / 2;
      label(g, `${c.a}`, c1, yy, "left", K.ink, 11, 600);
      label(g, f(c.ga), c1 + 14, yy, "left", K.ink);
      if (c.b >= 0) {
        label(g, `${c.b}`, c2, yy, "left", K.ink, 11, 600);
        label(g, f(c.gb), c2 + 14, yy, "left", K.ink2);
      }
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
