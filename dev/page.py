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
that the table gives to a chapter, or to a file, is cited there.

Exit status 1, and a line for each thing that is not understood or does not fit; then nothing is
written.
"""
import argparse
import collections
import csv
import html
import itertools
import json
import math
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
# Which living figure stands behind an equation or behind a figure of the text.
LIVING = {"24": "cache", "absorbed.svg": "absorption", "rank_loss.svg": "results"}

# Of the program. `first`: the line where it begins, with its part's banner; `banner`: its own.
Chapter = collections.namedtuple("Chapter", "number title part beyond first banner")
# Of the writeup's first table: a chapter of the program, or a file beside it, or neither.
Row = collections.namedtuple("Row", "part chapter file numbers sections")


class Forms(Exception):
    """What is not as expected in the texts, a line for each thing."""


def need(found, where, expected):
    """`found`, unless it is empty: then an error that names the place and what it lacks."""
    if not found:
        raise Forms(f"{where}: expected {expected}, found none")
    return found


def read(name):
    """The text of a file of the repository."""
    try:
        return (ROOT / name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Forms(f"{name}: expected UTF-8, found {error.reason} at byte {error.start}") from None


def class_of(beyond):
    """The attribute of what "Part I only" hides."""
    return ' class="beyond"' if beyond else ""


class Code:
    """The program: its chapters, its functions, and its comments by lines."""

    def __init__(self, source):
        self.source = source
        self.lines = source.removesuffix("\n").split("\n")  # not at a form feed
        blank, self.comment = self.split(source)
        where = "train_gpt2_mla.c"
        self.chapters, part, first, beyond = [], None, None, False
        for i, line in enumerate(self.lines, 1):
            if m := re.match(r"// #{4,} PART (I+): (.+?) #{4,}$", line):
                part, first, beyond = f"Part {m[1]}: {m[2].capitalize()}", i, m[1] != "I"
            elif m := re.match(r"// ={4,} (\d+)  (.+?) ={4,}$", line):
                self.chapters.append(Chapter(int(m[1]), m[2].capitalize(), part, beyond,
                                             first or i, i))
                first = None
        need(part, where, 'banners "// #### PART I: TITLE ####"')
        need(self.chapters, where, 'banners "// ==== 1  TITLE ===="')
        self.functions = {}  # name -> first and last line of its definition
        rows = blank.split("\n")
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

        def blank(m):
            return re.sub(r"[^\n]", " ", m[0])
        comments = re.sub(form + r"|[^/\"']+|.", lambda m: m[0] if m[0][:2] in ("//", "/*")
                          else blank(m), source, flags=re.S)
        return re.sub(form, blank, source, flags=re.S), comments.split("\n")

    def chapter_at(self, line):
        """The number of the chapter that has this line; 0 before the first."""
        return max((c.number for c in self.chapters if c.banner <= line), default=0)

    def function_at(self, line):
        """The function that has this line, in its body or in the comment above it, or None. Under a
        heading, a comment that begins "// ---", it is the first that follows."""
        for name, (first, last) in self.functions.items():
            if first <= line <= last:
                return name
        first, name = min(((first, name) for name, (first, _) in self.functions.items()
                           if first > line), default=(0, None))
        if self.chapter_at(line) != self.chapter_at(first):
            return None
        is_comment = re.compile("//").match
        above = list(itertools.takewhile(is_comment, reversed(self.lines[:line])))
        heading = above and above[-1].startswith("// --- ")
        return name if heading or all(map(is_comment, self.lines[line - 1:first - 1])) else None


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
        self.rows, part = [], None
        for row in table[1].splitlines():
            cells = re.match(r"\|([^|]*)\|([^|]*)\|$", row)
            if not cells:
                raise Forms(f"doc/writeup.md: expected two cells in its first table, found {row}")
            left, right = map(str.strip, cells.groups())
            if left.startswith("**"):
                part = left.strip("*").split(",")[0]
                continue
            chapter, file = re.match(r"\d+", left), re.search(r"`(.+)`$", left)
            self.rows.append(Row(part, chapter and int(chapter[0]), file and file[1],
                                 self.expand(re.sub(r"section \d+|[()]", "", right)),
                                 [int(n) for n in re.findall(r"section (\d+)", right)]))

    def expand(self, words):
        """The numbers of "20, 23" or "23a to 23f, or 8"; one that does not exist stays as it is."""
        numbers = []
        for first, last in re.findall(r"\b(%s)\b(?: to (%s)\b)?" % (NUMBER, NUMBER), words):
            if last and {first, last} <= set(self.numbers):
                a, b = self.numbers.index(first), self.numbers.index(last)
                numbers += self.numbers[a:b + 1] or [f"{first} to {last}"]
            else:
                numbers += [first] + [last] * bool(last)
        return numbers


def citations(code, texts):
    """(line, number) of every citation in the program's comments, in order."""
    return [(i, n) for i, comment in enumerate(code.comment, 1)
            for m in CITED.finditer(comment) for n in texts.expand(m[1])]


def check(code, texts):
    """What does not fit between the numbers of the texts and those of the code, a line each."""
    once = [f"equation ({n})" for n in texts.numbers + texts.others]
    once += [f"section {n} of the writeup" for n in texts.sections]
    wrong = [f"the texts: {what} is there more than once"
             for what in sorted(set(once)) if once.count(what) > 1]
    cited = citations(code, texts)
    wrong += [f"train_gpt2_mla.c:{i}: cites ({n}), which no equation of the writeup has"
              for i, n in cited if n not in texts.numbers]
    for name, text in (("writeup.md", texts.writeup), ("modify.md", texts.modify)):
        prose = re.sub(r"\$\$.*?\$\$|^ {4}[^\n]*$|`[^`]*`|" + FORMULA,
                       lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S | re.M)
        wrong += [f"doc/{name}:{prose.count(chr(10), 0, m.start()) + 1}: cites ({m[1]}), "
                  "which no equation has"
                  for m in IN_TEXT.finditer(prose) if m[1] not in texts.numbers + texts.others]
    chapters = {c.number for c in code.chapters}
    here = {(code.chapter_at(i), n) for i, n in cited}
    table = "the table at the beginning of doc/writeup.md"
    for _, chapter, file, numbers, sections in texts.rows:
        wrong += [f"{table}: no equation is ({n})" for n in numbers if n not in texts.numbers]
        wrong += [f"{table}: there is no section {n}" for n in sections if n not in texts.sections]
        if chapter and chapter not in chapters:
            wrong.append(f"{table}: the program has no chapter {chapter}")
        elif chapter:
            wrong += [f"train_gpt2_mla.c: chapter {chapter} does not cite ({n}), which {table} "
                      "says is there" for n in numbers if (chapter, n) not in here]
        elif file and numbers:
            there = {n for m in CITED.finditer(read(file)) for n in texts.expand(m[1])}
            wrong += [f"{file}: does not cite ({n}), which {table} says is there"
                      for n in numbers if n not in there]
    listed = {n for row in texts.rows for n in row.numbers}
    wrong += [f"{table}: equation ({n}) is missing" for n in texts.numbers if n not in listed]
    return wrong


# --- The text

def pieces(latex):
    """A formula cut, outside of all brackets, at wide spaces and before each further = of a chain,
    so that it can wrap: a list of chains. No cut comes behind a word with a colon."""
    depth, start, chains = 0, 0, [[]]
    for m in re.finditer(r"\\q?quad\b|\\.|[{}()\[\]=]", latex):
        depth += (m[0] in "{([") - (m[0] in "})]")
        before = latex[start:m.start()]
        if depth == 0 and m[0] == "=" and "=" in before:
            chains[-1].append(before)
            start = m.start()
        elif depth == 0 and m[0].endswith("quad") and not before.endswith(":}"):
            chains[-1].append(before)
            chains.append([])
            start = m.end()
    chains[-1].append(latex[start:])
    return chains


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


class TextHtml:
    """The Markdown files as HTML."""

    def __init__(self, code, texts):
        self.code = code
        self.mentions = {}  # function -> [(id of a mention, heading above it)]
        self.contents = []  # (id, title, beyond Part I)
        self.beyond = {n for row in texts.rows if row.part != "Part I" for n in row.sections}
        self.places = {n: [] for n in texts.numbers}  # (label, anchor, line) of what cites it
        for line, n in citations(code, texts):
            chapter, name = code.chapter_at(line), code.function_at(line)
            label = name or f"chapter {chapter}, line {line}"
            if chapter and label not in [place[0] for place in self.places[n]]:
                self.places[n].append((label, f"f-{name}" if name else f"L{line}", line))

    def equation(self, match):
        """A display formula; a number becomes a list of the functions that compute it."""
        latex = " ".join(match[1].split())
        tag = re.search(r"\\tag\{([^}]+)\}", latex)
        said = '<div class="parts">%s</div>' % "".join(
            "<span>%s</span>" % "".join(mathml(piece, "block") for piece in chain)
            for chain in pieces(latex.replace(tag[0], "") if tag else latex))
        if not tag:
            return f'<div class="eq">{said}</div>'
        n, rows = tag[1], ""
        for label, anchor, _ in sorted(self.places.get(n, []), key=lambda at: at[1][0] == "L"):
            name = f"<code>{label}</code>" if anchor.startswith("f-") else label
            rows += f'<li><a href="#{anchor}">{name}</a></li>'
        return (f'<div class="eq" id="eq-{n}">{said}<details class="number">'
                f'<summary>({n})</summary><ul>{rows}<li><a href="#eq-{n}">link to ({n})</a></li>'
                f"</ul></details></div>{self.living(n)}")

    @staticmethod
    def living(behind):
        """The place of the living figure behind an equation or figure; the script fills it."""
        name = LIVING.get(behind)
        return f'<div class="living" id="living-{name}"></div>' if name else ""

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
        # Lists may stand right below a paragraph, which this Markdown does not take.
        source = re.sub(r"^((?!- |\d+\. |[ |]).+)\n(?=- )", r"\1\n\n", source, flags=re.M)
        md = markdown.Markdown(extensions=["tables", "sane_lists"])
        md.preprocessors.register(Displays(md), "displays", 25)
        md.inlinePatterns.register(Formula(FORMULA, md), "formula", 185)
        md.inlinePatterns.register(Citation(IN_TEXT.pattern, md), "citation", 100)
        body = md.convert(source)
        plain = re.sub(r"<(pre|code)>.*?</\1>", "", body, flags=re.S)
        if "$" in plain:
            raise Forms(f"doc/{name}.md: expected the other $ of a formula, found none: "
                        + plain[plain.index("$"):].splitlines()[0])
        body = re.sub(r"<(/?)h(\d)>", lambda m: f"<{m[1]}h{int(m[2]) + down}>", body)
        # A heading of a table that has no words is none.
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
        svg = re.sub(r"<metadata>.*?</metadata>|<\?xml.*?\?>|<!DOCTYPE.*?>", "",
                     read(f"doc/{source}"), flags=re.S)
        data = urllib.parse.quote(re.sub(r"\s+", " ", svg), safe=" =:/'(),;.<>{}")
        caption = f"<figcaption>{match[2]}</figcaption>" if match[2] else ""
        return (f'<figure><img src="data:image/svg+xml,{data}" alt="{" ".join(alt.split())}">'
                f"{caption}</figure>{self.living(pathlib.Path(source).name)}")

    def sections(self, body, name, down):
        """Ids for headings, a section for each of the second level, and links to functions."""
        seen, out, title, end = set(), [], name, ""
        for part in re.split(r"(<h[1-5]>.*?</h[1-5]>)", body, flags=re.S):
            m = re.match(r"<h(\d)>(.*)</h\d>", part, re.S)
            if not m:
                out.append(self.link_functions(part, title))
                continue
            level, title = int(m[1]) - down, html.unescape(re.sub(r"<[^>]+>", "", m[2]))
            number = re.match(r"\d+(?= )", title)
            here = (name if level == 1 else f"section-{number[0]}" if number else
                    f"{name}-" + re.sub(r"\W+", "-", title.lower()).strip("-"))
            while here in seen:
                here += "-"
            seen.add(here)
            if level <= 2:
                beyond = name == "modify" or bool(number) and int(number[0]) in self.beyond
                out.append(f'{end}<section{class_of(beyond)} aria-labelledby="{here}">')
                self.contents.append((here, title, beyond))
                end = "</section>"
            out.append(f'<h{m[1]} id="{here}">{m[2]}</h{m[1]}>')
        return "".join(out) + end

    def link_functions(self, body, title):
        """Links from functions' names in the text, and a record of them for links back."""
        def link(m):
            name = m[1]
            if name not in self.code.functions:
                return m[0]
            found = self.mentions.setdefault(name, [])
            found.append((f"m-{name}-{len(found) + 1}", title))
            return f'<a id="{found[-1][0]}" href="#f-{name}"><code>{name}</code></a>'
        return re.sub(r'(?<!<pre>)(?<!">)<code>(\w+)</code>', link, body)


# --- The code

def code_html(code, mentions):
    """The program, a section for each chapter, a span with an id for each line."""
    import pygments
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import CLexer
    from pygments.token import Comment, Keyword, Number, String, Token
    kinds = [Comment.Preproc, Comment.PreprocFile, Comment, Keyword, String, Number]
    tokens = ((next((kind for kind in kinds if token in kind), Token), text)
              for token, text in CLexer(stripnl=False).get_tokens(code.source))
    lines = pygments.format(tokens, HtmlFormatter(nowrap=True)).split("\n")

    def cite(m):
        return re.sub(NUMBER, r'<a class="cite" href="#eq-\g<0>">\g<0></a>', m[0])
    lines = [re.sub('(?<=<span class="c">)[^<]*', lambda m: CITED.sub(cite, m[0]), line)
             for line in lines]
    for name, (first, _) in code.functions.items():
        anchor = mentions[name][0][0] if name in mentions else f"f-{name}"
        lines[first - 1] = re.sub(rf"\b{name}(?=\()", f'<a class="f" id="f-{name}" '
                                  f'href="#{anchor}">{name}</a>', lines[first - 1], count=1)

    head = Chapter(0, "How to read this file", "", False, 1, 1)
    out, ends = [], [c.first for c in code.chapters] + [len(code.lines) + 1]
    for c, end in zip([head, *code.chapters], ends):
        title = html.escape(f"Chapter {c.number}: {c.title}" if c.number else c.title)
        body = "".join(f'<span class="l" id="L{i}">{lines[i - 1]}\n</span>'
                       for i in range(c.first, end))
        out.append(f'<section id="chapter-{c.number}"{class_of(c.beyond)} '
                   f'style="--first:{c.first - 1}"><h2 class="unseen">{title}</h2>'
                   f"<pre><code>{body}</code></pre></section>")
    return "".join(out)


# --- The whole

def following(code, texts, text, body):
    """(id in the text, line of the code) of what belongs together, in the text's order: equations
    and their first citation in their chapter, sections, and the first function that a paragraph
    names."""
    beside, banner = {}, {c.number: c.banner for c in code.chapters}
    for row in texts.rows:
        for n in row.numbers:
            lines = [line for *_, line in text.places[n] if code.chapter_at(line) == row.chapter]
            if lines:
                beside[f"eq-{n}"] = min(lines)
        if row.chapter:
            beside.update((f"section-{n}", banner[row.chapter]) for n in row.sections)
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

    def said(words):
        words = re.sub(FORMULA, lambda m: re.sub(r"\\mathrm|[{}]|,g\b", "", m[1]), words)
        return words.replace("`", "")

    def plain(name):  # as the page has it: W_UK as WUK, \tilde q as q~
        return re.sub(r"[\\_ ]", "", re.sub(r"\\tilde (\w)", r"\1~", said(name)))
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
    """Experiment -> its runs, [row, seed, loss, parameters, cached floats, learning rate, command].
    """
    found = {}
    for path in sorted((ROOT / "dev/results").glob("*.csv")):
        runs = need(list(csv.DictReader(read(path.relative_to(ROOT)).splitlines())),
                    f"dev/results/{path.name}", "a table of runs")
        program = {run.get("row"): run.get("program") for run in runs}

        def command(run):
            row = run["row"].removesuffix(", at once")  # the loss before that row's fine-tuning
            return (f'python3 dev/experiments.py {path.stem} --only "{row}" --seeds {run["seed"]}'
                    + " --device cuda" * (program.get(row) == "PyTorch"))
        try:
            found[path.stem] = [[run["row"], int(run["seed"]), float(run["val_loss"]),
                                 int(run["parameters"]), int(run["cache"]), run["learning_rate"],
                                 command(run)] for run in runs]
            if not all(math.isfinite(run[2]) for run in found[path.stem]):
                raise ValueError("a val_loss that is not finite")  # nor is it JSON
        except (KeyError, TypeError, ValueError) as error:
            raise Forms(f"dev/results/{path.name}: no table of runs: {error!r}") from error
    need("rank" in found, "dev/results", "rank.csv, with which the figure begins")
    return found


def contents(code, text):
    """Both tables of contents."""
    rows = "".join(f'<li{class_of(beyond)}><a href="#{anchor}">{html.escape(title)}</a></li>'
                   for anchor, title, beyond in text.contents)
    chapters = ""
    for part, members in itertools.groupby(code.chapters, lambda c: (c.part, c.beyond)):
        chapters += f"<li{class_of(part[1])}><strong>{html.escape(part[0])}</strong></li>"
        for c in members:
            names = ", ".join(f'<a href="#f-{name}"><code>{name}</code></a>'
                              for name, (first, _) in code.functions.items()
                              if code.chapter_at(first) == c.number)
            chapters += (f'<li{class_of(c.beyond)}><a href="#chapter-{c.number}">{c.number} '
                         f"{html.escape(c.title)}</a><details><summary>functions</summary>{names}"
                         "</details></li>")
    return f"<div><h2>Text</h2><ul>{rows}</ul></div><div><h2>Code</h2><ul>{chapters}</ul></div>"


def build(code, texts):
    """The page."""
    text = TextHtml(code, texts)
    body = text.convert(texts.writeup, "writeup", 0) + text.convert(texts.modify, "modify", 1)
    for behind, name in LIVING.items():
        need(f'id="living-{name}"' in body, "doc/writeup.md", f"equation or figure {behind}")
    notation = need(re.search(r'<h2 id="section-\d+">\d+ Notation.*?</section>', body, re.S),
                    "doc/writeup.md", "a section Notation")[0]
    tables = re.findall(r'<div class="scrolls">.*?</div>', notation, re.S)
    data = {"follow": following(code, texts, text, body), "symbols": symbols(texts),
            "results": results(), "mentions": text.mentions}
    fill = {"css": read("dev/page/page.css"), "js": read("dev/page/page.js"), "text": body,
            "code": code_html(code, text.mentions), "contents": contents(code, text),
            "notation": "".join(tables),
            "data": json.dumps(data, ensure_ascii=False).replace("</", "<\\/")}
    return re.sub(r"\{\{(\w+)\}\}", lambda m: fill[m[1]], read("dev/page/page.html"))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only check the equations' numbers")
    options = parser.parse_args()
    try:
        code = Code(read("train_gpt2_mla.c"))
        texts = Texts(read("doc/writeup.md"), read("doc/modify.md"))
        wrong = check(code, texts)
        if wrong:
            raise Forms("\n".join(wrong))
        cited = citations(code, texts)
        print(f"{len(texts.numbers)} equations, {len({n for _, n in cited})} of them cited in "
              f"{len(cited)} places: all fit")
        if options.check:
            return
        page = build(code, texts)
        (ROOT / OUT).parent.mkdir(exist_ok=True)
        (ROOT / OUT).write_text(page, encoding="utf-8")
    except (Forms, OSError) as error:
        sys.exit("\n".join(f"error: {line}" for line in str(error).splitlines()))
    except ModuleNotFoundError as error:
        sys.exit(f"error: Python's package {error.name} is missing: "
                 "pip install markdown pygments latex2mathml")
    print(f"{OUT}: {len(page.encode()) / 1e6:.2f} MB, {len(code.functions)} functions")


if __name__ == "__main__":
    main()
