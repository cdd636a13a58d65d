"""What a browser makes of a page: its parts, by an HTML parser."""

import html.parser
import json
import pathlib
from typing import Any

from nash_jax.run.page import NAME


class Parts(html.parser.HTMLParser):
  """The scripts of a page, the text outside of them, its links and meta elements."""

  def __init__(self, path: pathlib.Path):
    super().__init__()
    self.scripts: list[tuple[dict[str, str | None], str]] = []
    self.metas: list[dict[str, str | None]] = []
    self.links: list[str | None] = []
    self.tags: list[str] = []
    self.text = ""
    self.feed(path.read_text(encoding="utf-8"))
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    if tag == "script":
      self.scripts.append((dict(attrs), ""))
    if tag == "link":
      self.links.append(dict(attrs).get("href"))
    if tag == "meta":
      self.metas.append(dict(attrs))

  def handle_data(self, data):
    if self.tags[-1:] == ["script"]:
      attributes, text = self.scripts[-1]
      self.scripts[-1] = (attributes, text + data)
    else:
      self.text += data

  def handle_endtag(self, tag):
    self.tags.append(f"/{tag}")


def page_data(folder: pathlib.Path) -> dict[str, Any]:
  """Returns what a folder's page shows."""
  ((_, text),) = [s for s in Parts(folder / NAME).scripts if s[0].get("id") == "data"]
  return json.loads(text)
