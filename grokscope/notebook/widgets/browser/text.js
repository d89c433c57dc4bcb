// The text, each token on the colour of a measure.

const MEAS = {
  entropy: { r: [0, 3], u: "bits" }, // to log2 of the experts, once it is known how many there are
  margin: { r: [0, 1], u: "" },
  logp: { r: [-8, 0], u: "nats" },
  recv: { r: [0, 0.5], u: "" },
};
function measure(t) {
  const c = C[S.l][t];
  return { entropy: c.h, margin: c.ga - c.gb, logp: LP[t], recv: attn(S.l, S.h).received?.[t - W0] ?? null }[S.measure];
}
function strip() {
  MEAS.entropy.r[1] = Math.log2(E);
  const el = $("#strip");
  let h = "";
  if (!S.n) {
    el.innerHTML = '<div class="empty">No run yet. Type a prompt and press Generate.</div>';
    $("#tcount").textContent = "";
    return;
  }
  for (let t = W0; t < W1; t++) {
    const p = TOK[t],
      brk = p.endsWith("\n");
    let sty,
      cls = "tok";
    if (S.measure === "expert") {
      const c = C[S.l][t];
      sty = `--c:${tint(c.a)};--a:calc(var(--tint)*${gateW(c.ga).toFixed(2)})`;
      if (S.iso >= 0 && c.a !== S.iso) cls += " off";
    } else {
      const m = MEAS[S.measure],
        there = measure(t) !== null; // the first token has no log-probability, attention comes with the end
      let v = (measure(t) - m.r[0]) / (m.r[1] - m.r[0]);
      if (S.measure === "logp") v = 1 - v;
      if (S.measure === "recv") v = Math.sqrt(Math.max(0, Math.min(1, v)));
      sty = there ? `--c:${rgb(seq(0.06 + 0.94 * Math.max(0, Math.min(1, v))))};--a:55%` : "--c:transparent;--a:0%";
    }
    if (t === S.t) cls += " sel";
    if (p.trim() === "" && brk) cls += " nl";
    const dg =
      S.digits || t === S.t
        ? S.measure === "expert"
          ? `<sub>${C[S.l][t].a}</sub>`
          : S.digits
            ? `<sub>${known(measure(t), S.measure === "recv" ? 2 : 1)}</sub>`
            : ""
        : "";
    const bound = t === NP ? '<span class="bound">decode</span>' : "";
    const glue = t > W0 && t !== NP && !/^([ \n]|<\d+>$)/.test(p) && !TOK[t - 1].endsWith("\n");
    if (!glue) h += (t > W0 ? "</span>" : "") + bound + '<span class="w">';
    h += `<span class="${cls}" role="option" aria-selected="${t === S.t}" data-t="${t}" style="${sty}">${esc(p.replace(/\n/g, "⏎"))}${dg}</span>`;
    if (brk) {
      h += '</span>\n<span class="w">';
    }
  }
  el.innerHTML = h + "</span>";
  $("#tcount").textContent = `${S.n} tokens: ${Math.min(NP, S.n)} prefill, ${Math.max(0, S.n - NP)} decode`;
  const m = MEAS[S.measure];
  $("#tscale").innerHTML = m
    ? `<span>${S.measure === "logp" ? "0" : f(m.r[0], 0)}</span><i style="background:linear-gradient(90deg,${css("--seq")})"></i><span>${S.measure === "logp" ? MINUS + "8" : +m.r[1].toFixed(1)}${m.u ? " " + m.u : ""}</span>`
    : "";
  const s = el.querySelector(".sel");
  if (s) {
    const a = s.offsetTop - el.offsetTop;
    if (a < el.scrollTop || a > el.scrollTop + el.clientHeight - 28) el.scrollTop = Math.max(0, a - 56);
  }
}

$("#measure").onchange = (e) => {
  S.measure = e.target.value;
  strip();
};
$("#digits").onchange = (e) => {
  S.digits = e.target.checked;
  strip();
};
