"""The style sheet of the page: system fonts, one column, a light and a dark color scheme."""

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark;
  --paper: #ffffff; --ink: #16191d; --soft: #555e69; --line: #dfe3e8; --wash: #f5f7f9; --whole: #e6eaee;
  --qk: #2563b0; --v: #0d7a6c; --mlp: #b4560e; --cost: #5b6673; --other: #8a3f9c; --conv: #8a6a0a; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --ink: #e9ecef; --soft: #a3adb8; --line: #31373e; --wash: #1c2024; --whole: #2b3137;
  --qk: #6ea8f0; --v: #43bfae; --mlp: #eb9a55; --cost: #98a4b1; --other: #cf8fdf; --conv: #d9b94a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 48px 20px 80px; }
header { margin-bottom: 40px; }
h1, h2, h3 { line-height: 1.25; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h1 { font-size: 30px; margin: 0 0 10px; }
h2 { font-size: 23px; margin: 64px 0 8px; padding-top: 28px; border-top: 1px solid var(--line); }
h3 { font-size: 16px; margin: 40px 0 12px; }
p { margin: 0 0 12px; max-width: 46em; overflow-wrap: anywhere; }
.outcome { font-size: 18px; color: var(--ink); }
.warning { border-left: 4px solid var(--warn, #c2410c); padding: 6px 12px; }
.note { color: var(--soft); font-size: 14px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { padding: 7px 12px 7px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; }
thead th { color: var(--soft); font-weight: 500; font-size: 13px; vertical-align: bottom; }
th:first-child { text-align: left; }
tbody th { font-weight: 500; }
th:last-child, td:last-child { padding-right: 0; }
table.result { font-size: 16px; }
table.result td:nth-child(3) { font-weight: 600; }
table.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.facts th { width: 14em; color: var(--soft); }
table.sums tbody tr:last-child > * { font-weight: 600; border-bottom: 0; }
table.small { font-size: 13px; }
.place { display: inline-block; min-width: 2.2em; color: var(--soft); }
table a { text-decoration: none; } table a:hover { text-decoration: underline; }
table.small th, table.small td { padding-top: 4px; padding-bottom: 4px; }
figure { margin: 0; }
figcaption { color: var(--soft); font-size: 14px; margin: 0 0 12px; display: flex; flex-wrap: wrap; gap: 4px 18px; }
.key::before { content: ""; display: inline-block; width: 11px; height: 11px; margin-right: 6px; border-radius: 2px;
  background: var(--whole); }
.key.qk::before { background: var(--qk); } .key.v::before { background: var(--v); }
.key.conv::before { background: var(--conv); } .key.mlp::before { background: var(--mlp); }
.key.cost::before { background: var(--cost); } .key.tokens::before { background: var(--other); }
.copies { display: grid; gap: 0 16px; }
.key.dead::before { background: none; border: 1px dashed var(--soft); }
.swatch { display: inline-block; width: 11px; height: 11px; margin-right: 6px; border-radius: 2px; }
img.scene { display: block; width: 100%; height: auto; margin: 0 0 10px; border-radius: 4px; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
svg.kept { min-width: 760px; }
svg.kept text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg.kept text.path { fill: var(--ink); }
svg.kept text.end { text-anchor: end; }
svg.kept text.mid { text-anchor: middle; font-size: 11.5px; paint-order: stroke; stroke: var(--paper);
  stroke-width: 7px; stroke-linejoin: round; }
svg.kept text.on { text-anchor: middle; font-size: 11.5px; fill: var(--paper); }
.whole { fill: var(--whole); } rect.qk { fill: var(--qk); } rect.v { fill: var(--v); }
rect.conv { fill: var(--conv); } rect.mlp { fill: var(--mlp); } rect.cost { fill: var(--cost); }
rect.tokens { fill: var(--other); }
rect.dead, rect.gone { fill: none; stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; opacity: 0.7; }
svg.plot { min-width: 640px; }
svg.plot path, svg.plot line { stroke-linejoin: round; stroke-linecap: butt; }
svg.plot .legend path { stroke: none; }
details { margin-top: 16px; border: 1px solid var(--line); border-radius: 8px; padding: 0 16px; }
summary { cursor: pointer; padding: 10px 0; color: var(--soft); font-size: 14.5px; }
details[open] { padding-bottom: 14px; }
pre { margin: 0; padding: 14px; background: var(--wash); border-radius: 6px; overflow-x: auto; tab-size: 4;
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
nav a, a { color: var(--qk); }
@media (max-width: 640px) {
  main { padding: 28px 16px 60px; } h1 { font-size: 25px; } .outcome { font-size: 16px; }
  table.result { font-size: 14px; } table.result th, table.result td { white-space: normal; padding-right: 8px; }
  table.result td { min-width: 4.6em; } table.result th:first-child { overflow-wrap: anywhere; }
  table.facts th { width: 9em; }
  svg.plot { min-width: 0; overflow: visible; } svg.plot text { font-size: 14px !important; } }
@media print { main { max-width: none; padding: 0; } h2 { break-before: page; } figure, table { break-inside: avoid; } }
"""
