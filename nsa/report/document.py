"""A document as a list of blocks, written once as Markdown and once as a self-contained HTML page.

Text may hold **bold** and `code`; everything else in it is literal.
"""
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
  style: str = ""           # "" | verdict | note


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


def parse(text: str, level: int = 2) -> list:
  """Blocks of hand-written Markdown: headings (brought to `level` and below), lists, tables, and paragraphs; no more is known."""
  blocks = []
  for part in re.split(r"\n\s*\n|\n(?=#)|(?<=\n)(?=[-*] )", "\n" + text):
    lines = part.strip().splitlines()
    while lines and (found := re.match(r"(#+) +(.*)", lines[0])):
      blocks.append(Heading(found[2], min(6, level - 1 + len(found[1]))))
      lines = lines[1:]
    if not lines:
      continue
    if len(lines) > 2 and all(line.startswith("|") for line in lines):
      header, _, *rows = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines)
      blocks.append(Table(header, rows))
      continue
    whole = " ".join(line.strip() for line in lines)
    if not re.match(r"[-*] ", whole):
      blocks.append(Text(whole))
    elif blocks and isinstance(blocks[-1], Bullets):
      blocks[-1].items.append(whole[2:])
    else:
      blocks.append(Bullets([whole[2:]]))
  return blocks


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
      lines = [b.header, [":--" if i < b.left else "--:" for i in range(len(b.header))]] + b.rows
      table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)
      out.append((f"*{b.caption}*\n\n" if b.caption else "") + table)
    elif isinstance(b, Picture):
      out.append(f"![{b.alt}](plots/{b.name}.png)\n\n*{b.caption}*")
  return "\n\n".join(out) + "\n"


def page(title: str, blocks: list, plots: Path) -> str:
  """The document as one HTML file with its pictures inside: it opens without a network."""
  body = [f"<h1>{html.escape(title)}</h1>"]
  for b in blocks:
    if isinstance(b, Heading):
      body.append(f"<h{b.level}>{_inline(b.text)}</h{b.level}>")
    elif isinstance(b, Text):
      body.append(f'<p class="{b.style}">{_inline(b.text)}</p>' if b.style else f"<p>{_inline(b.text)}</p>")
    elif isinstance(b, Bullets):
      body.append("<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in b.items) + "</ul>")
    elif isinstance(b, Table):
      body.append(_table(b))
    elif isinstance(b, Picture):
      data = base64.b64encode((plots / f"{b.name}.svg").read_bytes()).decode()
      alt = html.escape(b.alt, quote=True)
      body.append(f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{alt}">'
                  f"<figcaption>{_inline(b.caption)}</figcaption></figure>")
  return _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(body))


def plain(text: str) -> str:
  """The text without its marks, for a terminal."""
  return text.replace("**", "").replace("`", "")


def _table(table):
  def row(cells, tag):
    return "<tr>" + "".join(f"<{tag}{' class=left' if i < table.left else ''}>{_inline(c)}</{tag}>"
                            for i, c in enumerate(cells)) + "</tr>"
  caption = f"<caption>{_inline(table.caption)}</caption>" if table.caption else ""
  wide = ' class="wide"' if len(table.header) > 6 else ""
  return (f'<div class="scroll"><table{wide}>' + caption + "<thead>" + row(table.header, "th") + "</thead><tbody>"
          + "\n".join(row(r, "td") for r in table.rows) + "</tbody></table></div>")


def _inline(text):
  text = html.escape(text)
  text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
  return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


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
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1c1c1c; line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 1.25rem; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid #d8d8d8; }
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem; }
p, ul { max-width: 46rem; }
p.verdict { max-width: none; background: #f3f6f9; border-left: 4px solid #0072b2; 
  padding: .9rem 1.1rem; margin: 0 0 1rem; }
p.note { color: #555; font-size: .92rem; }
.scroll { overflow-x: auto; margin: 1rem 0 1.25rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
table.wide { font-size: .78rem; }
table.wide th, table.wide td { padding-right: .55rem; }
caption { text-align: left; color: #555; padding-bottom: .4rem; }
th, td { padding: .32rem .8rem .32rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #ececec; }
th { font-weight: 600; border-bottom: 1px solid #888; vertical-align: bottom; white-space: normal;
  min-width: 4.5rem; }
th.left, td.left { text-align: left; }
figure { margin: 1.25rem 0 1.75rem; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: #555; font-size: .9rem; max-width: 46rem; margin-top: .4rem; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: #f4f4f4;
  padding: 0 .2em; }
@media print { main { padding: 0; } figure, table { break-inside: avoid; } }
"""
