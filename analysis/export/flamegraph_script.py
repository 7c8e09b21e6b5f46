"""What makes a flame graph's SVG answer to the mouse: a style and a script, which need no network."""

from __future__ import annotations

from typing import Final

STYLE: Final = """
text { font: 11px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #1a1a1a; }
#heading { font-size: 15px; font-weight: bold; }
.quiet { fill: #555; }
.button { cursor: pointer; fill: #0b57a4; visibility: hidden; }
.f { cursor: pointer; }
.f text { pointer-events: none; }
.f:hover rect { stroke: #1a1a1a; }
.up { opacity: 0.55; }
.hit rect { fill: #e040fb; }
"""

# Positions are computed anew from nanoseconds, so that what is thin becomes wide when it is zoomed.
# Widths of text are estimated as in flamegraph.py: to measure each would take seconds.
SCRIPT: Final = r"""
(function () {
  "use strict";
  var svg = document.getElementById("scope-flame");
  var MARGIN = +svg.dataset.margin, TOTAL = +svg.dataset.total;
  var CHAR = +svg.dataset.char, PAD = +svg.dataset.pad;
  var details = document.getElementById("details"), matched = document.getElementById("matched");
  var reset = document.getElementById("reset"), search = document.getElementById("search");
  var frames = Array.from(svg.querySelectorAll(".f")).map(function (node) {
    return {
      node: node, rect: node.querySelector("rect"), text: node.querySelector("text"),
      start: +node.dataset.s, weight: +node.dataset.w, depth: +node.dataset.d,
      title: node.querySelector("title").textContent, short: node.dataset.n || "", hit: false
    };
  });
  var zoomed = null, width = +svg.getAttribute("width");

  function label(frame) { return frame.title.split("\n")[0]; }

  function wide(point) {
    return point >= 0x1100 && (point <= 0x115f || (point >= 0x2e80 && point <= 0xa4cf) ||
      (point >= 0xac00 && point <= 0xd7a3) || (point >= 0xf900 && point <= 0xfaff) ||
      (point >= 0xfe30 && point <= 0xfe6f) || (point >= 0xff00 && point <= 0xff60) ||
      (point >= 0x1f300 && point <= 0x1faff));
  }

  function fit(text, room) {
    var cells = Math.floor((room - 2 * PAD) / CHAR), used = 0, kept = "";
    if (cells < 3) return "";
    for (var char of text) {
      var size = wide(char.codePointAt(0)) ? 2 : 1;
      if (used + size > cells) {
        while (used + 1 > cells) {
          var last = Array.from(kept).pop();
          kept = kept.slice(0, kept.length - last.length);
          used -= wide(last.codePointAt(0)) ? 2 : 1;
        }
        return kept + "\u2026";
      }
      kept += char;
      used += size;
    }
    return kept;
  }

  function draw() {
    var from = zoomed ? zoomed.start : 0, span = zoomed ? zoomed.weight : TOTAL;
    var room = width - 2 * MARGIN;
    frames.forEach(function (frame) {
      var begin = Math.max(frame.start, from);
      var end = Math.min(frame.start + frame.weight, from + span);
      var above = zoomed && frame.depth < zoomed.depth;
      frame.node.style.display = end > begin ? "" : "none";
      if (end <= begin) return;
      frame.node.classList.toggle("up", Boolean(above));
      var x = MARGIN + (begin - from) / span * room, w = (end - begin) / span * room;
      frame.rect.setAttribute("x", x.toFixed(2));
      frame.rect.setAttribute("width", Math.max(w, 0).toFixed(2));
      frame.text.setAttribute("x", (x + PAD).toFixed(2));
      var text = fit(label(frame), w);
      frame.text.textContent = frame.short && text !== label(frame) ? fit(frame.short, w) : text;
    });
    reset.style.visibility = zoomed ? "visible" : "hidden";
    count();
  }

  function count() {
    var from = zoomed ? zoomed.start : 0, span = zoomed ? zoomed.weight : TOTAL;
    var hits = frames.filter(function (frame) { return frame.hit; });
    hits.sort(function (a, b) { return a.start - b.start || b.weight - a.weight; });
    // a frame within one that is counted is counted with it
    var sum = 0, upto = from;
    hits.forEach(function (frame) {
      var end = Math.min(frame.start + frame.weight, from + span);
      sum += Math.max(0, end - Math.max(frame.start, upto));
      upto = Math.max(upto, end);
    });
    matched.textContent = hits.length ? (100 * sum / span).toFixed(1) + " % matched" : "";
  }

  function zoom(frame) { zoomed = frame; draw(); }

  function find(asked) {
    var pattern = null;
    if (asked) {
      try { pattern = new RegExp(asked, "i"); } catch (error) {
        matched.textContent = "no regular expression: " + asked;
        return;
      }
    }
    frames.forEach(function (frame) {
      frame.hit = Boolean(pattern && pattern.test(label(frame)));
      frame.node.classList.toggle("hit", frame.hit);
    });
    count();
    if (pattern && !frames.some(function (frame) { return frame.hit; }))
      matched.textContent = "nothing matches " + asked;
  }

  function ask() { find(prompt("Find functions or files (a regular expression; empty: none)", "")); }

  function resize() {
    // inside of a page, the page says how wide it is
    if (document.documentElement === svg) width = Math.max(window.innerWidth || width, 400);
    svg.setAttribute("width", width);
    svg.setAttribute("viewBox", "0 0 " + width + " " + svg.getAttribute("height"));
    document.getElementById("paper").setAttribute("width", width);
    draw();
  }

  frames.forEach(function (frame) {
    frame.node.addEventListener("click", function () { zoom(frame === zoomed ? null : frame); });
    frame.node.addEventListener("mouseover", function () {
      details.textContent = frame.title.split("\n").join("   ");
    });
    frame.node.addEventListener("mouseout", function () { details.textContent = ""; });
  });
  reset.addEventListener("click", function () { zoom(null); });
  search.addEventListener("click", ask);
  search.style.visibility = "visible";
  window.addEventListener("resize", resize);
  window.addEventListener("keydown", function (event) {
    if (event.key === "Escape") { find(""); zoom(null); }
    if (event.key === "/" || (event.key === "f" && (event.ctrlKey || event.metaKey))) {
      event.preventDefault();
      ask();
    }
  });
  resize();
})();
"""
