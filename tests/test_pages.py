"""What the pages show: the numbers of result files, and links and files that are there."""

import re

from conftest import ROOT
from results.readme import PAGES, draw_ast, pages, tables


def test_pages_show_the_results():
    """Would catch a number in a page's tables that no result file holds, and one that was measured again."""
    shown = pages()
    for page, text in shown.items():
        assert page.read_text() == text, f"run results/readme.py: {page} has changed"
    assert sum(text.count("<!-- end -->") for text in shown.values()) == len(tables())


def test_the_picture_of_training_can_be_drawn(tmp_path):
    draw_ast(tmp_path / "ast.png")
    assert (tmp_path / "ast.png").stat().st_size > 10_000


def test_links_lead_somewhere():
    """Would catch a picture or a section that has moved."""
    for page in PAGES:
        links = re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text())
        assert links
        for path, section in links:
            there = page.parent / path if path else page
            assert there.exists(), f"{page} shows {path}"
            titles = [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-")
                      for title in re.findall("^#+ (.*)", there.read_text(), re.M)] if section else [""]
            assert (section or "") in titles, f"{page} shows {path}#{section}"


def test_files_that_pages_name_exist():
    """Would catch a number whose source is not there."""
    for page in PAGES:
        names = set(re.findall(r"results/[\w./*-]+\.(?:json|py|sh)", page.read_text()))
        assert len(names) > 5
        for name in names:
            assert list(ROOT.glob(name)), f"{page} names {name}"
