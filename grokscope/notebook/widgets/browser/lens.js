// What the stream would say after each kept layer, at the positions around the selected one.

function lensGrid() {
  if (!M0.panes.includes("lens")) return;
  const cv = $("#c-lens"),
    w = cv.parentElement.clientWidth,
    gut = 60,
    rows = (V.lensLayers || []).length,
    cw = 66,
    n = Math.min(W1 - W0, Math.max(1, Math.floor((w - gut) / cw))),
    from = Math.max(W0, Math.min(W1 - n, S.t - Math.floor(n / 2))),
    rh = 20,
    top = 24;
  $("#lnote").textContent = rows ? "best next token after a layer, shade = probability, bold: it followed" : noLens();
  cv.hidden = !rows || !V.done;
  if (cv.hidden) return;
  const g = fit(cv, w, top + rows * rh + 2);
  G.lens = { gut, cw, rh, top, from, n };
  cv.setAttribute("aria-label", `Logit lens around position ${S.t}`);
  label(g, "layer", gut - 8, top - 10, "right", K.ink2);
  const word = (text, x, y, color, bold, px) => {
    g.font = `${bold ? 600 : 400} ${px}px ${css("--code")}`;
    g.textAlign = "left";
    g.fillStyle = color;
    let s = show(text);
    while (s.length > 1 && g.measureText(s).width > cw - 8) s = s.slice(0, -1);
    g.fillText(s, x + 4, y);
  };
  for (let i = 0; i < rows; i++) {
    const l = V.lensLayers[i];
    label(g, String(l), gut - 8, top + i * rh + rh / 2, "right", l === S.l ? K.sel : K.ink2, 11, l === S.l ? 600 : 400);
  }
  for (let t = from; t < from + n; t++) {
    const x = gut + (t - from) * cw,
      found = lensAt(t);
    word(TOK[t], x, top - 10, t === S.t ? K.sel : K.ink2, t === S.t, 11);
    for (let i = 0; i < rows; i++) {
      const best = found ? found[i].top[0] : null,
        c = best ? seq(best[1]) : K.bg;
      g.fillStyle = rgb(c);
      g.fillRect(x, top + i * rh, cw - 1, rh - 1);
      if (best) word(best[0], x, top + i * rh + rh / 2, onto(c), found[i].rank === 0, 11);
    }
  }
  g.globalAlpha = 0.55;
  g.fillStyle = K.sel;
  g.fillRect(gut + (S.t - from) * cw - 1, top - 2, 1, rows * rh + 2);
  g.fillRect(gut + (S.t - from + 1) * cw - 1, top - 2, 1, rows * rh + 2);
  g.globalAlpha = 1;
  const i = V.lensLayers.indexOf(S.l);
  if (i >= 0) frameRect(g, gut + (S.t - from) * cw, top + i * rh, cw - 1, rh - 1);
}
const lensHit = (ev) => {
  const [x, y] = at($("#c-lens"), ev),
    s = G.lens,
    t = s.from + Math.floor((x - s.gut) / s.cw),
    i = Math.floor((y - s.top) / s.rh);
  return x >= s.gut && t < s.from + s.n && i >= 0 && i < V.lensLayers.length ? { t, i } : null;
};
$("#c-lens").addEventListener("pointermove", (ev) => {
  const h = lensHit(ev),
    found = h && lensAt(h.t);
  if (!found) return hide();
  const { top, rank } = found[h.i];
  const rows = top.map(
    ([w, p, id]) =>
      `<tr><td class="code"${id === V.ids[h.t + 1] ? ' style="font-weight:600"' : ""}>${esc(show(w))}</td><td class="num">${f(p, 3)}</td></tr>`,
  );
  tipAt(
    ev,
    `<div class="ti">After layer ${V.lensLayers[h.i]}, position ${h.t} <span class="code">${esc(show(TOK[h.t]))}</span></div><table>${rows.join("")}</table><div class="dim">${rank < 0 ? "the last token" : `what followed has rank ${rank + 1}`}</div>`,
  );
});
$("#c-lens").addEventListener("pointerleave", hide);
$("#c-lens").addEventListener("click", (ev) => {
  const h = lensHit(ev);
  if (h) pick({ t: h.t, l: V.lensLayers[h.i] });
});
