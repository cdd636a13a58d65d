"""The documentation's site: what is broken in it is found, and fails."""

import importlib.util
import re
import shutil

import pytest
from paths import ROOT

_SPEC = importlib.util.spec_from_file_location("build_site", ROOT / "docs" / "build_site.py")
SITE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(SITE)


def write(folder, **pages):
  for name, text in pages.items():
    (folder / f"{name}.html").write_text(text, encoding="utf-8")
  return folder


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ('<a href="none.html">x</a>', "a.html: link to nothing: none.html"),
    ('<img src="none.png">', "a.html: link to nothing: none.png"),
    ('<a href="b.html#none">x</a>', "a.html: link to no anchor: b.html#none"),
    ('<a href="#none">x</a>', "a.html: link to no anchor: #none"),
    ("<p>see [here][pkg.f].</p>", "a.html: reference to nothing: [here][pkg.f]"),
    ("<p>see [<code>f</code>][pkg.f].</p>", "a.html: reference to nothing: ][pkg.f]"),
    ('<script src="https://x.y/z"></script>', "a.html: asks another server: https://x.y/z"),
    ('<autoref identifier="pkg.f">f</autoref>', "a.html: reference to nothing: pkg.f"),
  ],
)
def test_what_leads_nowhere_is_found(text, said, tmp_path):
  good = (
    '<h1 id="title">b</h1><a href="a.html">a</a><a href="https://x.y">x</a><a href="#title">t</a>'
  )
  assert SITE.broken(write(tmp_path, a=text, b=good)) == [said]


def test_what_leads_somewhere_is_not_told(tmp_path):
  code = "<pre>x[a][b]</pre><code>y[a][b]</code> shape [B K][0]"
  links = '<a href="b.html?x#%CE%BA">b</a><a href="#">a</a><a href=".">a</a>'
  write(tmp_path, a=code + links, b='<h2 id="κ">κ</h2>', index="")
  assert SITE.broken(tmp_path) == []


def test_an_equation_is_mathml_and_a_wrong_one_is_told(tmp_path):
  good = r'<span class="arithmatex">\(\beta &lt; \frac{1}{2}\)</span>'
  write(tmp_path, a=good, b=r'<div class="arithmatex">\[\frac{1}{\]</div>')
  (wrong,) = SITE.finish(tmp_path)
  assert wrong.startswith("b.html: equation ")
  drawn = (tmp_path / "a.html").read_text(encoding="utf-8")
  assert re.fullmatch(r"<math>.*<mfrac>.*</math>", drawn)
  assert "&lt;" in drawn


def test_links_to_the_repository_lead_to_its_pages():
  linked = {}
  text = "[a](../CONTRIBUTING.md#style) [b](../nash_jax/train.py) [c](judges.md) `[d](none.md)`"
  assert SITE.rewritten(text, "docs/data.md", linked) == (
    "[a](contributing.md#style) [b](source/nash_jax/train.py.md) [c](judges.md) `[d](none.md)`"
  )
  assert [*linked] == ["CONTRIBUTING.md", "nash_jax/train.py", "docs/judges.md"]


def test_the_navigation_has_every_page_and_no_other(tmp_path):
  for name in ("a", "b", "source/c"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / f"{name}.md").touch()
  nav = [{"A": [{"B": "a.md"}, "none.md"]}]
  assert SITE.left_out(tmp_path, nav) == [
    "zensical.toml: no page none.md", "b.md: expected in nav of zensical.toml",
  ]  # fmt: skip


@pytest.fixture
def repository(tmp_path, monkeypatch):
  """A small one with the settings of this one: a page, a module, no notebook."""
  monkeypatch.setattr(SITE, "ROOT", tmp_path)
  monkeypatch.setattr(SITE, "BUILD", tmp_path / "build")
  for name in ("docs/api", "colab", "nash_jax"):
    (tmp_path / name).mkdir(parents=True)
  config = (ROOT / "zensical.toml").read_text(encoding="utf-8")
  nav = 'nav = ["index.md", "api/index.md"]\n'
  config = re.sub(r"^nav = \[.*?^\]\n", nav, config, flags=re.DOTALL | re.MULTILINE)
  (tmp_path / "zensical.toml").write_text(config, encoding="utf-8")
  for name in ("stylesheets", "javascripts"):
    shutil.copytree(ROOT / "docs" / name, tmp_path / "docs" / name)
  (tmp_path / "nash_jax" / "__init__.py").touch()
  (tmp_path / "nash_jax" / "m.py").write_text('def f(x: int) -> int:\n  """Returns x."""\n')
  (tmp_path / "docs" / "api" / "index.md").write_text("# API\n\n::: nash_jax.m\n")
  return tmp_path


PAGE = "# Home\n\n## The κ, of [a] run\n\n[`f`][nash_jax.m.f] [k](#the-κ-of-a-run) $x^2$ {}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
  "mistake",
  [
    "", "[x](api/none.md)", "[x](../nash_jax/none.py)", "[x](api/index.md#none)",
    "[x][nash_jax.m.none]", r"$\frac{1}{$", "\n\n::: nash_jax.none\n",
  ],
)  # fmt: skip
def test_a_build_fails_by_each_mistake_and_by_nothing_else(mistake, repository, capfd):
  (repository / "docs" / "index.md").write_text(PAGE.format(mistake), encoding="utf-8")
  failed = SITE.main()
  told = "".join(capfd.readouterr())
  assert failed == bool(mistake), told
  if not mistake:
    home = (repository / "build" / "site" / "index.html").read_text(encoding="utf-8")
    assert 'href="api/index.html#nash_jax.m.f"' in home
    assert "<msup><mi>x</mi><mn>2</mn></msup>" in home
