"""The page: the writeup and the code side by side, in one file that needs nothing else.

    pip install markdown pygments latex2mathml
    python3 dev/page.py              writes doc/page/index.html
    python3 dev/page.py --check      only checks the numbers of equations; needs no package

It reads doc/writeup.md, doc/modify.md and train_gpt2_mla.c as they are. What links them are their
forms: equations with a \\tag; comments that cite numbers such as (23a) or (20, 23); the banners of
the program's parts and chapters; functions that begin at a line's start; the writeup's numbered
sections, and its first table, which says what belongs to which chapter. dev/page/ has the page's
style and script, which are put into the file.

--check, which every build does too, goes both ways: a number that is cited exists, and a number
that the table gives to a chapter is cited in that chapter.

Exit status 1, and a line for each thing that is not understood or does not fit; then nothing is
written.
"""
import argparse
import csv
import html
import json
import os
import pathlib
import re
import sys
import urllib.parse

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = "doc/page/index.html"
NUMBER = r"\d{1,2}[a-f]?"
CITED = re.compile(r"(?<![\w)\]])\((%s(?:(?:, or | or |, | and | to )%s)*)\)" % (NUMBER, NUMBER))
FORMULA = r"(?<![\\$\w])\$(?!\s)([^$]+?)(?<!\s)\$(?!\w)"
IN_TEXT = re.compile(r"(?<![\w\]])\((%s|[qM]\d)\)" % NUMBER)
CLASS_BEYOND = 'class="beyond"'
# Where the living figures stand: behind an equation, or behind a figure of the text.
PLACES = {"cache": 'id="eq-24"', "absorption": "absorbed.svg", "results": "rank_loss.svg"}


class Forms(Exception):
    """What is not as expected in the texts, a line for each thing."""


def need(found, where, expected):
    """`found`, unless it is empty: then an error that names the place and what it lacks."""
    if not found:
        raise Forms(f"{where}: expected {expected}, found none")
    return found


class Code:
    """The program: its parts, chapters and functions, and the places that cite equations."""

    def __init__(self, source):
        self.source = source
        self.lines = source.splitlines()
        blank, self.comment = self.split(source)
        where = "train_gpt2_mla.c"
        self.parts = need([(i, *m.groups()) for i, s in enumerate(self.lines, 1)
                           if (m := re.match(r"// #{4,} PART (I+): (.+?) #{4,}$", s))],
                          where, 'banners "// #### PART I: TITLE ####"')
        self.chapters = need([(i, int(m[1]), m[2]) for i, s in enumerate(self.lines, 1)
                              if (m := re.match(r"// ={4,} (\d+)  (.+?) ={4,}$", s))],
                             where, 'banners "// ==== 1  TITLE ===="')
        self.functions = {}  # name -> first and last line of its definition
        rows = blank.splitlines()
        for m in re.finditer(r"^(?!typedef|struct|enum)[a-z_][\w \n*]*?\b(\w+)\([^;{}]*\)\s*\{",
                             blank, re.M):
            first = blank.count("\n", 0, m.start(1)) + 1
            last = blank.count("\n", 0, m.end()) + 1
            if rows[last - 1].rstrip().endswith("{"):  # else it ends in the line where it begins
                last = next((i for i in range(last, len(rows)) if rows[i - 1].startswith("}")),
                            len(rows))
            self.functions.setdefault(m[1], (first, last))
        need(self.functions, where, "functions that begin at a line's start")

    @staticmethod
    def split(source):
        """The source with its comments and strings blanked; for each line its comments alone."""
        form = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|' r"'(?:\\.|[^'\\\n])*'"
        blank, comment, end = [], [], 0
        for m in re.finditer(form, source, re.S):
            blanked = re.sub(r"[^\n]", " ", m[0])
            between = source[end:m.start()]
            blank += [between, blanked]
            comment += [re.sub(r"[^\n]", " ", between), m[0] if m[0][0] == "/" else blanked]
            end = m.end()
        return "".join(blank) + source[end:], "".join(comment).splitlines()

    def chapter_at(self, line):
        """The number of the chapter that has this line; 0 before the first."""
        return max(((i, n) for i, n, _ in self.chapters if i <= line), default=(0, 0))[1]

    def function_at(self, line):
        """The function that has this line, in its body or in the comment above it, or None. Under a
        heading, a comment that begins "// ---", it is the first that follows."""
        for name, (first, last) in self.functions.items():
            if first <= line <= last:
                return name
        block = self.block(line)
        heading = block and self.lines[block - 1].startswith("// --- ")
        name, first = min(((n, f) for n, (f, _) in self.functions.items() if f > line),
                          key=lambda at: at[1], default=(None, 0))
        if name and self.chapter_at(line) == self.chapter_at(first) and self.comment[line - 1]:
            if heading or all(self.block(i) for i in range(line, first)):
                return name
        return None

    def block(self, line):
        """Where the run of full-line comments that has this line begins; 0 outside of any."""
        while line and self.lines[line - 1].startswith("//"):
            line -= 1
            if not line or not self.lines[line - 1].startswith("//"):
                return line + 1
        return 0


class Texts:
    """The writeup's equations, sections and first table; with the changes' equations."""

    def __init__(self, writeup, modify):
        self.writeup, self.modify = writeup, modify
        tags = re.compile(r"\\tag\{([^}]+)\}")
        self.numbers = need(tags.findall(writeup), "doc/writeup.md", "equations with \\tag{1}")
        self.others = tags.findall(modify)
        self.sections = need([int(n) for n in re.findall(r"^## (\d+) ", writeup, re.M)],
                             "doc/writeup.md", 'numbered sections, "## 1 Title"')
        table = need(re.search(r"^\| in the program \| here \|\n\|[-|]+\|\n((?:\|.*\n)+)", writeup,
                               re.M), "doc/writeup.md", 'a table "| in the program | here |"')
        self.rows, part = [], None  # (part, chapter or None, numbers, sections)
        for row in table[1].splitlines():
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            if len(cells) != 2:
                raise Forms(f"doc/writeup.md: expected two cells in its first table, found {row}")
            left, right = cells
            if left.startswith("**"):
                part = left.strip("*").split(",")[0]
                continue
            chapter = re.match(r"\d+", left)
            numbers = self.expand(re.sub(r"[()]", "", right.split("section")[0]))
            numbers += [n for m in CITED.finditer(right) for n in self.expand(m[1])]
            self.rows.append((part, int(chapter[0]) if chapter else None, list(dict.fromkeys(
                numbers)), [int(n) for n in re.findall(r"section (\d+)", right)]))

    def expand(self, words):
        """The numbers of "20, 23" or "23a to 23f, or 8"; one that does not exist stays as it is."""
        numbers = []
        for first, last in re.findall(r"\b(%s)\b(?: to (%s)\b)?" % (NUMBER, NUMBER), words):
            if last and {first, last} <= set(self.numbers):
                a, b = self.numbers.index(first), self.numbers.index(last)
                numbers += self.numbers[a:b + 1]
            else:
                numbers += [first] + [last] * bool(last)
        return numbers


def citations(code, texts):
    """(line, number) of every citation in the program's comments, in order."""
    return [(i, n) for i, comment in enumerate(code.comment, 1)
            for m in CITED.finditer(comment) for n in texts.expand(m[1])]


def check(code, texts):
    """What does not fit between the numbers of the texts and those of the code, a line each."""
    wrong = [f"doc/writeup.md: equation ({n}) is there more than once"
             for n in sorted(set(texts.numbers)) if texts.numbers.count(n) > 1]
    cited = citations(code, texts)
    wrong += [f"train_gpt2_mla.c:{i}: cites ({n}), which no equation of the writeup has"
              for i, n in cited if n not in texts.numbers]
    for name, text in (("writeup.md", texts.writeup), ("modify.md", texts.modify)):
        prose = re.sub(r"\$\$.*?\$\$|^ {4}[^\n]*$|`[^`]*`|" + FORMULA,
                       lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S | re.M)
        wrong += [f"doc/{name}:{prose.count(chr(10), 0, m.start()) + 1}: cites ({m[1]}), "
                  "which no equation has"
                  for m in IN_TEXT.finditer(prose) if m[1] not in texts.numbers + texts.others]
    chapters = {n for _, n, _ in code.chapters}
    here = {(code.chapter_at(i), n) for i, n in cited}
    table = "the table at the beginning of doc/writeup.md"
    for _, chapter, numbers, sections in texts.rows:
        if chapter is not None and chapter not in chapters:
            wrong.append(f"{table}: the program has no chapter {chapter}")
        wrong += [f"{table}: no equation is ({n})" for n in numbers if n not in texts.numbers]
        wrong += [f"{table}: there is no section {n}" for n in sections if n not in texts.sections]
        wrong += [f"train_gpt2_mla.c: chapter {chapter} does not cite ({n}), which {table} says "
                  "is there" for n in numbers if chapter in chapters and (chapter, n) not in here]
    listed = {n for row in texts.rows for n in row[2]}
    wrong += [f"{table}: equation ({n}) is missing" for n in texts.numbers if n not in listed]
    return wrong


# --- The text

def pieces(latex):
    """An equation cut, outside of all brackets, at wide spaces and before each = of a chain, so
    that it can wrap: a list of chains."""
    depth, start, chains = 0, 0, [[]]
    for m in re.finditer(r"\\left\b|\\right\b|\\q?quad\b|\\.|[{}()\[\]=]", latex):
        if m[0] in ("{", "\\left", "(", "["):
            depth += 1
        elif m[0] in ("}", "\\right", ")", "]"):
            depth -= 1
        elif depth == 0 and (m[0] == "=" and "=" in latex[start:m.start()] or m[0].endswith("quad")
                             and not latex[:m.start()].endswith(":}")):
            chains[-1].append(latex[start:m.start()])
            start = m.start() if m[0] == "=" else m.end()
            if m[0] != "=":
                chains.append([])
    chains[-1].append(latex[start:])
    return [[piece.strip() for piece in chain] for chain in chains]


def mathml(latex, display="inline"):
    """MathML of a formula, which browsers draw by themselves."""
    from latex2mathml.converter import convert
    try:
        math = convert(latex, display=display)
    except Exception as error:
        raise Forms(f"formula not understood: {latex}: {error!r}") from error
    if "\\" in math:
        raise Forms(f"formula not understood: {latex}")
    return math.replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "")


class Text:
    """The Markdown files as HTML."""

    def __init__(self, code, texts):
        self.code, self.texts = code, texts
        self.mentions = {}  # function -> [(id of a mention, heading above it)]
        self.contents = []  # (level, id, title, beyond Part I)
        self.places = {n: self.places_of(n) for n in texts.numbers}
        beyond = [row for row in texts.rows if row[0] != "Part I"]
        self.beyond = {n for row in beyond for n in row[3]}

    def places_of(self, number):
        """(label, anchor, line) of what cites an equation: functions, and comments outside."""
        found = {}
        for line, n in citations(self.code, self.texts):
            chapter, name = self.code.chapter_at(line), self.code.function_at(line)
            if n == number and chapter:
                label, anchor = ((name, f"f-{name}") if name else
                                 (f"chapter {chapter}, line {line}", f"L{line}"))
                found.setdefault(label, (label, anchor, line))
        return sorted(found.values(), key=lambda place: not place[1].startswith("f-"))

    def equation(self, match):
        """A display formula; a number becomes a list of the functions that compute it."""
        latex = " ".join(match[1].split())
        tag = re.search(r"\\tag\{([^}]+)\}", latex)
        parts = pieces(latex.replace(tag[0], "") if tag else latex)
        said = '<div class="parts">%s</div>' % "".join(
            "<span>%s</span>" % "".join(mathml(p, "block") for p in chain) for chain in parts)
        if not tag:
            return f'<div class="eq">{said}</div>'
        n, rows = tag[1], ""
        for label, anchor, _ in self.places.get(n, []):
            name = f"<code>{label}</code>" if anchor.startswith("f-") else label
            rows += f'<li><a href="#{anchor}">{name}</a></li>'
        rows += f'<li><a href="#eq-{n}">link to ({n})</a></li>'
        return (f'<div class="eq" id="eq-{n}">{said}<details class="number">'
                f'<summary>({n})</summary><ul>{rows}</ul></details></div>')

    def convert(self, source, name, down):
        """The HTML of a file; headings go `down` levels, ids of sections begin with `name`."""
        import markdown
        from markdown.inlinepatterns import InlineProcessor
        from markdown.preprocessors import Preprocessor
        text = self

        class Displays(Preprocessor):
            def run(self, lines):
                def store(m):
                    return "\n\n%s\n\n" % self.md.htmlStash.store(text.equation(m))
                return re.sub(r"^\$\$(.+?)\$\$$", store, "\n".join(lines),
                              flags=re.M | re.S).split("\n")

        class Formula(InlineProcessor):
            def handleMatch(self, m, data):
                return self.md.htmlStash.store(mathml(" ".join(m[1].split()))), *m.span()

        class Citation(InlineProcessor):
            def handleMatch(self, m, data):
                link = f'(<a class="cite" href="#eq-{m[1]}">{m[1]}</a>)'
                return self.md.htmlStash.store(link), *m.span()

        source = re.sub(r"<!--.*?-->", "", source, flags=re.S)
        source = re.sub(r"^((?!- |\d+\. |[ |]).+)\n(?=- )", r"\1\n\n", source, flags=re.M)
        md = markdown.Markdown(extensions=["tables", "sane_lists"])
        md.preprocessors.register(Displays(md), "displays", 25)
        md.inlinePatterns.register(Formula(FORMULA, md), "formula", 185)
        md.inlinePatterns.register(Citation(IN_TEXT.pattern, md), "citation", 100)
        body = md.convert(source)
        body = re.sub(r"<(/?)h(\d)>", lambda m: f"<{m[1]}h{int(m[2]) + down}>", body)
        body = re.sub(r"<thead>\s*<tr>(\s*<th[^>]*></th>)+\s*</tr>\s*</thead>", "", body)
        body = re.sub(r"<th([^>]*)></th>", r"<td\1></td>", body)
        body = re.sub(r"<table>.*?</table>", r'<div class="scrolls">\g<0></div>', body, flags=re.S)
        body = re.sub(r'href="(writeup|modify)\.md"', r'href="#\1"', body)
        body = re.sub(r"<p>\s*(<img[^>]*>)\s*</p>(?:\s*<p><em>((?:(?!</p>).)*)</em></p>)?",
                      self.figure, body, flags=re.S)
        return self.sections(body, name, down)

    def figure(self, match):
        """A figure, put into the page, and its caption, a paragraph in italics below it."""
        source, alt = (re.search(rf'{key}="([^"]*)"', match[1])[1] for key in ("src", "alt"))
        path = ROOT / "doc" / source
        if not path.is_file():
            raise Forms(f"doc/{source}: a figure that the text shows is not there")
        svg = path.read_text()
        svg = re.sub(r"<metadata>.*?</metadata>|<\?xml.*?\?>|<!DOCTYPE.*?>", "", svg, flags=re.S)
        data = urllib.parse.quote(re.sub(r"\s+", " ", svg), safe=" =:/'(),;.<>{}")
        caption = f"<figcaption>{match[2]}</figcaption>" if match[2] else ""
        return (f'<figure><!--{os.path.basename(source)}--><img src="data:image/svg+xml,{data}" '
                f'alt="{" ".join(alt.split())}">{caption}</figure>')

    def sections(self, body, name, down):
        """Ids for headings, a section for each of the second level, and links to functions."""
        seen, out, here, title = set(), [], name, name
        for part in re.split(r"(<h[1-5]>.*?</h[1-5]>)", body, flags=re.S):
            m = re.match(r"<h(\d)>(.*)</h\d>", part, re.S)
            if not m:
                out.append(self.link_functions(part, title))
                continue
            level, words = int(m[1]) - down, html.unescape(re.sub(r"<[^>]+>", "", m[2]))
            numbered = re.match(r"(\d+) ", words)
            slug = re.sub(r"\W+", "-", words.lower()).strip("-")
            if level == 1:
                here = name
            else:
                here = f"section-{numbered[1]}" if numbered else f"{name}-{slug}"
            while here in seen:
                here += "-"
            seen.add(here)
            beyond = name == "modify" or bool(numbered and int(numbered[1]) in self.beyond)
            title = words
            if level <= 2:
                out.append("</section>" * bool(self.contents and seen != {here}))
                label = ' class="beyond"' if beyond else ""
                out.append(f'<section{label} aria-labelledby="{here}">')
                self.contents.append((level, here, words, beyond))
            out.append(f'<h{m[1]} id="{here}">{m[2]}</h{m[1]}>')
        return "".join(out) + "</section>"

    def link_functions(self, body, title):
        """Links from functions' names in the text, and a record of them for links back."""
        def link(m):
            name = m[1]
            if name not in self.code.functions:
                return m[0]
            found = self.mentions.setdefault(name, [])
            found.append((f"m-{name}-{len(found) + 1}", title))
            return f'<a id="{found[-1][0]}" href="#f-{name}"><code>{name}</code></a>'
        return re.sub(r'(?<!<pre>)(?<!">)<code>(\w+)(?:\(\))?</code>', link, body)


# --- The code

def code_html(code, mentions):
    """The program, a section for each chapter, a span with an id for each line."""
    from pygments.lexers import CLexer
    from pygments.token import Comment, Keyword, Number, String
    kinds = [(Comment.Preproc, "p"), (Comment.PreprocFile, "p"), (Comment, "c"), (Keyword, "k"),
             (String, "s"), (Number, "n")]
    lines, first_lines = [""], {first: name for name, (first, _) in code.functions.items()}

    def cite(m):
        return "(%s)" % re.sub(NUMBER, r'<a class="cite" href="#eq-\g<0>">\g<0></a>', m[1])

    def define(text, line):
        name = first_lines.get(line)
        places = mentions.get(name, [])
        if not name or not re.search(rf"\b{name}\b", text):
            return html.escape(text, quote=False)
        href = f"#{places[0][0]}" if places else f"#f-{name}"
        back = f'<a class="f" id="f-{name}" href="{href}">{name}</a>'
        return re.sub(rf"\b{name}\b", lambda m: back, html.escape(text, quote=False), count=1)

    run, held = None, []

    def flush():
        text = "".join(held)
        held.clear()
        for k, piece in enumerate(text.split("\n")):
            if k:
                lines.append("")
            if not piece:
                continue
            if run == "c":
                piece = CITED.sub(cite, html.escape(piece, quote=False))
            else:
                piece = define(piece, len(lines))
            lines[-1] += f'<span class="{run}">{piece}</span>' if run else piece

    for token, text in CLexer(stripnl=False).get_tokens(code.source):
        kind = next((c for t, c in kinds if token in t), None)
        if kind != run:
            flush()
            run = kind
        held.append(text)
    flush()

    starts = [(1, None, "HOW TO READ THIS FILE", True)]  # line, number, title, in Part I
    part = "I"
    for line, number, title in code.chapters:
        banner = [(i, roman) for i, roman, _ in code.parts if starts[-1][0] < i <= line]
        part = banner[-1][1] if banner else part
        starts.append((banner[0][0] if banner else line, number, title, part == "I"))
    out = []
    for (first, number, title, keep), end in zip(starts, [s[0] for s in starts[1:]]
                                                 + [len(code.lines) + 1]):
        name = f"Chapter {number}: {title.capitalize()}" if number else title.capitalize()
        anchor = f"chapter-{number}" if number else "code-head"
        body = "".join(f'<span class="l" id="L{i}">{lines[i - 1]}\n</span>'
                       for i in range(first, end))
        out.append(f'<section id="{anchor}"{"" if keep else " " + CLASS_BEYOND} '
                   f'data-name="{html.escape(name)}" style="--first:{first - 1}">'
                   f'<h2 class="unseen">{html.escape(name)}</h2>'
                   f"<pre><code>{body}</code></pre></section>")
    return "".join(out)


# --- The whole

def following(code, texts, text, body):
    """(id in the text, line of the code) of what belongs together, in the text's order: equations
    and their first citation in their chapter, sections, and the first function that a paragraph
    names."""
    beside, banner = {}, {n: i for i, n, _ in code.chapters}
    for _, chapter, numbers, sections in texts.rows:
        for n in numbers:
            lines = [line for *_, line in text.places[n] if code.chapter_at(line) == chapter]
            if lines:
                beside[f"eq-{n}"] = min(lines)
        if chapter:
            beside.update((f"section-{n}", banner[chapter]) for n in sections)
    pairs, section, block = [], None, None
    for m in re.finditer(r'id="((?:eq|section)-\w+|m-(\w+)-\d+)"', body):
        anchor, line = m[1], beside.get(m[1])
        if m[2]:
            start = max(body.rfind(tag, 0, m.start()) for tag in ("<p>", "<li>", "<tr>"))
            line, block = code.functions[m[2]][0] if start != block else None, start
        elif anchor.startswith("section"):
            section = anchor
        elif line and section:  # a section that has equations begins where the first of them is
            pairs = [pair for pair in pairs if pair[0] != section] + [(section, line)]
            section = None
        if line:
            pairs.append((anchor, line))
    return pairs


def symbols(texts):
    """Symbol -> its meaning and, for vectors and matrices, its shape: the tables of section 2."""
    section = re.search(r"^## \d+ Notation.*?(?=^## )", texts.writeup, re.M | re.S)
    rows = [[c.strip() for c in row.strip("|").split("|")] for row in
            re.findall(r"^\|.*\|$", need(section, "doc/writeup.md", "a section Notation")[0], re.M)]
    found = {}

    def plain(latex):
        latex = re.sub(r"\\tilde (\w)", r"\1~", latex.strip("$ "))
        return re.sub(r"\\mathrm|[\\{}_` ]|,g\b", "", latex)

    def said(words):
        words = re.sub(FORMULA, lambda m: re.sub(r"\\mathrm|[{}]|,g\b", "", m[1]), words)
        return words.replace("`", "")
    for row in rows:
        if len(row) == 4:
            for name, meaning in (row[:2], row[2:]):
                if re.match(r"\w", name):
                    found[plain(name.split(" = ")[0])] = said(f"{name}: {meaning}")
        elif len(row) == 3 and row[0].startswith("$"):
            names, shapes = row[0].split(", "), re.split(r", (?![^(]*\))", row[1])
            for k, name in enumerate(names):
                shape = shapes[k] if len(shapes) == len(names) else row[1]
                found[plain(name)] = said(f"{shape}: {row[2]}")
    return need(found, "doc/writeup.md, section Notation", "tables of symbols")


def results():
    """Experiment -> its runs, [row, seed, loss, parameters, cached floats, learning rate]."""
    found = {}
    for path in sorted((ROOT / "dev/results").glob("*.csv")):
        with open(path, newline="") as f:
            found[path.stem] = [[r["row"], int(r["seed"]), float(r["val_loss"]),
                                 int(r["parameters"]), int(r["cache"]), r["learning_rate"]]
                                for r in csv.DictReader(f)]
    return need(found, "dev/results", "CSV files of experiments")


def place_figures(body):
    """The text with empty places for the living figures, which the script fills."""
    for name, mark in PLACES.items():
        at = body.find(mark)
        end = body.find("</details></div>" if mark.startswith("id=") else "</figure>", at)
        if at < 0 or end < 0:
            raise Forms(f"doc/writeup.md: no {mark} for the figure of {name} to stand behind")
        end = body.index(">", body.index("/div" if mark.startswith("id=") else "/figure", end)) + 1
        body = body[:end] + f'<div class="living" id="living-{name}"></div>' + body[end:]
    return body


def contents(code, text):
    """Both tables of contents."""
    rows = "".join(f'<li{" " + CLASS_BEYOND if beyond else ""}><a href="#{anchor}">'
                   f"{html.escape(title)}</a></li>" for _, anchor, title, beyond in text.contents)
    chapters, part = "", iter([(i, f"Part {r}: {t.capitalize()}") for i, r, t in code.parts])
    following_part = next(part)
    beyond = ""
    for line, number, title in code.chapters:
        if following_part and following_part[0] < line:
            beyond = "" if following_part[1].startswith("Part I:") else " " + CLASS_BEYOND
            chapters += f'<li{beyond}><strong>{html.escape(following_part[1])}</strong></li>'
            following_part = next(part, None)
        names = [n for n, (f, _) in code.functions.items() if code.chapter_at(f) == number]
        chapters += (f'<li{beyond}><a href="#chapter-{number}">{number} {title.capitalize()}</a>'
                     "<details><summary>functions</summary>%s</details></li>"
                     % ", ".join(f'<a href="#f-{n}"><code>{n}</code></a>' for n in names))
    return (f'<div><h2>Text</h2><ul>{rows}</ul></div><div><h2>Code</h2><ul>{chapters}</ul></div>')


def build(code, texts):
    """The page."""
    text = Text(code, texts)
    body = text.convert(texts.writeup, "writeup", 0) + text.convert(texts.modify, "modify", 1)
    body = place_figures(body)
    notation = need(re.search(r'<h2 id="section-\d+">\d+ Notation.*?</section>', body, re.S),
                    "doc/writeup.md", "a section Notation")[0]
    tables = re.findall(r'<div class="scrolls">.*?</div>', notation, re.S)
    data = {"follow": following(code, texts, text, body), "symbols": symbols(texts),
            "results": results(), "mentions": text.mentions}
    files = {name: (ROOT / "dev/page" / name).read_text()
             for name in ("page.html", "page.css", "page.js")}
    fill = {"css": files["page.css"], "js": files["page.js"], "text": body,
            "code": code_html(code, text.mentions), "contents": contents(code, text),
            "notation": "".join(tables),
            "data": json.dumps(data, ensure_ascii=False).replace("</", "<\\/")}
    return re.sub(r"\{\{(\w+)\}\}", lambda m: fill[m[1]], files["page.html"])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only check the equations' numbers")
    options = parser.parse_args()
    try:
        code = Code((ROOT / "train_gpt2_mla.c").read_text())
        texts = Texts((ROOT / "doc/writeup.md").read_text(), (ROOT / "doc/modify.md").read_text())
        wrong = check(code, texts)
        if wrong:
            raise Forms("\n".join(wrong))
        cited = citations(code, texts)
        print(f"{len(texts.numbers)} equations, {len({n for _, n in cited})} of them cited in "
              f"{len(cited)} places: all fit")
        if options.check:
            return
        page = build(code, texts)
    except (Forms, OSError) as error:
        sys.exit("\n".join(f"error: {line}" for line in str(error).splitlines()))
    except ModuleNotFoundError as error:
        sys.exit(f"error: Python's package {error.name} is missing: "
                 "pip install markdown pygments latex2mathml")
    out = ROOT / OUT
    out.parent.mkdir(exist_ok=True)
    out.write_text(page)
    print(f"{OUT}: {len(page.encode()) / 1e6:.2f} MB, {len(code.functions)} functions")


if __name__ == "__main__":
    main()
