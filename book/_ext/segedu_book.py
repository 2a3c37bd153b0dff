"""What Jupyter Book does not do by itself: no foreign scripts, no dead links, generated pages, accessible theme."""

import ast
import importlib.util
import re
import shutil
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "segedu.classic.js"

# Repairs of the theme's pages. Icons come from its web font, so its 1.5 MB script with all icons can go; so can the
# settings of thebe.
REPAIRS = [
    (r'\s*<script[^>]*src="[^"]*fontawesome\.js[^"]*"></script>', ""),
    (r'\s*<script type="text/x-thebe-config">.*?</script>\s*<script>kernelName[^<]*</script>', ""),
    (r'<div id="pst-primary-sidebar"', r'\g<0> role="region" aria-label="Book"'),  # axe: content outside of landmarks
    (r'<div class="output text_html"><table', r'\g<0> tabindex="0"'),  # axe: wide tables scroll by keys
    (r' role="list"(?= class="citation-list")| role="doc-biblioentry"', ""),  # axe: roles that ARIA has given up
]


SCORES = {
    "mean IoU": "scores.miou",
    "pixel accuracy": "scores.pixel_accuracy",
    "mean accuracy": "scores.mean_accuracy",
    "f.w. IoU": "scores.fw_iou",
    "boundary F1": "scores.boundary_f1",
}
COSTS = {"seconds": "seconds", "peak memory, MB": "peak_memory_mb"}


def drop_links_without_address(app, config):
    if not config.html_theme_options.get("repository_url"):
        config.html_theme_options["launch_buttons"] = {}


def own_scripts_only(app, pagename, templatename, context, doctree):
    """Leaves out thebe (it would be fetched from a CDN), scripts listed twice, and MathJax where there is no maths."""
    seen = set() if 'class="math' in context.get("body", "") else {"_static/" + app.config.mathjax_path}

    def wanted(script):
        name = str(getattr(script, "filename", script))
        key = name or str(getattr(script, "attributes", ""))
        if "thebe" in key.lower() or key in seen:
            return False
        seen.add(key)
        return True

    context["script_files"] = [script for script in context["script_files"] if wanted(script)]
    context["css_files"] = [css for css in context["css_files"] if "thebe" not in str(getattr(css, "filename", css))]


def classic(module: str) -> str:
    """An ES module as a plain script: module scripts do not load from file://."""
    body = re.sub(r"^export default\b", "const _module =", module, flags=re.M)
    body = re.sub(r"^export \{[^}]*\};?$", "", body, flags=re.M)
    body = re.sub(r"^export ", "", body, flags=re.M)
    return "(() => {\n" + body + "\n})();\n"


def copy_scripts(app, error):
    if error:
        return
    out = Path(app.outdir)
    module = (ROOT / "segedu/static/segedu.js").read_text()
    (out / "_static" / SCRIPT).write_text(classic(module))
    mathjax = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax"
    (out / "_static/mathjax").mkdir(exist_ok=True)
    shutil.copy(mathjax / "tex-chtml.js", out / "_static/mathjax")
    fonts = "output/chtml/fonts/woff-v2"
    shutil.copytree(mathjax / fonts, out / "_static/mathjax" / fonts, dirs_exist_ok=True)
    root = app.config.root_doc
    (out / "index.html").write_text(
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{app.config.project}</title>'
        f'<link rel="icon" href="_static/favicon.svg"><meta http-equiv="refresh" content="0; url={root}.html"></head>'
        f'<body><main><h1>{app.config.project}</h1><a href="{root}.html">Open the book</a></main></body></html>\n'
    )


def repair_pages(app, error):
    if error:
        return
    for page in Path(app.outdir).rglob("*.html"):
        text = page.read_text()
        for pattern, replacement in REPAIRS:
            text = re.sub(pattern, replacement, text, flags=re.S)
        page.write_text(text)


class Ledger(SphinxDirective):
    """All recorded runs of results/, a table per chapter, a row for the runs that differ in the seed only."""

    def run(self):
        from segedu import results

        for path in (ROOT / "results").glob("*.json"):
            self.env.note_dependency(str(path))
        chapters = {}
        for run in results.load():
            group = re.sub(r"-?seed\d+$", "", run["name"])
            chapters.setdefault(run["chapter"], {}).setdefault(group, []).append(run)
        lines = [] if chapters else ["No run is recorded yet."]
        for chapter, groups in chapters.items():
            costs = results.table(groups, COSTS, digits=0)
            for row, runs in zip(costs.rows, groups.values(), strict=True):
                arguments = ", ".join(f"{key}={value}" for key, value in runs[0]["arguments"].items())
                commits = ", ".join(sorted({run["git"][:7] for run in runs}))
                row[1:2] = [f"`{runs[0]['model']}({arguments})`", runs[0]["device"], commits]
            costs.head[1:2] = ["model", "device", "commit"]
            lines += ["", f"## {chapter}"]
            for table in (results.table(groups, SCORES), costs):
                rows = [["file", *table.head[1:]], ["---"] * len(table.head), *table.rows]
                lines += ["", *("| " + " | ".join(cells) + " |" for cells in rows)]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def signature(node: ast.AST) -> str:
    if isinstance(node, ast.ClassDef):
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if init is None:  # a dataclass: its fields
            fields = [ast.unparse(n) for n in node.body if isinstance(n, ast.AnnAssign)]
            return f"{node.name}({', '.join(fields)})"
        arguments = re.sub(r"^self(, )?", "", ast.unparse(init.args))
        return f"{node.name}({arguments})"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){returns}"


class Api(SphinxDirective):
    """Signatures and docstrings of all public functions and classes, read from the source without importing it."""

    def run(self):
        sections = []
        for path in sorted((ROOT / "segedu").rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            self.env.note_dependency(str(path))
            tree = ast.parse(path.read_text())
            public = [
                node
                for node in tree.body
                if isinstance(node, ast.FunctionDef | ast.ClassDef)
                and not node.name.startswith("_")
                and ast.get_docstring(node)
            ]
            if not public:
                continue
            section = self.section(module)
            if ast.get_docstring(tree):
                section += self.text(ast.get_docstring(tree))
            for node in public:
                entry = self.section(node.name, f"{module}.{node.name}")
                code = nodes.literal_block(signature(node), signature(node), language="python", classes=["signature"])
                entry += [code, self.text(ast.get_docstring(node))]
                section += entry
            sections.append(section)
        return sections

    def section(self, title, name=None):
        section = nodes.section(ids=[nodes.make_id(name or title)], names=[name or title])
        section += nodes.title("", title)
        return section

    def text(self, docstring):
        escaped = docstring.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        marked = re.sub(r"`+([^`\n]+)`+", r"<code>\1</code>", escaped)
        return nodes.raw("", f'<pre class="docstring">{marked}</pre>', format="html")


def setup(app):
    app.connect("config-inited", drop_links_without_address, priority=900)
    app.connect("html-page-context", own_scripts_only, priority=900)
    app.connect("build-finished", copy_scripts, priority=100)
    app.connect("build-finished", repair_pages, priority=900)
    app.add_js_file(SCRIPT, loading_method="defer")
    app.add_directive("ledger", Ledger)
    app.add_directive("api", Api)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
