"""Writes docs/side_by_side.html: the three scripts in columns, aligned by function and compared down to the word.

    pip install pygments==2.21.0 latex2mathml==3.81.1 selenium      # other versions of the first two may write other bytes
    python docs/side_by_side.py
    python docs/side_by_side.py --picture       # and side_by_side.png; needs chromium, chromium-driver and fonts-lmodern of Debian

The code comes from the scripts as they are, the equations from side_by_side.toml, looks and behaviour from
side_by_side.template.html. The same files give the same bytes.
"""

import ast
import re
import shutil
import sys
import tempfile
import tomllib
from collections import Counter
from difflib import SequenceMatcher
from functools import cache
from html import escape
from itertools import combinations, groupby
from pathlib import Path

from latex2mathml.converter import convert
from pygments.lexers import PythonLexer
from pygments.token import Comment, Keyword, Name, Number, Operator, String

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "side_by_side.html"
SCRIPTS = {"a": "grpo", "b": "gcpo", "c": "stepwise_grpo"}
PHASES = {  # of the run, and how the line starts that opens each; one that a script lacks stays part of the phase before it
    "begin": "    for iteration in ",
    "roll out": "        # Roll out",
    "judge": "        # Judge",
    "credit": "        # Credit",
    "update": "        # Update",
    "end": "        done = ",
}
COLOURS = {Keyword: "k", Operator.Word: "k", String: "s", Comment: "o", Number: "m"}  # classes of the template
COLOURS |= {Name.Function: "f", Name.Class: "f", Name.Decorator: "f"}


def parts(source, phases):
    """Line numbers, from 1, of each part of a script: docstring, imports, every class and function, the phases of the run."""
    lines, found, start = source.splitlines(), {}, 1
    for node in ast.parse(source).body:
        name = getattr(node, "name", None) or {ast.Expr: "docstring", ast.If: "set up"}.get(type(node), "imports")
        for number in range(start, node.end_lineno + 1):
            if isinstance(node, ast.If):
                name = next((phase for phase in phases if lines[number - 1].startswith(PHASES[phase])), name)
            found.setdefault(name, []).append(number)
        start = node.end_lineno + 1
    for numbers in found.values():
        while not lines[numbers[0] - 1].strip():
            del numbers[0]
        while not lines[numbers[-1] - 1].strip():
            del numbers[-1]
    return found


def merged(orders):
    """One order of all names: what only a later list has stands before the name that follows it there."""
    merged = list(orders[0])
    for order in orders[1:]:
        for i, name in enumerate(order):
            if name not in merged:
                place = next((merged.index(after) for after in order[i + 1 :] if after in merged), len(merged))
                merged.insert(place, name)
    return merged


@cache
def likeness(line, other):
    """From 0 to 1, how much two lines have in common; less than a half counts as nothing, and blank lines count little."""
    if line == other:
        return 1.0 if line.strip() else 0.1
    words, others = (Counter(re.findall(r"\w+", text)) for text in (line, other))
    alike = 2 * (words & others).total() / max(words.total() + others.total(), 1)
    return alike if alike >= 0.5 else 0.0


def align(columns):
    """Rows of an index (or None) into each column of lines, in order, so that the sum of likenesses in the rows is greatest.

    Columns are added one by one; a line is as like to a row as to the line in it that it is most like. First lines belong together.
    """
    rows = [(i,) for i in range(len(columns[0]))]
    for width, column in enumerate(columns[1:], 1):
        fit = [[max(likeness(columns[c][i], line) for c, i in enumerate(row) if i is not None) for line in column] for row in rows]
        if rows and column:
            fit[0][0] = max(fit[0][0], 0.5)
        best = [[0.0] * (len(column) + 1) for _ in range(len(rows) + 1)]  # of what is left from row i and line j on
        for i in reversed(range(len(rows))):
            for j in reversed(range(len(column))):
                pair = fit[i][j] + best[i + 1][j + 1] if fit[i][j] else 0
                best[i][j] = max(pair, best[i + 1][j], best[i][j + 1])
        i, j, aligned = 0, 0, []
        while i < len(rows) or j < len(column):
            if i < len(rows) and j < len(column) and fit[i][j] and best[i][j] == fit[i][j] + best[i + 1][j + 1]:
                aligned.append((*rows[i], j))
                i, j = i + 1, j + 1
            elif i < len(rows) and (j == len(column) or best[i][j] == best[i + 1][j]):
                aligned.append((*rows[i], None))
                i += 1
            else:
                aligned.append((*[None] * width, j))
                j += 1
        rows = aligned
    return rows


def identifier(part):
    return part.replace(" ", "-")


def words_of(source):
    """For each line its words, (colour, text): names, numbers, single signs and stretches of space."""
    lines = [[]]
    for kind, text in PythonLexer(stripnl=False).get_tokens(source):
        colour = next((colour for token, colour in COLOURS.items() if kind in token), "")
        for word in re.findall(r"\w+|\n|[^\S\n]+|[^\w\s]", text):
            if word == "\n":
                lines.append([])
            else:
                lines[-1].append((colour, word))
    return lines


def differing(words, others):
    """Indices of the words, spaces aside, that are not in the same order among the others."""
    mine = [i for i, (_, word) in enumerate(words) if word.strip()]
    theirs = [word for _, word in others if word.strip()]
    matcher = SequenceMatcher(None, [words[i][1] for i in mine], theirs, autojunk=False)
    same = {mine[i] for start, _, size in matcher.get_matching_blocks() for i in range(start, start + size)}
    return set(mine) - same


def code(words, others):
    """HTML of a line. Words that differ from the line of another column are marked with that column's letter."""
    lacking = {letter: differing(words, line) for letter, line in others.items()}
    marks = [" ".join(f"d{letter}" for letter, indices in lacking.items() if i in indices) for i in range(len(words))]
    for i in range(1, len(words) - 1):
        if not words[i][1].strip() and marks[i - 1] == marks[i + 1]:
            marks[i] = marks[i - 1]
    html = ""
    for mark, run in groupby(zip(marks, words), key=lambda pair: pair[0]):
        inner = ""
        for colour, same in groupby((word for _, word in run), key=lambda word: word[0]):
            text = escape("".join(text for _, text in same), quote=False)
            inner += f"<i class={colour}>{text}</i>" if colour and text.strip() else text
        html += f'<mark class="{mark}">{inner}</mark>' if mark else inner
    return html


def table_rows(part, scripts):
    """HTML of the aligned rows of a part. data-d of a row lists the pairs of columns, such as ab, that differ in it."""
    numbers = {letter: script["parts"].get(part, []) for letter, script in scripts.items()}
    columns = [[scripts[letter]["lines"][n - 1] for n in numbers[letter]] for letter in scripts]
    for row in align(columns):
        cells = {letter: numbers[letter][i] for letter, i in zip(scripts, row) if i is not None}
        text = {letter: scripts[letter]["lines"][n - 1] for letter, n in cells.items()}
        blank = not any(line.strip() for line in text.values())  # a blank line more or less is no difference within a part
        pairs = [
            one + other
            for one, other in combinations(scripts, 2)
            if text.get(one) != text.get(other) and not (blank and numbers[one] and numbers[other])
        ]
        html = ""
        for letter in scripts:
            if letter not in cells:
                html += f'<td class="{letter} {"gap" if numbers[letter] else "none"}">'
                continue
            n, name = cells[letter], SCRIPTS[letter]
            words = scripts[letter]["words"][n - 1]
            others = {o: scripts[o]["words"][cells[o] - 1] for o in cells if o != letter and text[o] != text[letter]}
            indent = len(text[letter]) - len(text[letter].lstrip())
            style = f" style=--i:{indent}" if indent else ""
            html += f"<td class={letter} id={name}-L{n}{style}><a href=#{name}-L{n}>{n}</a><code>{code(words, others)}</code>"
        yield f'<tr class=diff data-d="{" ".join(pairs)}">{html}' if pairs else f"<tr>{html}"


def math(latex, display="inline"):
    return convert(latex, display=display).replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "")


def note_html(note):
    """The box with a part's purpose, its equations as the papers write them, and the code's names in them."""
    html = f"<p>{escape(note['text'])}" if "text" in note else ""
    for latex, source in note.get("equations", []):
        html += f"<figure>{math(latex, 'block')}<figcaption>{escape(source)}</figcaption></figure>"
    if "names" in note:
        pairs = (f"<li>{math(symbol)} <span>is</span> <code>{escape(name)}</code>" for symbol, name in note["names"])
        html += f"<ul aria-label='Names in the code'>{''.join(pairs)}</ul>"
    return f"<div class=note>{html}</div>" if html else ""


def section_html(part, scripts, title, links, note):
    """HTML of a part: its title and links along the reading order, its note, and the table of its rows."""
    texts = [script["lines"][n - 1] for script in scripts.values() for n in script["parts"].get(part, [])]
    outdent = min(len(text) - len(text.lstrip()) for text in texts if text.strip())  # of the loop's body, to save width
    heads = ""
    for letter, script in scripts.items():
        absent = part not in script["parts"]
        heads += f'<th scope=col class="{letter}{" none" * absent}">{"not in " * absent}{SCRIPTS[letter]}.py'
    name, rows = identifier(part), "\n".join(table_rows(part, scripts))
    return f"""<section id={name}>
<div class=head><h2 id=h-{name}>{title}</h2>{links}<span class=verdict></span></div>
{note_html(note)}<table aria-labelledby=h-{name} style=--o:{outdent}><thead><tr>{heads}<tbody>
{rows}
</table></section>"""


def build(sources, notes):
    """The page, from {letter: source of the script} and what side_by_side.toml holds."""
    phases = [phase for phase, opens in PHASES.items() if all(f"\n{opens}" in source for source in sources.values())]
    scripts = {
        letter: {"lines": source.splitlines(), "words": words_of(source), "parts": parts(source, phases)}
        for letter, source in sources.items()
    }
    order = merged([list(script["parts"]) for script in scripts.values()])
    title = {part: escape(notes.get(part, {}).get("title", part)) for part in order}
    link = {part: f"<a href=#{identifier(part)}>{title[part]}</a>" for part in order}

    steps, reading = [], ""
    for number, step in enumerate(notes["reading"], 1):
        present = [part for part in step["sections"] if part in order]
        steps += [(part, f"{number}. {step['title']}") for part in present]
        reading += f"<li><b>{escape(step['title'])}</b>: {', '.join(link[part] for part in present)}. {escape(step['text'])}"
    links = {part: f"<a href=#reading>{step}</a>" for part, step in steps}
    for (part, _), (after, _) in zip(steps, steps[1:]):
        links[part] += f"<a href=#{identifier(after)}>read next: {title[after]} →</a>"

    page = (DOCS / "side_by_side.template.html").read_text(encoding="utf-8")
    page = page.replace("<!-- reading -->", reading).replace("<!-- contents -->", " · ".join(link.values()))
    sections = (section_html(part, scripts, title[part], links.get(part, ""), notes.get(part, {})) for part in order)
    return page.replace("<!-- sections -->", "\n".join(sections))


def fresh():
    """The page as the scripts are now."""
    sources = {letter: (DOCS.parent / f"{name}.py").read_text(encoding="utf-8") for letter, name in SCRIPTS.items()}
    return build(sources, tomllib.loads((DOCS / "side_by_side.toml").read_text(encoding="utf-8")))


def chromium(profile):
    """A Chromium without a window, 1,280 pixels wide, its profile in the given folder. Raises ImportError without selenium."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    quiet = "--no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-quic"
    look = "--headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1280,1000"
    for flag in [*quiet.split(), *look.split(), f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


if __name__ == "__main__":
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(fresh(), encoding="utf-8")
    temporary.replace(PAGE)
    if "--picture" in sys.argv:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, chromium(profile) as driver:
            driver.get(f"{PAGE.as_uri()}#credit")
            driver.save_screenshot(str(PAGE.with_suffix(".png")))
