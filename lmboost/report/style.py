"""The look of the report's page, light and dark, wide and narrow."""

CSS = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --panel: #f6f7f8; --ink: #1f2328; --faint: #59636e; --rule: #d8dee4; --grid: #e4e8ec;
  --c0: #57606a; --c1: #0072b2; --c2: #c04f00; --c3: #00805c; --c4: #a8467f; --c5: #946200; --c6: #7a52d1;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #0f1317; --panel: #171c22; --ink: #e6eaee; --faint: #9aa5b1; --rule: #303943; --grid: #262e37;
    --c0: #aab4be; --c1: #56b4e9; --c2: #ff9a52; --c3: #3fcf9f; --c4: #e69bc8; --c5: #e6b73c; --c6: #b79bff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 3rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p, .notes { color: var(--faint); margin: .25rem 0; }
.notes { padding-left: 1.2rem; }
figure { margin: 0 0 1.6rem; min-width: 0; }
.grids figure, .panel figure { margin: 0; }
figcaption, caption { color: var(--faint); font-size: .85rem; text-align: left; padding-bottom: .4rem; }
.chart { display: grid; grid-template-columns: 3.4rem minmax(0, 1fr); padding-right: 1.2rem; padding-top: .4rem; }
.chart svg { width: 100%; height: 11rem; overflow: hidden; border-bottom: 1px solid var(--faint); display: block; }
.large .chart svg { height: 22rem; }
.chart .y, .chart .x { position: relative; font-size: .75rem; color: var(--faint); }
.chart .y span { position: absolute; right: .5rem; transform: translateY(-50%); white-space: nowrap; }
.chart .x { grid-column: 2; height: 1.4rem; }
.chart .x span { position: absolute; top: .25rem; transform: translateX(-50%); white-space: nowrap; }
.chart .label { grid-column: 2; font-size: .75rem; color: var(--faint); text-align: right; }
svg path { fill: none; vector-effect: non-scaling-stroke; }
.grid { stroke: var(--grid); }
.level { stroke: var(--faint); stroke-dasharray: 5 4; }
.end { stroke: var(--faint); stroke-dasharray: 2 3; stroke-width: 1.5; }
.line { stroke-width: 2; stroke-linejoin: round; }
.dot { stroke-width: 6; stroke-linecap: round; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); } .c3 { stroke: var(--c3); }
.c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); } .c6 { stroke: var(--c6); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0; margin: .4rem 0; }
.legend li { display: flex; align-items: center; gap: .4rem; font-size: .85rem; min-width: 0; }
.legend svg { width: 1.5rem; height: .5rem; flex: none; }
.legend i { width: .8rem; height: .8rem; border-radius: 2px; flex: none; }
.grids { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1.2rem; }
.run { background: var(--panel); border: 1px solid var(--rule); border-radius: 8px; padding: .6rem 1rem; }
.run + .run { margin-top: .8rem; }
.run summary { cursor: pointer; font-weight: 600; }
.run > p { margin-bottom: .8rem; }
.switch > input { position: absolute; opacity: 0; }
.switch > label {
  display: inline-block; padding: .2rem .8rem; border: 1px solid var(--rule); border-radius: 6px; cursor: pointer;
  font-size: .85rem; margin: 0 .3rem .6rem 0;
}
.switch > input:checked + label { background: var(--ink); color: var(--ground); border-color: var(--ink); }
.switch > input:focus-visible + label { outline: 2px solid var(--c1); outline-offset: 2px; }
.switch > .panel { display: none; }
#by-tokens:checked ~ .by-tokens, #by-flops:checked ~ .by-flops, #by-seconds:checked ~ .by-seconds { display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; overflow-wrap: break-word; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { color: var(--faint); font-weight: 600; white-space: normal; max-width: 12rem; vertical-align: bottom; }
th:first-child, td:first-child {
  text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--ground); white-space: normal;
  min-width: 7rem; max-width: 26rem; overflow-wrap: anywhere;
}
.bars { display: grid; grid-template-columns: minmax(5rem, max-content) minmax(0, 1fr); gap: .5rem .8rem; }
.bars dt { max-width: 16rem; font-size: .85rem; }
.bars dd { margin: 0; display: flex; height: 1.3rem; border-radius: 3px; overflow: hidden; align-self: center; }
.k0 { background: var(--c3); } .k1 { background: var(--c0); } .k2 { background: var(--c6); }
.k3 { background: var(--c1); } .k4 { background: var(--c2); } .k5 { background: var(--c4); }
.k6 { background: var(--c5); } .k7 { background: #d1242f; } .k8 { background: var(--rule); }
@media (max-width: 34rem) {
  body { padding: 1rem .75rem 2rem; }
  .large .chart svg { height: 15rem; }
  .chart { grid-template-columns: 2.8rem minmax(0, 1fr); }
  th, td { padding: .25rem .3rem; font-size: .72rem; }
  th:first-child, td:first-child { min-width: 5rem; max-width: 8rem; }
  .bars { grid-template-columns: minmax(0, 1fr); gap: .2rem; }
  .bars dt { max-width: none; }
  .bars dd { margin-bottom: .5rem; }
}
@media print { .switch > .panel { display: block; } }
"""
