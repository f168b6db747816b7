"""The picture of an attribution graph, and the page on which one can walk it: for circuit.py.

    drawn("circuit.png", graph, title)         # graph: what circuit.py --save writes
    page_of("circuit.html", graph, title, text, changed)
"""
import html
import json
import math
import sys

from draw import page, printable, short, write_figure
from inside import listed

CHIP = 38, 20  # pixels of a node


def placed(result: dict) -> tuple[list[tuple[float, float]], list[float], float, float]:
    """Where nodes stand, in pixels: a column for each position, a row for each layer (with heads, two), the embedding
    below; then the middles of the columns, the width and the height."""
    nodes, layers = result["nodes"], result["layers"]
    two = any(node["kind"] in ("head", "MLP") for node in nodes)

    def row(node):
        if node["layer"] < 0 or node["kind"] == "answer":
            return 0 if node["layer"] < 0 else 1 + layers * (1 + two)
        return 1 + node["layer"] * (1 + two) + (two and node["kind"] == "MLP")

    cells = {}
    for node in nodes:
        cells.setdefault((row(node), node["position"]), []).append(node["id"])
    n, T = 2 + layers * (1 + two), len(result["tokens"])
    across = [max([math.ceil(math.sqrt(len(ids))) for (_, t), ids in cells.items() if t == at], default=1)
              for at in range(T)]
    down = [max([math.ceil(len(ids) / across[t]) for (r, t), ids in cells.items() if r == at], default=0)
            for at in range(n)]
    widths = [max(58, 14 + count * (CHIP[0] + 4)) for count in across]
    heights = [max(30, 22 + count * (CHIP[1] + 4)) for count in down]
    middles = [60 + sum(widths[:t]) + widths[t] / 2 for t in range(T)]
    height = sum(heights) + 4
    at = [None] * len(nodes)
    for (r, t), ids in cells.items():
        middle = height - sum(heights[:r]) - heights[r] / 2
        lines = math.ceil(len(ids) / across[t])
        for i, node in enumerate(sorted(ids, key=lambda i: nodes[i]["index"])):
            line, place = divmod(i, across[t])
            here = min(across[t], len(ids) - line * across[t])
            at[node] = (middles[t] + (place - (here - 1) / 2) * (CHIP[0] + 4),
                        middle + (line - (lines - 1) / 2) * (CHIP[1] + 4))
    rows = [height - sum(heights[:r]) - heights[r] / 2 for r in range(n)]
    names = ["tokens", *(f"layer {layer}" + (f" {part}" if part else "") for layer in range(layers)
                         for part in (("heads", "MLP") if two else ("",))), "answer"]
    return at, list(zip(names, rows, strict=True)), 60 + sum(widths) + 16, height


def chip(result: dict, node: dict) -> str:
    """What stands in a node."""
    kind, index = node["kind"], node["index"]
    if kind == "embedding":
        return short(result["tokens"][node["position"]].partition(" ")[2], 8)
    return {"head": f"h{index}", "MLP": "MLP", "error": "error", "answer": "answer"}.get(kind, str(index))


COLOUR = {"embedding": (140, 140, 140), "head": (0, 114, 178), "MLP": (0, 158, 115), "neuron": (0, 158, 115),
          "feature": (0, 158, 115), "error": (204, 121, 167), "answer": (230, 159, 0)}
FOR, AGAINST = (235, 90, 60), (60, 130, 235)  # as in the cells of draw.grid()


def shade(result: dict, node: dict) -> float:
    most = max([each["influence"] for each in result["nodes"][1:]], default=1)
    return 0.7 if node["kind"] == "answer" else 0.12 + 0.5 * math.sqrt(node["influence"] / max(most, 1e-9))


def drawn(path: str, result: dict, title: str, most: int = 60):
    """A PNG of the graph with its strongest edges."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch, PathPatch
    from matplotlib.path import Path

    at, rows, width, height = placed(result)
    figure = Figure(figsize=(width / 90, height / 90 + 0.3), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    axes.axis("off")
    axes.set_title(printable(title), fontsize=9, parse_math=False)
    for name, y in rows:
        axes.axhline(y, color="#999999", lw=0.3, zorder=0)
        axes.text(2, y, name, fontsize=6.5, va="center", color="#555555", backgroundcolor="white")
    largest = max([edge["score"] for edge in result["edges"]], default=1)
    for edge in result["edges"][:most]:
        (x0, y0), (x1, y1) = at[edge["from"]], at[edge["to"]]
        bend, side = (y0 - y1) / 2, min(45, (y0 - y1) * 0.15) if abs(x0 - x1) < CHIP[0] else 0
        path_of = Path([(x0, y0 - 10), (x0 + side, y0 - bend), (x1 + side, y1 + bend), (x1, y1 + 10)], [1, 4, 4, 4])
        strong = math.sqrt(edge["score"] / largest)
        colour = [c / 255 for c in (FOR if edge["weight"] > 0 else AGAINST)]
        axes.add_patch(PathPatch(path_of, fc="none", ec=colour, lw=0.4 + 3 * strong, alpha=0.25 + 0.6 * strong,
                                 ls={"key": "--", "query": ":"}.get(edge["kind"], "-"), zorder=1))
    for node, (x, y) in zip(result["nodes"], at, strict=True):
        colour, share = COLOUR[node["kind"]], shade(result, node)
        axes.add_patch(FancyBboxPatch((x - CHIP[0] / 2 + 3, y - CHIP[1] / 2 + 3), CHIP[0] - 6, CHIP[1] - 6, zorder=2,
                                      boxstyle="round,pad=3", ec=[c / 255 for c in colour], lw=0.7,
                                      fc=[1 - share * (1 - c / 255) for c in colour]))
        axes.text(x, y, chip(result, node), fontsize=6, ha="center", va="center", zorder=3, parse_math=False)
    write_figure(path, figure, dpi=110)


STYLE = """
body { max-width: 110em; margin: 1em auto; }
h1 { font-size: 1.3em; } dl { font-size: 13px; } dd { overflow-wrap: anywhere; }
.circuit { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1em; align-items: start; }
.view { overflow: auto; border: 1px solid var(--line); max-height: 82vh; }
.circuit aside { border: 1px solid var(--line); padding: .6em .8em; overflow: auto; font-size: 14px; min-width: 0; }
.circuit aside h2 { font-size: 1.05em; margin: 0 0 .3em; overflow-wrap: anywhere; }
.circuit aside p { margin: .3em 0; overflow-wrap: anywhere; }
.circuit aside table { margin: .3em 0 .8em; width: 100%; }
.circuit aside td { border-width: 0 0 1px; text-align: left; white-space: normal; overflow-wrap: anywhere; }
.circuit aside td.n { text-align: right; white-space: pre; } .circuit aside td.k { white-space: nowrap; }
.circuit aside button { all: unset; cursor: pointer; text-decoration: underline; text-underline-offset: 2px; }
.circuit aside button:focus-visible { outline: 2px solid; }
svg { display: block; } svg text { font: 11px ui-monospace, monospace; fill: CanvasText; }
svg .row { stroke: var(--line); } svg .rows text { font-size: 10px; opacity: .8; }
svg g[role=button] { cursor: pointer; } svg g[role=button] text { text-anchor: middle; dominant-baseline: central; }
svg g[role=button]:focus { outline: none; } svg g:focus-visible rect, svg g.chosen rect { stroke-width: 3; }
svg path { fill: none; } svg .dim { opacity: .25; }
@media (min-width: 1000px) { .circuit { grid-template-columns: minmax(0, 1fr) 25em; }
    .circuit aside { max-height: 82vh; position: sticky; top: 1em; box-sizing: border-box; } }
"""

SCRIPT = """
const { nodes, edges, tokens, interventions } = graph, svg = document.querySelector(".view svg");
const groups = nodes.map(({ id }) => svg.querySelector(`[data-node="${id}"]`));
const aside = document.querySelector(".circuit aside"), lines = svg.querySelector(".edges"), first = aside.innerHTML;
const signed = (x) => (x < 0 ? "\u2212" : "+") + Math.abs(x).toPrecision(3);
const make = (name, text = "", attributes = {}) => {
    const element = document.createElement(name);
    element.textContent = text;
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
};

function draw(shown) {
    const largest = Math.sqrt(Math.max(...shown.map((edge) => edge.score), 1e-9));
    lines.replaceChildren(...shown.map((edge) => {
        const [x0, y0] = at[edge.from], [x1, y1] = at[edge.to], bend = (y0 - y1) / 2;
        const side = Math.abs(x0 - x1) < 38 ? Math.min(45, (y0 - y1) * 0.15) : 0;  // not over others of the column
        const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
        const strong = Math.sqrt(edge.score) / largest;
        const bows = `${x0 + side} ${y0 - bend} ${x1 + side} ${y1 + bend}`;
        path.setAttribute("d", `M${x0} ${y0 - 10}C${bows} ${x1} ${y1 + 10}`);
        path.setAttribute("stroke", `rgb(${edge.weight > 0 ? "235 90 60" : "60 130 235"} / ${0.25 + 0.65 * strong})`);
        path.setAttribute("stroke-width", 0.6 + 4 * strong);
        path.setAttribute("stroke-dasharray", { key: "6 3", query: "2 3" }[edge.kind] ?? "none");
        return path;
    }));
}

function table(title, rows, headers) {
    const found = make("table"), caption = make("caption", title, { style: "text-align: left; font-weight: bold" });
    const head = make("tr");
    head.append(...headers.map((text) => make("th", text, { scope: "col", style: "text-align: left" })));
    found.append(caption, head, ...rows.map((cells) => {
        const row = make("tr");
        row.append(...cells.map((cell) => {
            const td = make("td");
            if (typeof cell === "string") {
                td.textContent = cell;
                td.className = /\\d/.test(cell) ? "n" : "k";
            } else {
                const button = make("button", nodes[cell].name, { type: "button" });
                button.addEventListener("click", () => { choose(cell); groups[cell].focus(); });
                td.append(button);
            }
            return td;
        }));
        return row;
    }));
    return found;
}

function choose(id) {
    const [into, from] = ["to", "from"].map((end) => edges.filter((edge) => edge[end] === id)), node = nodes[id];
    draw([...into, ...from]);
    const near = new Set([id, ...into.map((edge) => edge.from), ...from.map((edge) => edge.to)]);
    groups.forEach((group, i) => {
        group.classList.toggle("chosen", i === id);
        group.classList.toggle("dim", !near.has(i));
        group.setAttribute("tabindex", i === id ? 0 : -1);
        group.setAttribute("aria-pressed", i === id);
    });
    const value = (words.values[node.kind] ?? words.value).replace("X", signed(node.value));
    const told = [make("h2", node.name), make("p", value +
        (id ? `; influence ${node.influence.toPrecision(3)}` : ""))];
    if ("input" in node)
        told.push(make("p", `input ${signed(node.input)}, of which ${signed(node.constant)} from biases`));
    if (node.writes.length) told.push(make("p", `raises ${node.writes.join("  ")}`));
    if (node.reads?.length) told.push(make("p", `reads most from ${node.reads.join("  ")}`));
    const kind = edges.some((edge) => edge.kind) ? (edge) => [edge.kind] : () => [], kinds = kind({}).map(() => "kind");
    const strongest = (list) => [...list].sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight)).slice(0, 25);
    for (const [title, list, end] of [["Edges in", into, "from"], ["Edges out", from, "to"]]) {
        const heads = list.some((edge) => edge.heads?.length), through = ({ heads }) => (heads ?? []).slice(0, 2).map(
            ([layer, head, part]) => `${layer}.${head}: ${signed(part)}`).join("\\n");
        if (list.length) told.push(table(title, strongest(list).map((edge) =>
            [signed(edge.weight), ...kind(edge), edge[end], ...heads ? [through(edge)] : []]),
            ["weight", ...kinds, end, ...heads ? ["through head"] : []]));
    }
    const tried = interventions.filter((each) => each.from === id || kinds.length && each.to === id);
    if (tried.length && kinds.length) told.push(table("Edges cut in the real model: change of the answer", tried.map(
        (each) => [signed(each.predicted), signed(each.measured), each.kind, each.from === id ? each.to : each.from]),
        ["predicted", "measured", "kind", "other end"]));
    else for (const each of tried) told.push(table(words.changed, [
        [signed(each.predicted), signed(each.measured), each.to],
        ...each.inputs.map((one) => [signed(one.predicted), signed(one.measured), one.to])],
        ["predicted", "measured", "change of"]));
    aside.replaceChildren(...told);
    aside.scrollTop = 0;
}

function clear() {
    draw(edges.slice(0, 60));
    groups.forEach((group, i) => {
        group.classList.remove("dim", "chosen");
        group.setAttribute("aria-pressed", false);
        group.setAttribute("tabindex", i ? -1 : 0);
    });
    aside.innerHTML = first;
}

groups.forEach((group, id) => {
    group.addEventListener("click", (event) => { event.stopPropagation(); choose(id); });
    group.addEventListener("keydown", (event) => {
        const towards = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
        if (event.key === "Escape") clear();
        else if (event.key === "Enter" || event.key === " ") choose(id);
        else if (towards) {
            const cost = (i) => {
                const dx = at[i][0] - at[id][0], dy = at[i][1] - at[id][1];
                const ahead = dx * towards[0] + dy * towards[1];
                return ahead > 1 ? ahead + 3 * Math.abs(dx * towards[1] - dy * towards[0]) : Infinity;
            };
            const best = nodes.map((_, i) => i).reduce((a, b) => cost(b) < cost(a) ? b : a, id);
            choose(best);
            groups[best].focus();
        } else return;
        event.preventDefault();
    });
});
svg.addEventListener("click", clear);
clear();
const view = svg.parentElement, names = svg.querySelectorAll(".rows text");
view.addEventListener("scroll", () => names.forEach((name) => name.setAttribute("x", 4 + view.scrollLeft)));
view.scrollLeft = view.scrollWidth;  // to the answer
"""


def page_of(path: str, result: dict, title: str, text: str, changed: str):
    """A page that walks the graph."""
    at, rows, width, height = placed(result)
    lines = [f'<line class=row x1=0 x2={width:.0f} y1={y:.0f} y2={y:.0f} /><text x=4 y={y - 3:.0f}>{name}</text>'
             for name, y in rows]
    groups = []
    for node, (x, y) in zip(result["nodes"], at, strict=True):
        colour, share = " ".join(map(str, COLOUR[node["kind"]])), shade(result, node)
        wide = CHIP[0] + (16 if node["kind"] in ("embedding", "answer") else 0)
        groups.append(
            f'<g role=button tabindex=-1 data-node={node["id"]} aria-label="{html.escape(node["name"])}">'
            f'<rect x={x - wide / 2:.1f} y={y - CHIP[1] / 2:.1f} width={wide} height={CHIP[1]} rx=5 fill="Canvas" />'
            f'<rect x={x - wide / 2:.1f} y={y - CHIP[1] / 2:.1f} width={wide} height={CHIP[1]} rx=5 '
            f'fill="rgb({colour} / {share:.2f})" stroke="rgb({colour})" />'
            f'<text x={x:.1f} y={y:.1f}>{html.escape(chip(result, node))}</text></g>')
    parts = any(node["kind"] in ("head", "MLP") for node in result["nodes"])
    value = "contributes X to the answer" if parts else "activation X"
    values = {"answer": "value X"} | ({} if parts else {"error": "length X", "embedding": "a token"})
    data = {"graph": result, "at": [[round(x), round(y)] for x, y in at],
            "words": {"value": value, "values": values, "changed": changed}}
    consts = "".join(f"const {name} = {json.dumps(each)};" for name, each in data.items()).replace("<", "\\u003c")
    raised = "the answer" if parts else "the input of the node that they lead to"
    dashes = "; they are dashed through keys and dotted through queries" if parts else ""
    help_text = ("Choose a node, by mouse or by Tab and the arrow keys, to see its edges with their weights. Escape "
                 f"shows the strongest edges of the graph again. Edges are red where they raise {raised}, and blue "
                 f"where they lower it{dashes}.")
    page(path, title, text, f"<style>{STYLE}</style>",
         f'<div class=circuit><div class=view><svg width={width:.0f} height={height:.0f} role=group '
         f'aria-label="attribution graph"><g class=rows>{"".join(lines)}</g><g class=edges></g>{"".join(groups)}</svg>'
         f"</div><aside aria-live=polite><p>{help_text}</p></aside></div>", listed(result["about"]),
         f"<script type=module>{consts}{SCRIPT}</script>")


if __name__ == "__main__":
    print("circuit_page.py has no command of its own: run circuit.py, which uses it", file=sys.stderr)
    sys.exit(2)
