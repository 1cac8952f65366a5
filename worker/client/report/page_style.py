"""The page's style sheet: system fonts, colours for light and dark that differ in lightness and not in hue alone."""

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --dim: #5a6472; --rule: #e3e7ec; --tile: #f5f7f9;
  --good: #2f6fb5; --bad: #d9622b; --tokens: #2a8f7b; --mark: #1b1f24; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e6eaef; --dim: #9aa6b4; --rule: #2b323b;
  --tile: #1c2229; --good: #6ba6e8; --bad: #f0915e; --tokens: #5cc4ae; --mark: #f2f5f8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 44px 0 8px; padding-top: 20px; border-top: 1px solid var(--rule); }
header p { margin: 6px 0 20px; color: var(--dim); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin: 0; }
.tiles div { background: var(--tile); border-radius: 8px; padding: 12px 14px; }
.tiles dt { color: var(--dim); font-size: 13px; }
.tiles dd { margin: 0; color: var(--dim); font-size: 13px; }
.tiles dt + dd { color: var(--ink); font-size: 23px; font-weight: 600; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
figure { margin: 16px 0 0; min-width: 0; overflow-x: auto; }
#time svg, #errors svg { min-width: 620px; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 4px; }
figcaption span { font-weight: 400; color: var(--dim); }
.key { margin-left: 14px; white-space: nowrap; font-weight: 400; color: var(--dim); }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px; }
.key i.good, .key i.p50 { background: var(--good); } .key i.p90 { background: var(--tokens); }
.key i.errors, .key i.p99 { background: var(--bad); } .key i:where(.p50, .p90, .p99) { border-radius: 50%; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); gap: 8px 24px;
  align-items: end; } .pair.top { align-items: start; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; fill: var(--dim); }
svg .tag { fill: var(--mark); font-weight: 600; font-size: 11px; paint-order: stroke; stroke: var(--paper);
  stroke-width: 3px; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--dim); }
svg .good { fill: var(--good); } svg .errors { fill: var(--bad); } svg .tokens { fill: var(--tokens); }
svg .mark { stroke: var(--mark); stroke-width: 1.3; } svg .mark.weak { stroke-dasharray: 3 3; }
svg .range { stroke: var(--good); stroke-width: 2.5; opacity: .55; }
svg .dot { fill: var(--good); stroke: var(--paper); stroke-width: 1.5; }
svg .p90 { fill: var(--tokens); } svg .p99 { fill: var(--bad); }
svg .dot.weak { fill: var(--paper); stroke: var(--good); } svg .p90.weak { stroke: var(--tokens); }
svg .p99.weak { stroke: var(--bad); }
.scroll { overflow-x: auto; margin-top: 18px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: 4px; }
th, td { padding: 5px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { font-weight: 400; } thead th { color: var(--dim); font-size: 13px; }
th:first-child { padding-left: 0; } tbody th { vertical-align: top; font-weight: 600; max-width: 340px;
  overflow: hidden; text-overflow: ellipsis; }
.text { text-align: left; }
.notes { color: var(--dim); font-size: 14px; padding-left: 0; list-style: none; }
@media print { main { max-width: none; padding: 0; } figure, table { break-inside: avoid; } }
"""
