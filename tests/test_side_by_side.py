"""docs/side_by_side.html: it is what its command writes, it holds the scripts to the letter, and it works in a browser."""

import re
import shutil
import tomllib
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import pytest

for package in "pygments", "latex2mathml":
    pytest.importorskip(package, reason="the page is made with pygments and latex2mathml: pip install pygments latex2mathml")

DOCS = Path(__file__).resolve().parent.parent / "docs"
NAMES = {"a": "grpo", "b": "gcpo", "c": "stepwise_grpo"}


@pytest.fixture(scope="module")
def side_by_side():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)
        import side_by_side

        yield side_by_side


class Page(HTMLParser):
    """The text of every cell with a line, by its id; of every section; and all attributes."""

    def __init__(self, html):
        super().__init__()
        self.cells, self.sections, self.attributes, self.cell, self.marks = {}, {}, [], None, {}
        self.in_code = self.in_mark = False
        self.feed(html)

    def handle_starttag(self, tag, pairs):
        attributes = dict(pairs)
        self.attributes += [(tag, *pair) for pair in pairs]
        if tag == "section":
            self.section, self.cell = attributes["id"], None
        if tag == "td":
            self.cell = attributes.get("id")
            if self.cell:
                self.cells[self.cell], self.marks[self.cell] = "", []
                self.sections.setdefault(self.section, []).append(self.cell)
        self.in_code |= tag == "code" and self.cell is not None
        self.in_mark |= tag == "mark"
        if tag == "mark" and self.in_code:
            self.marks[self.cell].append((attributes["class"], ""))

    def handle_endtag(self, tag):
        self.in_code &= tag != "code"
        self.in_mark &= tag != "mark"

    def handle_data(self, text):
        if self.in_code:
            self.cells[self.cell] += text
            if self.in_mark:
                self.marks[self.cell][-1] = (self.marks[self.cell][-1][0], self.marks[self.cell][-1][1] + text)


@pytest.fixture(scope="module")
def page(side_by_side):
    return Page(side_by_side.fresh())


def test_the_page_is_up_to_date_and_small(side_by_side):
    for package, pinned in re.findall(r"(\w+)==([\d.]+\d)", side_by_side.__doc__):
        if version(package) != pinned:
            pytest.skip(f"the page is compared byte by byte, which needs {package} {pinned}; {version(package)} is installed")
    assert side_by_side.PAGE.read_text(encoding="utf-8") == side_by_side.fresh(), "run python docs/side_by_side.py"
    assert side_by_side.PAGE.stat().st_size <= 500_000


def test_the_page_holds_every_line_of_the_scripts_once_and_to_the_letter(page):
    for name in NAMES.values():
        lines = (DOCS.parent / f"{name}.py").read_text(encoding="utf-8").splitlines()
        shown = {int(cell.split("-L")[1]): text for cell, text in page.cells.items() if cell.startswith(f"{name}-L")}
        assert shown == {n: line for n, line in enumerate(lines, 1) if n in shown} and list(shown) == sorted(shown)
        assert not [line for n, line in enumerate(lines, 1) if line.strip() and n not in shown]
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_the_page_asks_nothing_of_anywhere(page, side_by_side):
    assert {value[0] for tag, name, value in page.attributes if name in ("href", "src") and tag != "link"} == {"#"}
    assert [value for tag, name, value in page.attributes if tag == "link" and name == "href"] == ["data:,"]
    for word in ("url(", "@import", "fetch(", "import(", "XMLHttpRequest", "<iframe", "<img"):
        assert word not in (DOCS / "side_by_side.template.html").read_text()
    targets = {value for _, name, value in page.attributes if name == "id"}
    assert {value[1:] for tag, name, value in page.attributes if tag == "a" and name == "href"} <= targets


def test_notes_are_about_code_that_exists(page, side_by_side):
    notes = tomllib.loads((DOCS / "side_by_side.toml").read_text(encoding="utf-8"))
    for step in notes.pop("reading"):
        assert {side_by_side.identifier(part) for part in step["sections"]} <= set(page.sections), step
    for part, note in notes.items():
        code = "\n".join(page.cells[cell] for cell in page.sections[side_by_side.identifier(part)])
        for _, name in note.get("names", []):
            assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", code), (part, name)
        for latex, source in note.get("equations", []):
            assert re.search("GRPO|GCPO|arXiv", source) and "\n" not in latex


def test_every_phase_of_the_loop_has_lines_of_every_script(page):
    for phase in "roll-out judge credit update".split():
        assert {cell.split("-L")[0] for cell in page.sections[phase]} == set(NAMES.values()), phase


COMMON = '"""Doc."""\n\nimport torch\n\n\ndef loss(ratio):\n    return ratio.mean()\n\n\nif __name__ == "__main__":\n    go()\n'
SOURCES = {
    "a": COMMON,
    "b": COMMON.replace("def loss", "def chunks(x):\n    return x\n\n\ndef loss").replace("ratio.mean()", "ratio.sum() / 2"),
    "c": COMMON.replace("    return ratio", "    ratio = ratio * 3\n    return ratio"),
}


def test_functions_are_aligned_by_name_and_words_marked(side_by_side):
    html = side_by_side.build(SOURCES, {"reading": []})  # without any note and without any phase in the loop
    small = Page(html)
    assert list(small.sections) == ["docstring", "imports", "chunks", "loss", "set-up"]
    assert small.sections["chunks"] == ["gcpo-L6", "gcpo-L7"]
    rows = [re.findall(r"id=(\w+-L\d+)", row) for row in html.split("<section id=loss")[1].split("</table>")[0].split("<tr")]
    assert [row for row in rows if row] == [
        ["grpo-L6", "gcpo-L10", "stepwise_grpo-L6"],
        ["stepwise_grpo-L7"],
        ["grpo-L7", "gcpo-L11", "stepwise_grpo-L8"],
    ]
    assert small.marks["grpo-L7"] == [("db", "mean")]
    assert small.marks["gcpo-L11"] == [("da dc", "sum"), ("da dc", "/ 2")]
    assert small.marks["stepwise_grpo-L8"] == [("db", "mean")]
    assert not any(small.marks[cell] for part in ("docstring", "imports", "set-up") for cell in small.sections[part])


def test_alignment_pairs_like_lines_and_keeps_their_order(side_by_side):
    columns = [["def f(x):", "a = one(x)", "", "return a"], ["def g(y):", "b = 5", "a = two(x)", "return a + b"], []]
    assert side_by_side.align(columns) == [(0, 0, None), (None, 1, None), (1, 2, None), (2, None, None), (3, 3, None)]
    assert side_by_side.align([[], ["x"], ["x"]]) == [(None, 0, 0)]
    assert side_by_side.merged([["Args", "a", "loss", "run"], ["Args", "b", "loss", "c", "run"], ["Args", "d"]]) == [
        *["Args", "a", "b", "loss", "c", "run", "d"]
    ]


@pytest.fixture(scope="module")
def chromium(side_by_side, tmp_path_factory):
    missing = [program for program in ("chromium", "chromedriver") if not shutil.which(program)]
    if missing:
        pytest.skip(f"the page is tried in a browser, which needs {' and '.join(missing)} (Debian: chromium, chromium-driver)")
    pytest.importorskip("selenium", reason="the page is tried in a browser: pip install selenium")
    with side_by_side.chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def browser(chromium):
    """The page just opened from the file system; afterwards the console is empty and nothing was requested."""
    chromium.get("about:blank")
    chromium.get((DOCS / "side_by_side.html").as_uri())
    yield chromium
    assert chromium.get_log("browser") == []
    assert chromium.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)") == []


def find(browser, selector):
    return browser.find_element("css selector", selector)


def press(browser, key):
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(key).perform()


def shown(browser, selector):
    script = "return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility()).map(e => e.id)"
    return set(browser.execute_script(script, selector))


def background(browser, selector):
    return find(browser, selector).value_of_css_property("background-color")


def test_columns_switch(browser):
    assert {cell.split("-L")[0] for cell in shown(browser, "#update td[id]")} == set(NAMES.values())
    assert not find(browser, "#group_advantages tr.diff").get_attribute("hidden")  # which Stepwise lacks
    for letters in "ab", "ac", "bc":
        find(browser, f"input[value={letters}]").click()
        assert {cell.split("-L")[0] for cell in shown(browser, "#update td[id]")} == {NAMES[letter] for letter in letters}
        headings = [th.text for th in browser.find_elements("css selector", "#update th") if th.is_displayed()]
        assert headings == [f"{NAMES[letter]}.py" for letter in letters]
        assert find(browser, "#adaptive_chunks").is_displayed() == ("b" in letters)
        assert find(browser, "#gains").is_displayed() == ("c" in letters)
        (hidden,) = set("abc") - set(letters)
        assert {background(browser, f"td.{letters[0]} mark.d{letters[1]}")} != {"rgba(0, 0, 0, 0)"}
        only = browser.find_elements("css selector", f"td.{letters[0]} mark[class=d{hidden}]")  # differs from the hidden one alone
        assert {mark.value_of_css_property("background-color") for mark in only} <= {"rgba(0, 0, 0, 0)"}
    find(browser, "input[value=ab]").click()
    assert "the same in both" in find(browser, "#group_advantages .head").text
    find(browser, "input[value=abc]").click()
    assert "the same" not in find(browser, "#group_advantages .head").text


def test_columns_switch_by_keyboard(browser):
    browser.execute_script("document.querySelector('input[value=abc]').focus()")
    press(browser, "\ue015")  # arrow down
    assert {cell.split("-L")[0] for cell in shown(browser, "#update td[id]")} == {"grpo", "gcpo"}


def test_same_lines_fold_away_and_open_again(browser):
    before = shown(browser, "#Args td[id]")
    button = find(browser, "#Args tr.fold button")
    assert button.get_attribute("aria-expanded") == "false"
    button.click()
    opened = shown(browser, "#Args td[id]")
    assert before < opened and button.get_attribute("aria-expanded") == "true"
    count = int(re.search(r"\d+", button.text)[0])
    assert len(opened - before) == 3 * count  # the same lines of three files
    press(browser, "\ue007")  # Enter, on the button that has the focus
    assert shown(browser, "#Args td[id]") == before
    everything = shown(browser, "td[id]")
    press(browser, "f")
    cells = browser.execute_script("return [...document.querySelectorAll('td[id]')].map(cell => cell.id)")
    assert everything < shown(browser, "td[id]") == set(cells)
    find(browser, "#fold").click()
    assert shown(browser, "td[id]") == everything


def test_keys_visit_every_difference_in_turn(browser):
    total = int(re.search(r"\d+", find(browser, "#status").text)[0])
    assert total > 10
    seen = []
    for _ in range(total):
        press(browser, "n")
        row = browser.switch_to.active_element
        top, bottom = browser.execute_script(
            "const box = arguments[0].getBoundingClientRect(); return [box.top, innerHeight - box.bottom]", row
        )
        assert "diff" in row.get_attribute("class") and top > 0 and bottom > 0
        seen.append(find(browser, "#status").text)
    assert len(set(seen)) == total and seen[0].startswith(f"Difference 1 of {total}")
    press(browser, "n")
    assert find(browser, "#status").text == seen[0]
    press(browser, "p")
    assert find(browser, "#status").text == seen[-1]
    find(browser, "#previous").click()
    assert find(browser, "#status").text == seen[-2]
    find(browser, "#next").click()
    assert find(browser, "#status").text == seen[-1]


def test_lines_can_be_linked_to(browser):
    find(browser, "#clipped_loss td a").click()
    assert re.search(r"#grpo-L\d+$", browser.current_url)
    folded = browser.execute_script("return document.querySelector('#Args tr.fold').inside[2].querySelector('.c').id")
    assert not find(browser, f"#{folded}").is_displayed()
    find(browser, "input[value=ab]").click()
    browser.execute_script("location.hash = arguments[0]", folded)
    assert find(browser, f"#{folded}").is_displayed()  # its column is back and its fold open
    browser.get("about:blank")
    browser.get((DOCS / "side_by_side.html").as_uri() + "#" + folded)
    assert find(browser, f"#{folded}").is_displayed()
    find(browser, "#reading + ol a").click()
    assert browser.current_url.endswith("#clipped_loss")


CONTRAST = """
const channel = c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
const light = text => {
  const [r, g, b] = text.match(/[\\d.]+/g).map(Number); return .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b); };
const ground = element => { for (; element; element = element.parentElement) {
  const colour = getComputedStyle(element).backgroundColor; if (!/, 0\\)$/.test(colour)) return colour; } };
let least = 21;
for (const element of document.querySelectorAll("p, figcaption, li, th, td a, td code, td i, mark, button, #status, label")) {
  const [low, high] = [light(getComputedStyle(element).color), light(ground(element))].sort((a, b) => a - b);
  least = Math.min(least, (high + .05) / (low + .05)); }
return least"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(browser, scheme):
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    (ground,) = {int(n) for n in re.findall(r"\d+", background(browser, "body"))[:1]}
    assert (ground < 60) == (scheme == "dark")
    assert browser.execute_script(CONTRAST) >= 4.5
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize("width", [1920, 1280, 1024])
def test_nothing_is_cut_off_or_needs_sideways_scrolling(browser, width):
    browser.set_window_size(width, 1000)
    assert browser.execute_script("return document.documentElement.scrollWidth - innerWidth") <= 0
    too_large = """return [...document.querySelectorAll(arguments[0])].filter(
        e => e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1).length"""
    parts = "td code, .note, .bar, .head" + ", figure" * (width >= 1280)  # on a narrow window a formula scrolls by itself
    assert browser.execute_script(too_large, parts) == 0
    browser.set_window_size(1280, 1000)


def test_a_screen_reader_gets_names_and_differences(browser):
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    found = [(node.get("role", {}).get("value"), node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    for role in "radio", "button", "table", "heading", "link":
        names = [name for r, name in found if r == role]
        assert names and all(names), role
    assert {("table", "clipped_loss"), ("columnheader", "gcpo.py"), ("status", "")} <= set(found)
    assert any(name.startswith("differs") for _, name in found)
    assert any(role == "MathMLMath" for role, _ in found)


def test_it_prints(browser):
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not find(browser, ".bar").is_displayed() and find(browser, "#update td[id]").is_displayed()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert len(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]) > 50_000
