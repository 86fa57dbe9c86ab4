"""A document as a list of blocks, written as Markdown; the page is that Markdown through markdown-it, with its pictures
inside."""
from __future__ import annotations

import base64
import dataclasses
import html
from pathlib import Path
import re


@dataclasses.dataclass
class Heading:
  text: str
  level: int = 2


@dataclasses.dataclass
class Text:
  text: str
  style: str = ""           # "" | verdict | note: a quotation


@dataclasses.dataclass
class Bullets:
  items: list[str]


@dataclasses.dataclass
class Table:
  header: list[str]
  rows: list[list[str]]
  caption: str = ""
  left: int = 1             # columns aligned to the left; the others hold numbers


@dataclasses.dataclass
class Picture:
  """plots/<name>.svg and plots/<name>.png."""
  name: str
  caption: str
  alt: str


@dataclasses.dataclass
class Written:
  """Markdown by hand, whose headings become of level 3 and below."""
  text: str


def markdown(title: str, blocks: list) -> str:
  """The document as GitHub-flavoured Markdown; pictures are linked."""
  out = [f"# {title}"]
  for b in blocks:
    if isinstance(b, Heading):
      out.append("#" * b.level + " " + b.text)
    elif isinstance(b, Text):
      out.append("> " + b.text if b.style else b.text)
    elif isinstance(b, Bullets):
      out.append("\n".join("- " + item for item in b.items))
    elif isinstance(b, Table):
      # a column that says nothing in any row is left out
      shown = [i for i in range(len(b.header)) if i < b.left or any(row[i].strip("-") for row in b.rows)]
      lines = [b.header, [":--" if i < b.left else "--:" for i in range(len(b.header))]] + b.rows
      table = "\n".join("| " + " | ".join(row[i].replace("|", "\\|") for i in shown) + " |" for row in lines)
      out.append((_caption(b.caption) + "\n\n" if b.caption else "") + table)
    elif isinstance(b, Picture):
      out.append(f"![{b.alt}](plots/{b.name}.png)\n\n" + _caption(b.caption))
    elif isinstance(b, Written):
      out.append(re.sub(r"^(#+) ", lambda found: "#" * min(6, len(found[1]) + 2) + " ", b.text.strip(), flags=re.M))
  return "\n\n".join(out) + "\n"


def _caption(text):
  return f"*{text.strip().rstrip('.')}.*"


def page(title: str, blocks: list, plots: Path) -> str:
  """The document as one HTML file with its pictures inside: it opens without a network."""
  import markdown_it  # here: the verdict alone does without
  body = markdown_it.MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown(title, blocks))
  body = re.sub(r'<td style="text-align:left">(?=[^<]{45})', '<td class="long">', body)
  body = body.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")

  def picture(found):
    svg = plots / f"{found[1]}.svg"
    return (f'src="data:image/svg+xml;base64,{base64.b64encode(svg.read_bytes()).decode()}"' if svg.is_file()
            else found[0])

  body = re.sub(r'src="plots/([^"/]+)\.png"', picture, body)
  return _PAGE.format(title=html.escape(title), style=_STYLE, body=body)


def plain(text: str) -> str:
  """The text without its marks, for a terminal."""
  return text.replace("**", "").replace("`", "")


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1c1c1c; line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 80rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 1.25rem; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid #d8d8d8; }
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem; }
p, ul, blockquote { max-width: 48rem; }
li { margin: .25rem 0; }
blockquote { margin: 0 0 1rem; color: #555; font-size: .92rem; }
blockquote:has(strong) { background: #f3f6f9; border-left: 4px solid #0072b2; padding: .1rem 1.1rem; color: inherit;
  font-size: 1.02rem; }
p > em:only-child { color: #555; font-size: .9rem; font-style: normal; }
p:has(> img) { max-width: none; margin: 1.5rem 0 0; }
p:has(> img) + p { margin: .25rem 0 2rem; }
p:has(+ .scroll) { margin: 1.75rem 0 .25rem; }
h2 + p:has(+ .scroll), h3 + p:has(+ .scroll) { margin-top: 0; }
th:not([style]) { text-align: left; }
.scroll { overflow-x: auto; margin: .25rem 0 1.5rem; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .8rem .32rem 0; white-space: nowrap; border-bottom: 1px solid #ececec; }
td.long { white-space: normal; min-width: 16rem; }
th { font-weight: 600; border-bottom: 1px solid #888; vertical-align: bottom; white-space: normal; min-width: 4.5rem;
  max-width: 11rem; }
img { max-width: 100%; height: auto; display: block; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: #f4f4f4; padding: 0 .2em; }
@media print { main { padding: 0; } img, table { break-inside: avoid; } }
"""
