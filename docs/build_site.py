"""Builds the documentation's site: python docs/build_site.py, or `make docs`.

The pages of docs/ are those that GitHub shows. This copies them to build/docs, with README.md,
CONTRIBUTING.md and CHANGELOG.md, the notebooks of colab/ as pages, and a page for each file of the
repository that a page links to; zensical.toml says the rest. Equations become MathML, which
browsers draw without a script. What is broken fails: a link, a reference, an anchor, an equation, a
page that the navigation leaves out.
"""

import html
import html.parser
import os
import pathlib
import posixpath
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.parse

import math_core
import nbconvert

ROOT = pathlib.Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
CODE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()[^)\s]+")
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
SHIM = "https://unpkg.com/iframe-worker/shim"  # where Zensical has search in files take it from
REFERENCE = re.compile(r"(?:\[[^\[\]]*)?\]\[[A-Za-z_][\w.]*\]")
_CODE = ("code", "pre", "script", "style")
EXTERNAL = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.IGNORECASE)


def page_of(path: str) -> str:
  """Returns where the site has a file of the repository; both as paths with slashes."""
  if path.startswith("docs/"):
    return path.removeprefix("docs/")
  if path.startswith("colab/") and path.endswith(".ipynb"):
    return f"notebooks/{pathlib.PurePosixPath(path).stem}.md"
  return path.lower() if re.fullmatch(r"[A-Z]+\.md", path) else f"source/{path}.md"


def rewritten(text: str, path: str, linked: dict[str, str]) -> str:
  """Returns a page whose links go to pages of the site; in linked, files that it links to."""

  def rewrite(link: re.Match[str]) -> str:
    url = link[0]
    address, mark, anchor = url.partition("#")
    if not address or EXTERNAL.match(address):
      return url
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), address))
    linked.setdefault(target, path)
    start = posixpath.dirname(page_of(path)) or "."
    return posixpath.relpath(page_of(target), start) + mark + anchor

  parts, end = [], 0
  for code in CODE.finditer(text):
    parts += [LINK.sub(rewrite, text[end : code.start()]), code[0]]
    end = code.end()
  return "".join([*parts, LINK.sub(rewrite, text[end:])])


def source_page(path: str) -> str:
  """Returns a page that shows a file of the repository, or lists a folder."""
  if (ROOT / path).is_dir():
    names = sorted(file.name for file in (ROOT / path).iterdir() if not file.name.startswith("."))
    return f"# {path}/\n\n" + "".join(f"* `{name}`\n" for name in names)
  language = {".py": "python", ".sh": "bash", ".toml": "toml"}.get(
    pathlib.Path(path).suffix, "text"
  )
  text = (ROOT / path).read_text(encoding="utf-8")
  return f"# {path}\n\n````{language}\n{text}````\n"


def notebook_page(path: str, folder: pathlib.Path) -> str:
  """Returns a notebook as a page with its stored outputs, and writes their pictures."""
  name = pathlib.Path(path).stem
  exporter = nbconvert.MarkdownExporter()
  text, resources = exporter.from_filename(
    str(ROOT / path), resources={"output_files_dir": name, "unique_key": name}
  )
  for file, content in resources["outputs"].items():
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(content)
  shutil.copy(ROOT / path, folder)
  title, rest = text.lstrip().split("\n", 1)
  return f"{title}\n\n[Download the notebook]({name}.ipynb)\n{rest}"


def stage(folder: pathlib.Path) -> list[str]:
  """Copies what the site is made of to a folder; returns the links to files that do not exist."""
  shutil.rmtree(folder, ignore_errors=True)
  ignored = shutil.ignore_patterns("*.md", "*.py", "__pycache__")
  shutil.copytree(ROOT / "docs", folder, ignore=ignored)
  (folder / "notebooks").mkdir()
  linked: dict[str, str] = {}
  for file in sorted((ROOT / "docs").rglob("*.md")) + sorted(ROOT.glob("*.md")):
    path = file.relative_to(ROOT).as_posix()
    (folder / page_of(path)).parent.mkdir(parents=True, exist_ok=True)
    text = file.read_text(encoding="utf-8")
    (folder / page_of(path)).write_text(rewritten(text, path, linked), encoding="utf-8")
  for file in sorted((ROOT / "colab").glob("*.ipynb")):
    path = file.relative_to(ROOT).as_posix()
    (folder / page_of(path)).write_text(notebook_page(path, folder / "notebooks"), encoding="utf-8")
  missing = [path for path in sorted(linked) if not (ROOT / path).exists()]
  for path in sorted({*linked} - {*missing}):
    page = folder / page_of(path)
    if page_of(path).startswith("source/"):
      page.parent.mkdir(parents=True, exist_ok=True)
      page.write_text(source_page(path), encoding="utf-8")
  return [f"{linked[path]}: link to nothing: {path}" for path in missing]


def left_out(folder: pathlib.Path, nav: list) -> list[str]:
  """Returns what is wrong between the pages and the navigation; pages of files are not in it."""

  def files(entry) -> list[str]:
    if isinstance(entry, str):
      return [entry]
    entries = entry.values() if isinstance(entry, dict) else entry
    return [file for part in entries for file in files(part)]

  pages = {file.relative_to(folder).as_posix() for file in folder.rglob("*.md")}
  pages = {page for page in pages if not page.startswith("source/")}
  return [f"zensical.toml: no page {page}" for page in sorted({*files(nav)} - pages)] + [
    f"{page}: expected in nav of zensical.toml" for page in sorted(pages - {*files(nav)})
  ]


def finish(site: pathlib.Path) -> list[str]:
  """Has MathML for the LaTeX of every page, and its own copy of a script; returns what is wrong."""
  converter, wrong = math_core.LatexToMathML(), list[str]()
  for file in sorted(site.rglob("*.html")):

    def draw(found: re.Match[str], file: pathlib.Path = file) -> str:
      latex = html.unescape(found[2]).strip()
      try:
        return converter.convert_with_local_state(latex, displaystyle=found[1] == "div")
      except math_core.LatexError as error:
        wrong.append(f"{file.relative_to(site)}: equation {latex!r}: {error}")
        return found[0]

    up = "../" * (len(file.relative_to(site).parts) - 1)
    text = file.read_text(encoding="utf-8").replace(SHIM, f"{up}javascripts/iframe-worker.js")
    file.write_text(MATH.sub(draw, text), encoding="utf-8")
  return wrong


class _Page(html.parser.HTMLParser):
  """What a page links to and loads, what can be linked to in it, and references to nothing."""

  def __init__(self, text: str):
    super().__init__()
    self.links, self.anchors, self.unresolved = list[str](), {"", "top"}, list[str]()
    self.loads = list[str]()
    self._code = 0  # elements around, where brackets are brackets
    self.feed(text)

  def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    values = {name: value or "" for name, value in attrs}
    self.anchors |= {values[name] for name in ("id", "name") if name in values}
    self.links += [values[name] for name in ("href", "src") if name in values]
    loads = values.get("href" if tag == "link" else "src", "")
    self.loads += [loads] if EXTERNAL.match(loads) and values.get("rel") != "canonical" else []
    self._code += tag in _CODE
    if tag == "autoref" and "optional" not in values:
      self.unresolved.append(values.get("identifier", ""))

  def handle_endtag(self, tag: str) -> None:
    self._code -= tag in _CODE

  def handle_data(self, data: str) -> None:
    if not self._code:
      self.unresolved += REFERENCE.findall(data)


def broken(site: pathlib.Path) -> list[str]:
  """Returns the links, references and anchors of a built site that lead nowhere."""
  files = [file for file in sorted(site.rglob("*.html")) if file.name != "404.html"]
  pages = {file: _Page(file.read_text(encoding="utf-8")) for file in files}
  wrong = list[str]()
  for file, page in pages.items():
    name = file.relative_to(site)
    wrong += [f"{name}: reference to nothing: {reference}" for reference in page.unresolved]
    wrong += [f"{name}: asks another server: {link}" for link in page.loads]
    for link in page.links:
      address, _, anchor = link.partition("#")
      if EXTERNAL.match(address):
        continue
      path = urllib.parse.unquote(address.partition("?")[0])
      target = pathlib.Path(os.path.normpath(file.parent / path)) if path else file
      target = target / "index.html" if target.is_dir() else target
      if not target.is_file():
        wrong.append(f"{name}: link to nothing: {link}")
      elif target in pages and urllib.parse.unquote(anchor) not in pages[target].anchors:
        wrong.append(f"{name}: link to no anchor: {link}")
  return wrong


def main() -> int:
  """Builds build/site/; returns 1 and says what is broken, or 0."""
  # Zensical empties .cache of the folder of its config: in ROOT that holds compiled programs.
  BUILD.mkdir(exist_ok=True)
  shutil.copy(ROOT / "zensical.toml", BUILD)
  config = tomllib.loads((BUILD / "zensical.toml").read_text(encoding="utf-8"))["project"]
  folder, site = BUILD / config["docs_dir"], BUILD / config["site_dir"]
  wrong = stage(folder) + left_out(folder, config["nav"])
  shutil.rmtree(site, ignore_errors=True)
  zensical = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
  built = subprocess.run(zensical, cwd=BUILD)
  if built.returncode == 0:
    wrong += finish(site) + broken(site)
  print(*wrong, sep="\n", file=sys.stderr)
  return int(bool(wrong) or built.returncode != 0)


if __name__ == "__main__":
  sys.exit(main())
